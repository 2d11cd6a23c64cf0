"""What is fed into the slots of a packed pass: as slot by slot, by one look-up."""

import pytest
import torch
from sampled_steps import build

from quietstar.thinking.slots import SlotInputs


@pytest.mark.parametrize("rationales", [1, 2])
@pytest.mark.parametrize("kind", ["sampled", "pause"])
def test_packed(rationales: int, kind: str):
    model = build()
    config, embed = model.config, model.base.get_input_embeddings()
    ids = torch.randint(3, 36, (2, 9))
    # The last ones' talk slots lie behind the text.
    anchors = torch.tensor([[0, 4, 8], [2, 7, 8]]).repeat_interleave(rationales, dim=1)
    thoughts = None
    if kind == "sampled":
        thoughts = torch.randint(3, 36, (*anchors.shape, config.thought_length))
    start_end = model.thought_embedding(config.embedding_scale)
    inputs = SlotInputs(config, embed, start_end, ids, anchors, rationales)
    tables: list[torch.Tensor] = []
    for slots in range(1, config.num_slots + 1):
        singly = torch.cat(
            [embed(ids), *(inputs.embeds(slot, thoughts) for slot in range(slots))], dim=1
        )
        found = inputs.packed(slots, thoughts)
        assert torch.equal(found, singly)
        weight = torch.randn(found.shape)
        leaves = [embed.weight, *model.thought_embedding.parameters()]
        options = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
        made = [
            torch.autograd.grad((each * weight).sum(), leaves, **options) for each in (found, singly)
        ]
        torch.testing.assert_close(*made, rtol=1e-5, atol=1e-4)
        with embed.register_forward_hook(lambda *call: tables.append(call[2])):
            inputs.packed(slots, thoughts)
    assert len(tables) == config.num_slots


def test_a_16_bit_table_on_a_cpu_is_looked_up_slot_by_slot():
    """Its gradient adds occurrences up in 16 bits, of which a long sum loses more."""
    model = build().bfloat16()
    config, embed = model.config, model.base.get_input_embeddings()
    ids = torch.full((4, 100), 5)
    anchors = torch.arange(100).expand(4, -1)
    thoughts = torch.full((4, 100, config.thought_length), 5)
    start_end = model.thought_embedding(config.embedding_scale)
    inputs = SlotInputs(config, embed, start_end, ids, anchors, 1)
    (made,) = torch.autograd.grad(inputs.packed(config.num_slots, thoughts).sum(), [embed.weight])
    looked_up = 1 + config.thought_length + config.num_slots - config.thought_length - 2
    assert made[5].float().mean() == pytest.approx(400 * looked_up, rel=0.4)
    assert made[5].float().mean() > 256  # where a single sum of ones stops in bfloat16
