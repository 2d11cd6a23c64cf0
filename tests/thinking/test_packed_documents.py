"""Several documents in a row: the same losses, rewards and gradients as each of them alone."""

from typing import Any

import pytest
import torch
from families import gradients as gradients_of
from families import thinking_model, tiny_decoder
from torch import Tensor

from quietstar import QuietStarForCausalLM
from quietstar.thinking.batch_share import BatchShard
from quietstar.thinking.layout import text_positions, text_ranges

THOUGHT, TALK, RATIONALES = 3, 2, 2
# Documents of one token have no place for a thought that could be rewarded, and short ones none for a
# thought that is rewarded for all of its talk steps.
LENGTHS = ([9, 1, 6, 4], [2, 12, 3], [5, 7, 5])


def build(family: str, dtype: torch.dtype, **fields: Any) -> QuietStarForCausalLM:
    fields |= {"thought_length": THOUGHT, "talk_length": TALK, "num_rationales": RATIONALES}
    decoder = tiny_decoder(family, seed=int(torch.randint(1000, ())))
    model = thinking_model(decoder, mixing=0.3, embeddings=0.01, policy_weight=2.0, **fields)
    return model.to(dtype).train()


def packed_rows(side: str) -> dict[str, Tensor]:
    width = max(sum(lengths) for lengths in LENGTHS)
    ids = torch.randint(3, 90, (len(LENGTHS), width))
    documents = torch.zeros_like(ids)
    for row, lengths in enumerate(LENGTHS):
        numbers = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))
        begin = width - len(numbers) if side == "left" else 0
        documents[row, begin : begin + len(numbers)] = numbers
    labels = ids.clone()
    labels[0, 3] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "document_ids": documents,
        "attention_mask": (documents != 0).long(),
        "thought_ids": torch.randint(3, 90, (len(LENGTHS), RATIONALES, width, THOUGHT)),
    }


def alone(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every document as a batch of its own; one of a single token has nothing to learn."""
    made = []
    for row, lengths in enumerate(LENGTHS):
        for number, length in enumerate(lengths, start=1):
            where = (batch["document_ids"][row] == number).nonzero()[:, 0]
            document = {name: batch[name][row : row + 1, where] for name in ("input_ids", "labels")}
            if "thought_ids" in batch:
                document["thought_ids"] = batch["thought_ids"][row : row + 1, :, where]
            if length > 1:
                made.append(document)
    return made


@pytest.fixture(autouse=True)
def any_length(monkeypatch) -> None:
    """Documents too short to think in are rejected as rows; here they have to run."""
    monkeypatch.setattr("quietstar.modeling.model.check_text", lambda *arguments: None)


def run(
    model: QuietStarForCausalLM,
    batches: list[dict[str, Tensor]],
    counts: dict[str, Tensor],
    record: bool,
) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, sum of absolute rewards and gradients; divides by the counts, or notes its own."""

    def mean_count(name: str, own: Tensor) -> Tensor:
        if record:
            counts[name] = own
        return counts[name]

    model.zero_grad()
    loss = reward = 0.0
    for batch in batches:
        output = model(**batch, batch_part=BatchShard(mean_count=mean_count))
        output.loss.backward()
        loss += float(output.loss)
        reward += float(output.reward.abs().sum()) if output.reward is not None else 0.0
    return loss, reward, gradients_of(model)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float64),
        ("mistral", torch.float64),
        ("llama", torch.float32),
        ("mistral", torch.float32),
        ("gemma2", torch.float32),
        ("gpt2", torch.float32),
        ("gpt_oss", torch.float32),
    ],
)
def test_packed_documents_are_documents_alone(family: str, dtype: torch.dtype, side: str):
    model, batch = build(family, dtype), packed_rows(side)
    counts: dict[str, Tensor] = {}
    loss, reward, gradients = run(model, [batch], counts, record=True)
    # Every token of a document but the last has one to predict; one label is hidden in the first row:
    # position 2 still has the next but one, in a document of nine.
    rewarded = sum(n - 1 for lengths in LENGTHS for n in lengths)
    assert int(counts["thoughts"]) == RATIONALES * rewarded
    assert int(counts["targets"][0]) == sum(n - 1 for lengths in LENGTHS for n in lengths) - 1
    loss_alone, reward_alone, expected = run(model, alone(batch), counts, record=False)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    assert loss == pytest.approx(loss_alone, rel=max(tolerance, 1e-7))
    # Losses are fp32 whatever the model is.
    assert reward == pytest.approx(reward_alone, rel=max(tolerance, 1e-5))
    assert set(gradients) == set(expected)
    for name, value in expected.items():
        error = (gradients[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)
        assert error < tolerance, name


def test_it_matters():
    """Without the numbers the same row is another text."""
    model, batch = build("llama", torch.float32), packed_rows("right")
    counts: dict[str, Tensor] = {}
    *_, gradients = run(model, [batch], counts, record=True)
    del batch["document_ids"]
    *_, other = run(model, [batch], counts, record=False)
    assert all(float((gradients[n] - other[n]).abs().max()) > 1e-4 for n in gradients)


@pytest.mark.parametrize("kind", ["none", "pause"])
def test_the_controls_as_well(kind: str):
    model, batch = build("llama", torch.float64, thought_kind=kind), packed_rows("right")
    del batch["thought_ids"]
    counts: dict[str, Tensor] = {}
    loss, _, gradients = run(model, [batch], counts, record=True)
    loss_alone, _, expected = run(model, alone(batch), counts, record=False)
    assert loss == pytest.approx(loss_alone, rel=1e-7)
    for name, value in expected.items():
        assert torch.allclose(gradients[name], value, rtol=1e-8, atol=1e-12), name


def test_what_a_token_sees():
    documents = torch.tensor([[0, 4, 4, 4, 9, 2, 2, 0]])
    ids = torch.zeros_like(documents)
    ranges = text_ranges((documents != 0).long(), ids, documents)
    start, stop, plain, _ = ranges
    assert not plain
    assert start.tolist() == [[1, 1, 1, 1, 4, 5, 5, 8]] and stop.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert text_positions(start, stop)[0, 1:7].tolist() == [0, 1, 2, 0, 0, 1]
    assert ranges.end is not None and ranges.end.tolist() == [[0, 4, 4, 4, 5, 7, 7, 0]]
    one = text_ranges(None, ids, torch.full_like(ids, 3))
    assert one.end is None and one.plain
    with pytest.raises(ValueError, match=r"document_ids has shape \[1, 3\]; expected \[1, 8\]"):
        text_ranges(None, ids, documents[:, :3])


def test_rollouts_stay_inside_their_document():
    """A token of another document changes no thought, no loss and no prediction."""
    model, batch = build("llama", torch.float32).eval(), packed_rows("right")
    del batch["thought_ids"]
    with torch.no_grad():
        before = model(**batch)
        batch["input_ids"][0, 3] = (batch["input_ids"][0, 3] + 5) % 80 + 3  # of the first document
        after = model(**batch)
    assert torch.equal(before.thought_ids[0, :, 9:], after.thought_ids[0, :, 9:])
    assert torch.equal(before.thought_ids[1:], after.thought_ids[1:])
    later = slice(9, None)
    assert torch.allclose(before.base_losses[0, later], after.base_losses[0, later], atol=1e-5)
    assert torch.allclose(
        before.talk_losses[:, 0, :, later], after.talk_losses[:, 0, :, later], atol=1e-5
    )
    assert not torch.allclose(before.base_losses[0, 3:8], after.base_losses[0, 3:8], atol=1e-3)
