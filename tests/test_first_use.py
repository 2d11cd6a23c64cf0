"""What a model looks at when it is used: tokens, devices, the decoder's class, a generation's state."""

from __future__ import annotations

import pytest
import torch
from families import tiny_decoder
from torch.distributed.utils import _apply_to_tensors
from transformers import LlamaForCausalLM

from quietstar import QuietStarForCausalLM
from quietstar.generation import Thinking
from quietstar.head import CalledHead, output_head
from quietstar.parts import BatchPart


def thinking_model(family: str = "llama", **fields) -> QuietStarForCausalLM:
    settings = {"thought_length": 2, "talk_length": 1, **fields}
    return QuietStarForCausalLM.from_base(
        tiny_decoder(family), start_token_id=94, end_token_id=95, **settings
    )


@pytest.mark.parametrize("token", [96, -1])
def test_a_token_without_an_embedding(token: int):
    ids = torch.full((1, 6), 7)
    ids[0, 3] = token
    with pytest.raises(ValueError, match=f"input_ids contains {token}; expected values from 0 to 95"):
        thinking_model()(ids)


def test_tokens_on_another_device():
    with pytest.raises(ValueError, match="input_ids is on meta; expected cpu like the model"):
        thinking_model()(torch.full((1, 6), 7, device="meta"))


def test_a_decoder_whose_class_would_not_be_opened_again():
    class Louder(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(ValueError, match="Louder could not be opened again after saving"):
        QuietStarForCausalLM.from_base(
            Louder(tiny_decoder("llama").config), start_token_id=94, end_token_id=95
        )


def test_the_state_of_a_generation_passes_through_a_cast_of_inputs():
    """FSDP2 casts a forward's arguments, and builds dataclasses anew."""
    state = Thinking("every:2", 3)
    assert _apply_to_tensors(lambda tensor: tensor.half(), {"thinking": state})["thinking"] is state


def test_a_refused_call_leaves_its_state_unused():
    model, ids = thinking_model().eval(), torch.full((1, 4), 7)
    state = Thinking()
    with pytest.raises(ValueError, match="num_beam_groups|constraints|penalty_alpha|dola|prompt_lookup"):
        model.generate(ids, thinking=state, max_new_tokens=2, prompt_lookup_num_tokens=2)
    model.generate(ids, thinking=state, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert len(state.thoughts) == 2


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_part_without_a_target_has_every_gradient(family: str):
    """Other processes wait for them: zeros, not nothing, also where the output layer is called."""
    model = thinking_model(family).train()
    assert isinstance(output_head(model.base), CalledHead) == (family == "phi")
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    model(ids, labels=labels, batch_part=BatchPart(0, 2, seed=1)).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
