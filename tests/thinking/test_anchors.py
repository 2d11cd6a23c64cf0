"""Which positions think: the same ones of a text, wherever pads stand around it."""

import pytest
import torch
from learn_cases import Row, build, lay, rows
from torch import Tensor

from quietstar.thinking.anchors import choose_anchors
from quietstar.thinking.batch_share import BatchShard
from quietstar.thinking.layout import text_ranges
from quietstar.thinking.text_batch import TextBatch

LAYOUTS: dict[str, dict] = {
    "right": {},
    "left": {"right": False},
    "more pads": {"before": 4, "after": 3},
}


def anchors_of(model, batch: Row) -> list[list[int]]:
    """For each row, the places in its text that think."""
    mask = batch["attention_mask"]
    with torch.no_grad():
        part = BatchShard(seed=11)
        output = model(batch["input_ids"], attention_mask=mask, labels=batch["labels"], batch_part=part)
    found = []
    for chosen, text, counts in zip(output.anchors, mask.bool(), output.rewarded, strict=True):
        begin, end = text.nonzero()[:, 0].aminmax()
        inside = chosen[text[chosen]].unique() - begin
        found.append(inside[inside < end - begin].tolist())
        # What only fills up the shape counts nowhere.
        assert not counts[~text[chosen] | (chosen == len(text) - 1)].any()
    return found


@pytest.mark.parametrize("rule", ["stride:3", "random:0.4", "random:1", "entropy:0.4"])
def test_pads_move_no_anchor(rule: str):
    model, made = build(think_at=rule).eval(), rows(False)
    found = {
        name: anchors_of(model, lay([[row] for row in made], **layout))
        for name, layout in LAYOUTS.items()
    }
    first, *others = found.values()
    assert all(other == first for other in others)
    for row, places in zip(made, first, strict=True):
        length = len(row["input_ids"])
        if rule == "stride:3":
            assert places == list(range(0, length - 1, 3))
        else:
            # A share of the text, at least one, of which the last token is not listed here.
            wanted = max(1, round(float(rule.split(":")[1]) * length))
            assert wanted - 1 <= len(places) <= wanted


def chosen(rule: str, documents: Tensor, part: BatchShard) -> Tensor:
    model = build(think_at=rule)
    ranges = text_ranges((documents != 0).long(), documents, documents)
    return choose_anchors(TextBatch(model.config, documents, ranges, shard=part)).anchors


def test_a_stride_begins_anew_in_every_document():
    documents = torch.tensor([[0, 1, 1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    found = chosen("stride:2", documents, BatchShard())
    # The rows choose 4 places each: 1, 3 | 4 | 6, and 0, 2, 4, 6.
    assert found.tolist() == [[1, 3, 4, 6], [0, 2, 4, 6]]
    short = chosen("stride:2", torch.tensor([[1, 1, 2, 3, 4, 4], [1, 1, 1, 1, 0, 0]]), BatchShard())
    assert short.tolist() == [[0, 2, 3, 4], [0, 2, 5, 5]]


def test_random_places_are_those_of_the_larger_batch():
    """Two parts draw what the whole draws, padded to other widths."""
    documents = (torch.rand(4, 12, generator=torch.Generator().manual_seed(0)) < 2).long()
    documents[1, 8:] = 0
    documents[3, :5] = 0
    whole = chosen("random:0.5", documents, BatchShard(seed=5))
    for index in (0, 1):
        rows_ = slice(2 * index, 2 * index + 2)
        part = BatchShard(index, 2, seed=5)
        assert torch.equal(chosen("random:0.5", documents[rows_], part), whole[rows_])
        wider = torch.nn.functional.pad(documents[rows_], (3, 0))
        found = chosen("random:0.5", wider, part) - 3
        for ours, theirs in zip(found, whole[rows_], strict=True):
            assert set(theirs.tolist()) <= {*ours.tolist(), 11}
