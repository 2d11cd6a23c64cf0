"""Noise: a thought is scored by the network that sampled it, whatever draws while training."""

import logging
from typing import Any

import pytest
import torch
from families import FAMILIES, thinking_model, tiny_decoder
from small_training import rows, trainer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quietstar import QuietStarConfig, QuietStarForCausalLM

LENGTH, THOUGHT = 12, 2
LOUD_GPT2 = {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.3}
OTHERS: dict[str, dict[str, Any]] = {
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 96,
        "max_position_embeddings": 128,
        "attention_dropout": 0.3,
        "layerdrop": 0.5,
    },
    "mixtral": {**FAMILIES["llama"], **EXPERTS},
    "phimoe": {**FAMILIES["llama"], **EXPERTS, "sliding_window": None},
}


def decoder(family: str) -> PreTrainedModel:
    if family in FAMILIES:
        loud = LOUD_GPT2 if family == "gpt2" else {"attention_dropout": 0.3}
        return tiny_decoder(family, **loud)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **OTHERS[family]))


def thinking(base: PreTrainedModel, **fields: Any) -> QuietStarForCausalLM:
    return thinking_model(base, **{"thought_length": THOUGHT, "talk_length": 2, **fields})


def scored(model: nn.Module) -> torch.Tensor:
    """The losses of one text with given thoughts."""
    ids = torch.arange(3, 3 + LENGTH)[None]
    thoughts = torch.full((1, 2, LENGTH, THOUGHT), 7)
    out = model(input_ids=ids, labels=ids, thought_ids=thoughts)
    return torch.cat([out.base_losses.flatten(), out.talk_losses.flatten()]).detach()


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "mixtral", "phimoe"])
def test_two_scorings_of_a_thought_agree(family: str):
    """In training mode, and with the passes of evaluation mode, which have no noise."""
    model = thinking(decoder(family))
    want = scored(model.eval())
    for _ in range(2):
        assert torch.equal(scored(model.train()), want)
    assert torch.equal(scored(model.eval()), want)
    assert model.train().base.config.to_dict() == decoder(family).config.to_dict()


def test_one_warning_counts_it(caplog):
    model = thinking(decoder("gpt2"))
    with caplog.at_level(logging.WARNING, "quietstar"):
        scored(model.eval())
        assert not caplog.records
        for _ in range(2):
            scored(model.eval())
            scored(model.train())
    (warning,) = [r.getMessage() for r in caplog.records]
    # Embeddings, and in each of two layers attention, its output and the other half's output.
    assert "switched off in 7 places" in warning and "7 x Dropout.p = 0.3" in warning


def test_a_jittering_router_is_counted_once(caplog):
    model = thinking(decoder("mixtral"))
    with caplog.at_level(logging.WARNING, "quietstar"):
        for _ in range(2):
            scored(model.train())
    assert [
        r.getMessage().count("2 x MixtralSparseMoeBlock.jitter_noise = 0.3") for r in caplog.records
    ] == [1]
    assert model.base.training and model.base.lm_head.training


@pytest.mark.parametrize("kind", ["lora", "loha", "oft"])
def test_dropout_that_an_adapter_brings(kind: str, caplog):
    peft = pytest.importorskip("peft")
    configs = {
        "lora": lambda: peft.LoraConfig(
            r=2,
            lora_dropout=0.4,
            init_lora_weights=False,
            target_modules=["q_proj", "fc1"],
            modules_to_save=["thought_embedding"],
        ),
        "loha": lambda: peft.LoHaConfig(
            r=2, rank_dropout=0.4, module_dropout=0.4, init_weights=False, target_modules=["q_proj"]
        ),
        "oft": lambda: peft.OFTConfig(
            oft_block_size=8, module_dropout=0.4, init_weights=False, target_modules=["q_proj"]
        ),
    }
    model = thinking(tiny_decoder("llama"))
    plain = scored(model.train())
    wrapped = peft.get_peft_model(model, configs[kind]())
    with caplog.at_level(logging.WARNING, "quietstar"):
        first = scored(wrapped.train())
        assert torch.equal(scored(wrapped), first)
    assert len(caplog.records) == 1 and not torch.equal(first, plain)
    # A second adapter, whose dropout comes while training is under way.
    wrapped.add_adapter("second", configs[kind]())
    wrapped.set_adapter("second")
    assert torch.equal(scored(wrapped.train()), scored(wrapped))


def test_noise_that_is_kept_is_refused_with_thoughts():
    for family, source in (("gpt2", "7 x Dropout.p = 0.3"), ("mixtral", "jitter_noise = 0.3")):
        model = thinking(decoder(family), disable_dropout=False)
        want = scored(model.eval())
        with pytest.raises(ValueError, match=f"disable_dropout is False .*{source}.*expected True"):
            scored(model.train())
        assert torch.equal(scored(model.eval()), want)
    quiet = thinking(tiny_decoder("llama"), disable_dropout=False)
    assert torch.equal(scored(quiet.train()), scored(quiet))


def test_without_thoughts_a_decoder_may_keep_its_dropout():
    ids = torch.arange(3, 3 + LENGTH)[None]
    losses = {}
    for disable in (True, False):
        model = thinking(decoder("gpt2"), thought_kind="none", disable_dropout=disable).train()
        losses[disable] = [float(model(ids, labels=ids).loss.detach()) for _ in range(2)]
    assert losses[True][0] == losses[True][1]
    assert losses[False][0] != losses[False][1]


def test_noise_that_is_not_known_here_is_refused():
    model = thinking(tiny_decoder("llama"))
    layer = model.base.model.layers[0].mlp
    layer.register_forward_hook(lambda m, i, out: out + torch.randn_like(out) if m.training else None)
    want = scored(model.eval())
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"'llama' draws at random in training mode, in a way"):
        scored(model.train())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(scored(model.eval()), want)


def test_noise_on_the_embeddings_is_refused(tmp_path):
    model = thinking(tiny_decoder("llama"))
    with pytest.raises(ValueError, match=r"neftune_noise_alpha is 5.0; expected none with thoughts"):
        trainer(tmp_path, model, rows(4), neftune_noise_alpha=5.0)
    # As another trainer puts it there.
    model.get_input_embeddings().neftune_noise_alpha = 4.0
    scored(model.eval())
    with pytest.raises(ValueError, match=r"neftune_noise_alpha is 4.0"):
        scored(model.train())


def test_the_field_is_saved(tmp_path):
    QuietStarConfig(disable_dropout=False).save_pretrained(tmp_path)
    assert QuietStarConfig.from_pretrained(tmp_path).disable_dropout is False
    assert QuietStarConfig().disable_dropout is True
