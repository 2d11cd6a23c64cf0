"""What a model looks at when it is used: tokens, devices, the decoder's class, a generation's state."""

import pytest
import torch
from families import FAMILIES, thinking_model, tiny_decoder
from torch.distributed.utils import _apply_to_tensors
from transformers import LlamaConfig, LlamaForCausalLM

from quietstar import QuietStarForCausalLM
from quietstar.modeling.generation import Thinking
from quietstar.thinking.batch_share import BatchShard
from quietstar.thinking.output_layer import CalledOutputLayer, output_layer


def build(family: str = "llama", **fields) -> QuietStarForCausalLM:
    return thinking_model(family, **{"thought_length": 2, "talk_length": 1, **fields})


@pytest.mark.parametrize("token", [96, -1])
def test_a_token_without_an_embedding(token: int):
    ids = torch.full((1, 6), 7)
    ids[0, 3] = token
    with pytest.raises(ValueError, match=f"input_ids contains {token}; expected values from 0 to 95"):
        build()(ids)


def test_tokens_on_another_device():
    with pytest.raises(ValueError, match="input_ids is on meta; expected cpu like the model"):
        build()(torch.full((1, 6), 7, device="meta"))


def test_a_decoder_whose_class_would_not_be_opened_again():
    class Louder(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(ValueError, match="Louder could not be opened again after saving"):
        QuietStarForCausalLM.from_base(
            Louder(tiny_decoder("llama").config), start_token_id=94, end_token_id=95
        )


def test_a_decoder_that_with_a_configuration_of_its_own():
    class OwnConfig(LlamaConfig):
        model_type = "own"

    class OwnDecoder(LlamaForCausalLM):
        config_class = OwnConfig

    own = OwnDecoder(OwnConfig(**{**FAMILIES["llama"], "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="OwnDecoder could not be opened again.*OwnConfig"):
        QuietStarForCausalLM.from_base(own, start_token_id=94, end_token_id=95)


def test_the_state_of_a_generation_passes_through_a_cast_of_inputs():
    """FSDP2 casts a forward's arguments, and builds dataclasses anew."""
    state = Thinking("every:2", 3)
    assert _apply_to_tensors(lambda tensor: tensor.half(), {"thinking": state})["thinking"] is state


def test_a_refused_call_leaves_its_state_unused():
    model, ids = build().eval(), torch.full((1, 4), 7)
    state = Thinking()
    with pytest.raises(ValueError, match="num_beam_groups|constraints|penalty_alpha|dola|prompt_lookup"):
        model.generate(ids, thinking=state, max_new_tokens=2, prompt_lookup_num_tokens=2)
    model.generate(ids, thinking=state, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert len(state.thoughts) == 2


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_part_without_a_target_has_every_gradient(family: str):
    """Other processes wait for them: zeros, not nothing, also where the output layer is called."""
    model = build(family).train()
    assert isinstance(output_layer(model.base), CalledOutputLayer) == (family == "phi")
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    model(ids, labels=labels, batch_part=BatchShard(0, 2, seed=1)).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


class Around(torch.nn.Module):
    """A wrapper that is no linear layer, and may draw at random."""

    def __init__(self, inner: torch.nn.Module, probability: float = 0.0):
        super().__init__()
        self.inner, self.probability = inner, probability

    def forward(self, *args, **kwargs):
        return torch.nn.functional.dropout(
            self.inner(*args, **kwargs), self.probability, self.training and self.probability > 0
        )


@pytest.mark.parametrize("place", ["a layer", "the output layer", "the mixing head"])
@pytest.mark.parametrize("before", [0, 1])
def test_noise_is_looked_for_wherever_and_whenever_it_comes(place: str, before: int):
    model = build().train()
    ids = torch.randint(3, 90, (1, 8), generator=torch.Generator().manual_seed(2))
    for _ in range(before):
        model(ids, labels=ids)
    if place == "a layer":
        layer = model.base.model.layers[0]
        layer.mlp = Around(layer.mlp, 0.5)
    elif place == "the output layer":
        model.base.lm_head = Around(model.base.lm_head, 0.5)
    else:
        torch.nn.init.normal_(model.mixing_head.fc3.weight)
        model.mixing_head.fc2.register_forward_hook(
            lambda module, given, result: torch.nn.functional.dropout(result, 0.5, module.training)
        )
    with pytest.raises(ValueError, match="draws at random in training mode"):
        model(ids, labels=ids)


def test_a_wrapper_in_the_mixing_head_is_called():
    model, ids = build().eval(), torch.randint(3, 90, (1, 8))
    torch.nn.init.normal_(model.mixing_head.fc3.weight)
    want = model(ids).logits
    model.mixing_head.fc1 = Around(model.mixing_head.fc1)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)


def test_a_cache_of_the_whole_prompt_is_refused():
    model, ids = build().eval(), torch.randint(3, 90, (1, 6))
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 6 tokens and the prompt has 6"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clamp_advantage": "false"}, "clamp_advantage is 'false'; expected True or False"),
        ({"disable_dropout": 0}, "disable_dropout is 0; expected True or False"),
        ({"entropy_bonus": float("inf")}, "entropy_bonus is inf; expected a number >= 0"),
        ({"start_token_id": True}, "start_token_id is True; expected the number of a token"),
        ({"start_token_id": "94"}, "start_token_id is '94'; expected the number of a token"),
        ({"start_token_id": 95}, "start_token_id and end_token_id are both 95"),
        ({"text_config": {"hidden_size": 8}}, "text_config has no model_type"),
    ],
)
def test_fields_that_cannot_be_meant(fields: dict, message: str):
    from quietstar import QuietStarConfig

    settings = {"text_config": tiny_decoder("llama").config, "start_token_id": 94, "end_token_id": 95}
    with pytest.raises(ValueError, match=message):
        QuietStarForCausalLM(QuietStarConfig(**{**settings, **fields}))


def test_a_name_is_no_tokenizer():
    with pytest.raises(TypeError, match="tokenizer is 'gpt2'; expected a tokenizer"):
        QuietStarForCausalLM.from_base(tiny_decoder("llama"), "gpt2")
