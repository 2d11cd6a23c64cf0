"""The trainer's own collator: rows of any length and kind, and a sentence for those it cannot stack."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import thinking_model
from small_training import small_model, trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar import QuietStarTrainer
from quietstar.data.collator import PaddingCollator


def uneven(count: int = 8, **more: Any) -> list[dict[str, Any]]:
    torch.manual_seed(2)
    rows = [torch.randint(3, 30, (5 + i % 4,)) for i in range(count)]
    return [{"input_ids": row, "labels": row, **more} for row in rows]


def tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(39)} | {"<|startthought|>": 39, "<|endthought|>": 40}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="w2", **special)
    made.add_special_tokens({"additional_special_tokens": ["<|startthought|>", "<|endthought|>"]})
    return made


def with_tokenizer(folder: Path, data: list, processing: Any = None) -> QuietStarTrainer:
    return trainer(folder, small_model(), data, max_steps=2, processing_class=processing)


@pytest.mark.parametrize(
    ("special", "pad", "side"),
    [
        (None, 0, "right"),
        ({}, 2, "right"),
        ({"pad_token": "w1"}, 1, "right"),
        ({"pad_token": "w1", "padding_side": "left"}, 1, "left"),
    ],
)
def test_uneven_rows_train(tmp_path, special: dict | None, pad: int, side: str):
    run = with_tokenizer(tmp_path, uneven(), None if special is None else tokenizer(**special))
    assert isinstance(run.data_collator, PaddingCollator)
    assert (run.data_collator.pad_id, run.data_collator.padding_side) == (pad, side)
    run.train()
    assert run.state.global_step == 2


def test_what_a_row_is_made_of_does_not_matter(tmp_path):
    """Lists, arrays and tensors, with the labels by either name of transformers."""
    found = []
    for kind in (list, np.array, torch.tensor):
        for name in ("labels", "label_ids"):
            data = [
                {"input_ids": kind(row["input_ids"].tolist()), name: kind(row["labels"].tolist())}
                for row in uneven()
            ]
            run = with_tokenizer(tmp_path, data)
            found.append({k: v.tolist() for k, v in next(iter(run.get_train_dataloader())).items()})
    assert all(batch == found[0] for batch in found)


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_column_finds_its_place(side: str):
    """Padded rows with given thoughts have the losses that each has alone."""
    fields = {"thought_length": 2, "talk_length": 1, "reward": "information-gain"}
    model = thinking_model(mixing=0.3, **fields).eval()
    torch.manual_seed(4)
    rows = []
    for length in (6, 9, 4):
        ids = torch.randint(3, 90, (length,))
        row = {"input_ids": ids, "labels": ids, "thought_ids": torch.randint(3, 90, (2, length, 2))}
        row["document_ids"] = torch.tensor([1, 1] + [2] * (length - 2))
        row["position_ids"] = torch.cat([torch.arange(2), torch.arange(length - 2)])
        row["anchors"] = torch.tensor([0, length - 3, length - 2])
        rows.append({**row, "baseline_losses": torch.rand(length - 1)})
    collate = PaddingCollator(7, side)
    batch = collate(rows)
    assert batch["thought_ids"].shape == (3, 2, 9, 2)
    together = model(**batch)
    for number, row in enumerate(rows):
        alone = model(**collate([row]))
        n = len(row["input_ids"])
        here = slice(9 - n, 9) if side == "left" else slice(0, n)
        # Before a row's first token there is nothing to be predicted from.
        losses = together.base_losses[number, here.start : here.start + n - 1]
        torch.testing.assert_close(losses, alone.base_losses[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            together.talk_losses[:, number], alone.talk_losses[:, 0], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(together.reward[number], alone.reward[0], rtol=1e-4, atol=1e-5)


def test_thoughts_of_anchors_are_stacked_as_they_are():
    thoughts = np.ones((1, 2, 4), dtype=np.int64)
    ids = [list(range(3, 3 + n)) for n in (5, 7)]
    rows = [{"input_ids": row, "anchors": [0, 2], "thought_ids": thoughts} for row in ids]
    batch = PaddingCollator(0, "left")(rows)
    assert batch["anchors"].tolist() == [[2, 4], [0, 2]] and batch["thought_ids"].shape == (2, 1, 2, 4)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([3, 4, 5], "row 1 of a batch is a list; expected a mapping with input_ids and labels"),
        ({"text": "words"}, "row 1 of a batch has no input_ids, only text"),
        ({"input_ids": [3, 4, 5]}, "row 1 of a batch has no labels, which others have"),
        ({"input_ids": [[3, 4, 5]], "labels": [[3, 4, 5]]}, r"input_ids of row 1 .* shape \[1, 3\]"),
        ({"input_ids": [3, 4, 5], "labels": [3, 4]}, r"labels of row 1 .* \[2\]; expected \[tokens\]"),
        ({"input_ids": [3.5, 4.0], "labels": [3, 4]}, "input_ids of row 1 .* holds torch.float32"),
        ({"input_ids": "words", "labels": [3]}, "input_ids of row 1 of a batch is 'words'"),
        (
            {"input_ids": [3, 4], "labels": [3, 4], "document_id": [1, 1]},
            "row 1 of a batch has the column 'document_id'; expected any of input_ids, .*document_ids",
        ),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_stacked(row: Any, said: str):
    whole = {"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}
    with pytest.raises(ValueError, match=said):
        PaddingCollator()([whole, row])


def test_thoughts_that_do_not_fit_their_rows():
    rows = [
        {"input_ids": list(range(3, 3 + n)), "thought_ids": np.ones((1, 2, 4), dtype=np.int64)}
        for n in (5, 7)
    ]
    with pytest.raises(ValueError, match=r"thought_ids of row 0 .* has shape \[1, 2, 4\] for 5 tokens"):
        PaddingCollator()(rows)


def test_rows_with_fewer_anchors_repeat_their_last():
    rows = [
        {"input_ids": [3, 4, 5, 6], "anchors": [1, 2, 3], "completion_anchors": [2]},
        {"input_ids": [3, 4], "anchors": [0], "completion_anchors": [0]},
        {"input_ids": [3, 4, 5], "anchors": [], "completion_anchors": []},
    ]
    for side, anchors, completions in (
        ("right", [[1, 2, 3], [0, 0, 0], [3, 3, 3]], [[2], [0], [3]]),
        ("left", [[1, 2, 3], [2, 2, 2], [3, 3, 3]], [[2], [2], [3]]),
    ):
        batch = PaddingCollator(0, side)(rows)
        assert batch["anchors"].tolist() == anchors and batch["anchors"].dtype == torch.int64
        assert batch["completion_anchors"].tolist() == completions
    thoughts = [np.full((1, n, 2), 7) for n in (3, 1, 0)]
    given = [{**row, "thought_ids": ids} for row, ids in zip(rows, thoughts, strict=True)]
    assert PaddingCollator()(given)["thought_ids"].shape == (3, 1, 3, 2)
    assert PaddingCollator()(rows[2:])["anchors"].tolist() == [[2]]


def test_rows_without_a_target_change_nothing(caplog):
    whole = {"input_ids": [3, 4, 5, 6, 7], "labels": [3, 4, 5, 6, 7]}
    useless = [
        {"input_ids": [], "labels": []},
        {"input_ids": [9], "labels": [9]},
        {"input_ids": [9, 8, 7], "labels": [9, -100, -100]},
    ]
    model = small_model().eval()
    collate = PaddingCollator()
    batch = collate([useless[0], whole, *useless[1:]])
    assert not caplog.records  # the Trainer counts them, once
    expected, found = model(**collate([whole])), model(**batch)
    torch.testing.assert_close(found.nll_loss, expected.nll_loss)
    torch.testing.assert_close(found.base_losses[1], expected.base_losses[0])


def test_batches_of_short_rows_only(tmp_path):
    """A row of two tokens has a target, if none to think for: it does not end a run."""
    data = [{"input_ids": [5, 6 + i], "labels": [5, 6 + i]} for i in range(8)]
    run = with_tokenizer(tmp_path, data)
    run.train()
    assert run.state.global_step == 2
    assert next(iter(run.get_train_dataloader()))["input_ids"].shape == (2, 4)
