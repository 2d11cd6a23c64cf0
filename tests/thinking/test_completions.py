"""Thoughts at completions, at given anchors and by the true token's loss: a row counts what it has."""

from typing import Any

import pytest
import torch
from learn_cases import FIELDS, RATIONALES, THOUGHT, Row, build
from torch import Tensor

from quietstar import QuietStarForCausalLM
from quietstar.data.collator import PaddingCollator
from quietstar.thinking.anchors import choose_anchors
from quietstar.thinking.batch_share import BatchShard
from quietstar.thinking.layout import text_ranges
from quietstar.thinking.text_batch import TextBatch
from quietstar.training.global_batch import loss_divisors

# Tokens of the prompts and of the completions behind them, and how many blanks the latter begin with.
SIZES = ((4, 3, 1), (9, 6, 0), (2, 5, 2), (6, 2, 0))


def rows(copy: bool = False, anchors: str = "completion_anchors") -> list[Row]:
    """Prompts with completions, and thoughts at every token."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for prompt, completion, blanks in SIZES:
        length = prompt + completion
        ids = torch.randint(3, 90, (length,), generator=generator)
        row = {"input_ids": ids, "labels": ids.clone(), anchors: torch.tensor([prompt - 1 + blanks])}
        row["labels"][:prompt] = -100
        row["thought_ids"] = torch.randint(3, 90, (RATIONALES, length, THOUGHT), generator=generator)
        if copy:
            row["baseline_losses"] = torch.rand(length - 1, generator=generator) * 4
        made.append(row)
    return made


def joined(texts: list[Row]) -> Row:
    """One row of several documents."""
    found = {}
    lengths = torch.tensor([len(text["input_ids"]) for text in texts])
    starts = lengths.cumsum(0) - lengths
    for name in texts[0]:
        parts = [text[name] for text in texts]
        if name.endswith("anchors"):
            parts = [part + start for part, start in zip(parts, starts, strict=True)]
        elif name == "baseline_losses":  # of the first token of a document there is none
            parts = [torch.cat([part, torch.tensor([9.0])]) for part in parts]
        found[name] = torch.cat(parts, dim=1 if name == "thought_ids" else 0)
    if "baseline_losses" in found:
        found["baseline_losses"] = found["baseline_losses"][:-1]
    found["document_ids"] = torch.arange(len(texts)).repeat_interleave(lengths) + 1
    return found


Learnt = tuple[Tensor, list[Tensor]]


def learn(model: QuietStarForCausalLM, batches: list[Row]) -> Learnt:
    """The sum of the batches' losses and its gradient, over the divisors of all of them together."""
    bare = [{k: v for k, v in batch.items() if k != "baseline_losses"} for batch in batches]
    counts = [loss_divisors(model.config, batch, BatchShard()) for batch in bare]
    known = {name: sum(count[name] for count in counts if count) for name in ("targets", "thoughts")}
    part = BatchShard(mean_count=lambda name, own: known[name])
    for parameter in model.parameters():
        parameter.grad = None
    loss = torch.stack([model(**batch, batch_part=part).loss for batch in batches]).sum()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(found: Learnt, expected: Learnt) -> None:
    assert float(expected[0]) == pytest.approx(float(found[0]), rel=1e-5)
    whole = torch.cat([gradient.flatten() for gradient in expected[1]])
    other = torch.cat([gradient.flatten() for gradient in found[1]])
    assert whole.norm() > 0.1 and (whole - other).norm() < 1e-5 * whole.norm()


LAYOUTS: dict[str, PaddingCollator] = {
    "right": PaddingCollator(7),
    "left": PaddingCollator(7, "left"),
    "more pads": PaddingCollator(7, "left", min_length=21),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fields", ["default", "grpo", "rlp"])
def test_a_batch_is_its_rows_alone(fields: str, layout: str):
    model = build(**FIELDS[fields], **{"think_at": "completion", "policy_weight": 2.0})
    made, alone = rows(fields == "rlp"), PaddingCollator()
    together = LAYOUTS[layout](made)
    assert_same(learn(model, [together]), learn(model, [alone([row]) for row in made]))
    with torch.no_grad():
        output = model(**together)
    assert output.anchors.shape == (4, 1) and output.talk_losses.shape[-1] == 1


@pytest.mark.parametrize("fields", ["default", "grpo", "rlp"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_documents_each_have_their_completion(fields: str, side: str):
    """Rows of three documents and of one: the latter counts one thought, not three."""
    model = build(**FIELDS[fields], **{"think_at": "completion", "policy_weight": 2.0})
    texts, alone = rows(fields == "rlp"), PaddingCollator()
    packed = PaddingCollator(7, side)([joined(texts[:3]), joined(texts[3:])])
    assert packed["completion_anchors"].shape == (2, 3)
    assert_same(learn(model, [packed]), learn(model, [alone([row]) for row in texts]))


@pytest.mark.parametrize("fields", [{}, {"policy_mean": "paper"}], ids=str)
def test_rows_with_fewer_anchors_count_only_what_they_have(fields: dict[str, Any]):
    """Ragged anchors, repeated by the collator: sums over rows alone, in the paper's mean, too."""
    model = build(policy_weight=2.0, **fields)
    made = rows(anchors="anchors")
    for row, places in zip(made, ([1, 2, 5], [8], [1, 4], [3, 4, 5, 6]), strict=True):
        row["anchors"] = torch.tensor(places)
        # The paper's mean is over the row's width, so that all rows have one.
        for name, value in row.items() if fields else ():
            if name not in ("anchors", "thought_ids"):
                row[name] = torch.nn.functional.pad(value, (0, 15 - len(value)), value=7)
        if fields:
            row["thought_ids"] = torch.nn.functional.pad(
                row["thought_ids"], (0, 0, 0, 15 - row["thought_ids"].shape[1])
            )
    alone = PaddingCollator()
    together = PaddingCollator(7)(made)
    assert together["anchors"].shape == (4, 4)
    assert_same(learn(model, [together]), learn(model, [alone([row]) for row in made]))
    with torch.no_grad():
        output = model(**together)
    assert output.rewarded.sum(1).tolist() == [3, 1, 2, 4]


def test_thoughts_that_were_sampled_are_counted_once():
    """Without given thoughts: the mean over anchors is over those that there are."""
    model = build(think_at="completion", clamp_advantage=False)
    made = [{name: value for name, value in row.items() if name != "thought_ids"} for row in rows()]
    ragged = PaddingCollator(7)([joined(made[:3]), joined(made[3:])])
    output = model(**ragged, batch_part=BatchShard(seed=3))
    assert output.rewarded.tolist() == [[True] * 3, [True, False, False]]
    assert output.has_target[0].sum() == 4 and not output.reward[1, :, 1:].any()
    counted = output.talk_losses[0][output.has_target[0][:, None].expand(-1, RATIONALES, -1)]
    torch.testing.assert_close(output.talk_loss[0], counted.mean())


# ---- by the true token's loss ---------------------------------------------------------------------


def bounds(model: QuietStarForCausalLM, batch: Row) -> tuple[float, float]:
    """The quartiles of the losses that count."""
    with torch.no_grad():
        output = model(**{k: v for k, v in batch.items() if k != "thought_ids"})
    losses = output.base_losses[output.is_target].double()
    low, high = losses.quantile(torch.tensor([0.25, 0.75]).double()).tolist()
    return low, high


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True])
def test_positions_between_two_bounds(layout: str, packed: bool):
    model = build().eval()
    made = rows()
    for row in made[:3]:
        row["labels"] = row["input_ids"].clone()
    batch = LAYOUTS[layout]([joined(made[:2]), joined(made[2:])] if packed else made)
    low, high = bounds(model, batch)
    model.config.think_at = f"loss:{low}:{high}"
    with torch.no_grad():
        output = model(**batch)
    inside = output.is_target & (output.base_losses >= low) & (output.base_losses <= high)
    assert 0.4 < inside.sum() / output.is_target.sum() < 0.6
    last = batch["input_ids"].shape[1] - 1
    for places, expected in zip(output.anchors.tolist(), inside, strict=True):
        chosen = expected.nonzero()[:, 0].tolist()
        assert places == chosen + [last] * (len(places) - len(chosen))
    # As many columns as the row with the most needs.
    assert output.anchors.shape[1] == inside.sum(1).max()
    assert torch.equal(output.rewarded.sum(1), inside.sum(1))


def test_the_same_positions_are_learnt_from_alone_and_in_a_batch():
    made = rows()
    model = build(policy_weight=2.0)
    together = PaddingCollator(7)(made)
    low, high = bounds(model, together)
    model.config.think_at = f"loss:{low}:{high}"

    def learnt(batches: list[Row]) -> Learnt:
        # What follows from the pass is not known before: counted in a first pass.
        seen = [model(**batch, batch_part=BatchShard()) for batch in batches]
        known = {
            "targets": sum(
                torch.stack([o.is_target.sum(), *(o.has_target.sum((1, 2)) * RATIONALES)]) for o in seen
            ),
            "thoughts": sum(o.rewarded.sum() * RATIONALES for o in seen),
        }
        part = BatchShard(mean_count=lambda name, own: known[name])
        model.zero_grad()
        loss = torch.stack([model(**batch, batch_part=part).loss for batch in batches]).sum()
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    alone = PaddingCollator()
    assert_same(learnt([together]), learnt([alone([row]) for row in made]))


def test_no_position_between_the_bounds():
    """Nobody thinks; the base prediction is learnt."""
    model = build(think_at="loss:1000:2000")
    batch = PaddingCollator()(rows())
    output = model(**batch)
    assert output.anchors.shape == (4, 1) and not output.rewarded.any()
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx(0.5 * float(output.base_loss), rel=1e-5)


# ---- what cannot be used --------------------------------------------------------------------------


def test_thoughts_where_no_completion_is():
    model = build(think_at="completion")
    batch = PaddingCollator()(rows())
    bare = {name: value for name, value in batch.items() if name != "completion_anchors"}
    with pytest.raises(
        ValueError, match="think_at is 'completion' and the batch has no completion_anch"
    ):
        model(**bare)
    with pytest.raises(
        ValueError, match=r"completion_anchors has shape \[4\]; expected \[4, completions"
    ):
        model(**bare, completion_anchors=torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="completion_anchors contains 15; expected values from 0 to 14"):
        model(**bare, completion_anchors=torch.full((4, 1), 15))
    # Anchors that are given need no rule, and predictions are made at every position.
    assert model(**bare, anchors=torch.ones(4, 1, dtype=torch.int64)).loss.isfinite()
    assert model(batch["input_ids"]).logits.shape[1] == 15


def test_a_loss_that_nobody_knows():
    model = build(think_at="loss:1:4.5").eval()
    batch = PaddingCollator()(rows())
    ids = batch["input_ids"]
    text = TextBatch(model.config, ids, text_ranges(batch["attention_mask"], ids))
    hidden = torch.zeros(*ids.shape, 32, dtype=torch.float64)
    with pytest.raises(
        ValueError, match="think_at is 'loss:1:4.5' and there are no labels; expected them"
    ):
        choose_anchors(text, hidden, model.thought_decoder.output)
    with pytest.raises(ValueError, match="think_at 'loss' needs the text's hidden states"):
        choose_anchors(text)
    with pytest.raises(ValueError, match="thinking is 'loss:1:4.5', a rule of think_at, as generation"):
        model.generate(ids, thinking="loss:1:4.5")
