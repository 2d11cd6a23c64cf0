"""Documents told apart by position_ids and their kin: the same as with document_ids, or rejected."""

from typing import Any

import pytest
import torch
from small_training import small_model, trainer
from torch import Tensor
from transformers import DataCollatorWithFlattening, DynamicCache

from quietstar.thinking.batch_share import WHOLE_BATCH
from quietstar.thinking.documents import batch_ranges
from quietstar.training.global_batch import loss_divisors

LENGTHS = (5, 8, 3)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
NUMBERS = torch.repeat_interleave(torch.arange(1, 4), torch.tensor(LENGTHS))[None]


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, list[int]]]:
    torch.manual_seed(3)
    return [{"input_ids": torch.randint(3, 30, (n,)).tolist()} for n in lengths]


def flattened(**options: Any) -> dict[str, Any]:
    return dict(DataCollatorWithFlattening(**options)(documents()))


def losses(model: Any, batch: dict[str, Any]) -> Tensor:
    torch.manual_seed(5)
    output = model(**batch)
    return torch.cat([output.base_losses.flatten(), output.talk_losses.flatten()])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_seq_idx": True},
        {"return_flash_attn_kwargs": True},
        {"return_position_ids": False, "return_seq_idx": True},
        {"return_position_ids": False, "return_flash_attn_kwargs": True},
    ],
)
def test_flattened_batches_are_packed_documents(options: dict[str, bool]):
    model, batch = small_model(), flattened(**options)
    assert {"position_ids", "seq_idx", "cu_seq_lens_q"} & set(batch)
    ids = {key: batch[key] for key in ("input_ids", "labels")}
    expected = losses(model, {**ids, "document_ids": NUMBERS})
    torch.testing.assert_close(losses(model, batch), expected, rtol=0, atol=0)
    together = losses(model, ids)
    assert not torch.allclose(together, expected, atol=1e-3)


def test_they_are_the_documents_alone():
    model = small_model(thought_kind="none")
    loss = model(**flattened()).loss
    alone = [torch.tensor([row["input_ids"]]) for row in documents()]
    summed = sum(model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in alone)
    torch.testing.assert_close(loss, summed / (sum(LENGTHS) - len(LENGTHS)))


def test_whoever_counts_sees_the_same_documents():
    model, batch = small_model(), flattened()
    other = {"input_ids": batch["input_ids"], "labels": batch["labels"], "document_ids": NUMBERS}
    found, expected = (loss_divisors(model.config, b, WHOLE_BATCH) for b in (batch, other))
    assert found is not None and expected is not None
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in expected.items()}


@pytest.mark.parametrize("reward", ["mixture-gain", "information-gain"])
def test_training_on_them(tmp_path, reward: str):
    """Accumulated, evaluated and measured against the averaged copy, they train as packed rows do."""

    class Packed(DataCollatorWithFlattening):
        def __call__(self, features: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            batch = super().__call__(features, *args, **kwargs)
            lengths = torch.tensor([len(row["input_ids"]) for row in features])
            del batch["position_ids"]
            numbers = torch.arange(len(lengths)).repeat_interleave(lengths)
            return {**batch, "document_ids": numbers[None]}

    found = []
    data = documents((6, 9, 7, 5, 8, 4, 9, 6))
    for collator in (DataCollatorWithFlattening(), Packed()):
        run = trainer(
            tmp_path, small_model(reward=reward), data, gradient_accumulation_steps=2, max_steps=2
        )
        run.data_collator = collator
        run.train()
        found.append((run.state.log_history[0]["loss"], run.evaluate()["eval_loss"]))
    assert found[0] == found[1]


def test_rows_that_have_position_ids_keep_them(tmp_path):
    """The Trainer drops what forward does not name."""
    row = {"input_ids": torch.arange(3, 19), "labels": torch.arange(3, 19), "position_ids": POSITIONS[0]}
    run = trainer(tmp_path, small_model(), [row] * 4, per_device_train_batch_size=1)
    batch = next(iter(run.get_train_dataloader()))
    assert batch_ranges(batch).start[0].tolist() == [0] * 5 + [5] * 8 + [13] * 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_any_position(side: str):
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    positions = torch.tensor([[0, 1, 0, 1, 1, 1]])
    expected = [0, 0, 2, 2]
    if side == "left":
        mask, positions, expected = mask.flip(1), positions.roll(2, 1), [2, 2, 4, 4]
    ids = torch.ones_like(mask)
    ranges = batch_ranges({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    assert ranges.start[mask != 0].tolist() == expected
    whole = {"input_ids": ids.expand(2, -1), "position_ids": torch.arange(6)[None]}
    assert batch_ranges(whole).plain


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"position_ids": POSITIONS + 2}, r"position_ids\[0, 0\] is 2; expected 0"),
        ({"position_ids": POSITIONS * 2}, r"position_ids\[0, 1\] is 2; expected 1: they count from 0"),
        ({"position_ids": POSITIONS[0]}, r"position_ids has shape \[16\]; expected \[1, 16\]"),
        (
            {"position_ids": torch.arange(16)[None], "document_ids": NUMBERS},
            r"position_ids\[0, 5\] is 5; expected 0: .* as document_ids says",
        ),
        ({"seq_idx": NUMBERS[:, :4]}, r"seq_idx has shape \[1, 4\]; expected \[1, 16\]"),
        (
            {"seq_idx": NUMBERS.flip(1), "document_ids": NUMBERS},
            "seq_idx and document_ids disagree about where documents begin",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 13])}, r"cu_seq_lens_q is \[0, 5, 13\]; expected .* 16"),
        (
            {"cu_seq_lens_k": torch.tensor([0, 16]), "cu_seq_lens_q": torch.tensor([0, 4, 16])},
            "cu_seq_lens_k and cu_seq_lens_q disagree about where documents begin",
        ),
        ({"max_length_q": 8}, "max_length_q was given without cu_seq_lens_q"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 8, 16]), "max_length_q": 9},
            "max_length_q is 9; expected 8, the longest of cu_seq_lens_q",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(more: dict[str, Any], said: str):
    batch = {"input_ids": torch.arange(3, 19)[None], "labels": torch.arange(3, 19)[None], **more}
    with pytest.raises(ValueError, match=said):
        small_model()(**batch)


def test_lengths_of_one_row_do_not_describe_several():
    ids = torch.ones(2, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="cu_seq_lens_q was given with 2 rows; expected one"):
        batch_ranges({"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 8])})


def test_with_a_cache_they_follow_from_the_mask():
    model = small_model().eval()
    prompt, mask = torch.tensor([[0, 4, 5, 6]]), torch.tensor([[0, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    right = model.generate(prompt, position_ids=torch.tensor([[0, 0, 1, 2]]), **options)
    assert torch.equal(right, model.generate(prompt, **options))
    with pytest.raises(ValueError, match=r"position_ids\[0, 1\] is 1; expected 0: .* attention_mask"):
        model.generate(prompt, position_ids=torch.arange(4)[None], **options)
    cache = model(prompt, attention_mask=mask, use_cache=True, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="`seq_idx` and `past_key_values` cannot be combined"):
        model(prompt, past_key_values=cache.past_key_values, seq_idx=torch.zeros_like(prompt))
