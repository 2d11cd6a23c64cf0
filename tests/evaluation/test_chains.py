"""Chains of thought with a majority vote, and perplexity with its controls."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from quietstar import QuietStarForCausalLM
from quietstar.errors import UserError
from quietstar.evaluation import chains, controls
from quietstar.evaluation.perplexity import token_losses


@pytest.mark.parametrize(
    "text, number", [(" 18.", 18), (" $1,234 a day", 1234), (" -3", -3), (" 2.50", 2.5), (" none", None)]
)
def test_numbers(text: str, number: float | None):
    assert chains.find_number(text) == number


def test_votes():
    assert chains.majority([3.0, None, 4.0, 4.0, None, None]) == 4.0
    assert chains.majority([3.0, 4.0]) == 3.0
    assert chains.majority([None]) is None
    assert chains.cut_chain(" It is 4.\n\nQ: What else?") == " It is 4."
    with pytest.raises(UserError, match="votes is 4 at temperature 0"):
        chains.ChainSettings(votes=4, temperature=0.0)


class Oracle:
    """Generates given texts, one per row, and remembers what it was asked."""

    device = torch.device("cpu")
    config = SimpleNamespace(model_type="llama")

    def __init__(self, tokenizer: PreTrainedTokenizerFast, answers: list[list[str]]):
        self.tokenizer, self.answers, self.asked = tokenizer, list(answers), []

    def generate(self, ids, attention_mask, **options):
        rows = [row[mask == 1] for row, mask in zip(ids, attention_mask, strict=True)]
        self.asked.append(self.tokenizer.batch_decode(rows))
        new = [self.tokenizer(text)["input_ids"] for text in self.answers.pop(0)]
        pad = options["pad_token_id"]
        width = max(map(len, new))
        new = torch.tensor([row + [pad] * (width - len(row)) for row in new])
        return torch.cat([ids, new], dim=1)


def test_the_majority_of_chains(merging: PreTrainedTokenizerFast):
    oracle = Oracle(merging, [[" a", " b\nQ: x", " c"], [" 5", " 18.", " 18"]])
    settings = chains.ChainSettings(votes=3)
    record = chains.vote(oracle, merging, "1?", 18.0, settings, seed=0)
    assert record["numbers"] == [5.0, 18.0, 18.0]
    assert record["correct"] and record["answer"] == 18.0
    assert record["share"] == pytest.approx(2 / 3)
    assert oracle.asked[0] == ["Q: 1?\nA: Let's think step by step."] * 3
    assert oracle.asked[1][1] == (
        "Q: 1?\nA: Let's think step by step. b\nTherefore, the answer (arabic numerals) is"
    )


@pytest.mark.parametrize("thinking", ["always", "never"])
def test_chains_of_a_model(model: QuietStarForCausalLM, merging: PreTrainedTokenizerFast, thinking: str):
    """The same item gives the same chains, and torch's generator is left alone."""
    settings = chains.ChainSettings(votes=2, max_new_tokens=4, thinking=thinking)
    state = torch.get_rng_state()
    first = chains.vote(model, merging, "1 2?", 3.0, settings, seed=7)
    assert torch.equal(state, torch.get_rng_state())
    assert bool(model.thoughts) == (thinking == "always")
    assert chains.vote(model, merging, "1 2?", 3.0, settings, seed=7) == first
    assert chains.vote(model, merging, "1 2?", 3.0, settings, seed=8) != first


def test_blocks_of_text():
    assert controls.cut([[1, 2, 3], [4, 5, 6, 7]], 3) == [[1, 2, 3], [4, 5, 6]]
    assert controls.cut([[1, 2, 3], [4, 5]], 3) == [[1, 2, 3], [4, 5]]
    assert controls.cut([[1, 2, 3], [4, 5]], 2, limit=1) == [[1, 2]]
    for count in (2, 3, 10):
        places = controls.moved(count, seed=1)
        assert sorted(places) == list(range(count))
        assert all(place != there for place, there in enumerate(places))


def test_controls_of_a_model(model: QuietStarForCausalLM):
    torch.manual_seed(2)
    blocks = [torch.randint(5, 200, (n,)).tolist() for n in (24, 9, 17)]
    records = controls.block_losses(model, blocks)
    assert model.config.thought_kind == "sampled"
    rows = [
        {"input_ids": torch.tensor(b), "attention_mask": torch.ones(len(b)), "labels": torch.tensor(b)}
        for b in blocks
    ]
    known = token_losses(model, rows, progress=False)
    for row, (block, record) in enumerate(zip(blocks, records, strict=True)):
        n = len(block) - 1
        assert list(record) == list(controls.PREDICTIONS)
        torch.testing.assert_close(record["base"], known.base[row, :n].tolist(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(record["mixed"], known.mixed[row, :n].tolist(), rtol=1e-4, atol=1e-5)
        alone = controls.block_losses(model, [block])[0]
        for name in controls.PREDICTIONS:
            torch.testing.assert_close(record[name], alone[name], rtol=1e-4, atol=1e-5)
            assert name == "base" or record[name] != record["base"]
    summary = controls.summarize_controls(records)
    assert summary["tokens"] == 23 + 8 + 16
    every = [value for record in records for value in record["mixed"]]
    assert summary["nll"]["mixed"]["mean"] == pytest.approx(np.mean(every))
    shares = [d["base"]["mean"] for d in summary["nll_by_decile"]]
    assert shares == sorted(shares)


def test_controls_are_what_they_say(model: QuietStarForCausalLM, monkeypatch):
    """Each control against the model itself, brought to the same by its public arguments."""
    torch.manual_seed(3)
    ids = torch.randint(5, 200, (1, 20))
    (record,) = controls.block_losses(model, ids.tolist())

    def losses(**arguments: torch.Tensor) -> list[float]:
        with torch.no_grad():
            return model(ids, labels=ids, **arguments).talk_losses[0, 0, 0, :-1].tolist()

    def close(name: str, expected: list[float]) -> None:
        torch.testing.assert_close(record[name], expected, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        own = model(ids).thought_ids
    partner = [*controls.moved(19, seed=int(ids.sum())), 19]
    assert not torch.equal(own, own[:, :, partner])
    close("mixed", losses(thought_ids=own))
    close("shuffled", losses(thought_ids=own[:, :, partner]))
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "thought_kind", "pause")
        close("pause", losses())
    with monkeypatch.context() as patch:
        # A mixing weight of one is the thought's prediction alone.
        alone = lambda base, thought, *rest: (thought, torch.ones(len(thought), 1))  # noqa: E731
        patch.setattr(model.mixing_head, "forward", alone)
        close("thought", losses())


@pytest.mark.parametrize("kind, names", [("none", ["base"]), ("pause", ["base", "mixed", "thought"])])
def test_controls_of_a_model_that_samples_nothing(
    model: QuietStarForCausalLM, kind: str, names: list[str]
):
    model.config.thought_kind = kind
    try:
        (record,) = controls.block_losses(model, [[5, 6, 7, 8, 9]])
        assert list(record) == names
        assert all(math.isfinite(value) for losses in record.values() for value in losses)
        controls.summarize_controls([record])
        assert model.config.thought_kind == kind
    finally:
        model.config.thought_kind = "sampled"
