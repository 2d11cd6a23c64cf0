"""Thinking at fewer positions costs less in proportion: counted operations, not seconds."""

import pytest
import seeds
import torch
from families import thinking_model, tiny_decoder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from quietstar_ext import use_impl

LENGTH = 64


class Operations(TorchDispatchMode):
    """Adds up the operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.fixture(scope="module")
def cost():
    """Operations of a training step by its settings."""
    # Every thought's policy term is computed: with the clamp the rows that are left out vary.
    decoder = tiny_decoder("llama", vocab_size=512)
    fields = {"start_token_id": 510, "end_token_id": 511, "thought_length": 4, "talk_length": 2}
    model = thinking_model(decoder, mixing=0.3, clamp_advantage=False, **fields).train()
    seeds.reseed()
    ids = torch.randint(3, 500, (2, LENGTH))
    model(ids, labels=ids)  # the output layer is checked at the first call

    def count(**fields) -> int:
        for name, value in fields.items():
            setattr(model.config, name, value)
        with use_impl("reference"), Operations() as operations:
            output = model(ids, labels=ids, completion_anchors=torch.tensor([[20], [9]]))
            output.loss.backward()
        count.share = output.anchors.shape[1] / LENGTH if model.config.thinks else 0
        return operations.total

    return count


@pytest.mark.parametrize(
    ("rule", "share"),
    [
        *(("stride:2", 1 / 2), ("stride:8", 1 / 8), ("random:0.25", 1 / 4), ("entropy:0.125", 1 / 8)),
        *(("completion", 1 / 64), ("loss:6.2:8", None)),
    ],
)
def test_cost_falls_in_proportion(cost, rule: str, share: float | None):
    text = cost(thought_kind="none")
    everywhere = cost(thought_kind="sampled", think_at="all")
    found = cost(think_at=rule)
    if share is None:  # that of the row with the most such positions
        share = cost.share
        assert 0.2 < share < 0.8
    assert cost.share == share
    assert text < 0.15 * everywhere
    # The text goes through the decoder twice (rollout and packed pass), whoever thinks; the entropy rule
    # looks at its predictions once more.
    expected = text + share * (everywhere - text)
    assert expected <= found < expected + text
    assert found < (share + 0.15) * everywhere
