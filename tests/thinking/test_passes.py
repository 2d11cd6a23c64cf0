"""How many passes through the decoder a thought costs: slots whose tokens are known share one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from families import thinking_model
from passes import counted

from quietstar import QuietStarForCausalLM
from quietstar.thinking.slots import SlotRun

T, K = 3, 4
PASSES = SlotRun.passes


def build(family: str = "llama", **fields) -> QuietStarForCausalLM:
    meta = {"start_token_id": 39, "end_token_id": 40}
    fields = {
        **meta,
        "thought_length": T,
        "talk_length": K,
        "mixing": 0.3,
        "embeddings": 0.003,
        **fields,
    }
    model = thinking_model(family, **fields).eval()
    model(torch.randint(3, 38, (1, 4)))  # the checks before the first pass
    return model


def test_a_rollout():
    """At most two slots together, so that memory stays that of two; none more where it only samples."""
    model = build()
    ids = torch.randint(3, 38, (2, 6))
    with torch.no_grad(), counted(model) as passes:
        model(ids)
    assert passes == [6] + [6] * T + [12]
    with torch.no_grad(), counted(model) as passes:
        model(ids, labels=ids)
    assert passes == [6] + [6] * T + [12, 12, 6]
    with counted(model) as passes:
        model(ids, labels=ids)
    assert passes == [6] + [6] * T + [6 + 6 * (T + 1 + K)]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("kind", ["sampled", "pause"])
def test_together_they_are_what_they_are_singly(monkeypatch, family: str, kind: str):
    """Padding and windows of 7, and sampled thoughts from the same seed."""
    model = build(family, thought_kind=kind)
    ids = torch.randint(3, 38, (2, 11))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found = []
    for together in (1, 2, 99):
        monkeypatch.setattr(SlotRun, "passes", passes_of(together))
        torch.manual_seed(7)
        with torch.no_grad():
            found.append(model(ids, attention_mask=mask, labels=ids, thought_temperature=1.0))
    for made in found[1:]:
        for name in ("thought_ids", "thought_logprobs"):
            assert same(getattr(made, name), getattr(found[0], name))
        torch.testing.assert_close(made.talk_losses, found[0].talk_losses, rtol=1e-5, atol=1e-5)


def passes_of(together: int):
    def of(run: SlotRun, drawn: int) -> Iterator[tuple[int, int]]:
        run.together = together
        return PASSES(run, drawn)

    return of


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)
