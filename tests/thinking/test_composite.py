"""Decoders that are the text's part of a model for several modalities, used for text alone."""

import copy

import pytest
import torch
from families import VOCABULARY, thinking_model, tiny_decoder, tiny_gemma3
from transformers import AutoConfig, AutoModelForCausalLM

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.checkpoints.adapters import target_pattern
from quietstar.plan.costs import decoder_sizes
from quietstar.thinking.text_part import decoder_layers, text_body, text_config_of

FIELDS = {"thought_length": 3, "talk_length": 2}
IDS = torch.randint(3, 89, (2, 14), generator=torch.Generator().manual_seed(1))


def build(**changes) -> QuietStarForCausalLM:
    return thinking_model(tiny_gemma3(**changes), **FIELDS).eval()


def test_the_text_is_that_of_the_same_decoder_alone():
    model = build()
    alone = tiny_decoder("gemma3_text")
    whole, text = model.base.state_dict(), alone.state_dict()
    text = {name: whole[name.replace("model.", "model.language_model.", 1)] for name in text} | {
        "lm_head.weight": whole["lm_head.weight"]
    }
    alone.load_state_dict(text)
    other = thinking_model(alone, **FIELDS).eval()
    other.thought_embedding.load_state_dict(model.thought_embedding.state_dict())
    other.mixing_head.load_state_dict(model.mixing_head.state_dict())
    thoughts = torch.randint(3, 89, (2, 1, 14, 3))
    ours, theirs = (m(IDS, labels=IDS, thought_ids=thoughts) for m in (model, other))
    assert torch.equal(ours.talk_losses, theirs.talk_losses)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), other.generate(IDS, **options))


def test_it_trains_where_text_reaches_and_opens_again(tmp_path):
    model = build().train()
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert parameter.requires_grad != ("vision" in name or "projector" in name), name
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(opened.base) is type(model.base)
    assert torch.equal(opened(IDS).logits, model.eval()(IDS).logits)
    assert text_config_of(opened.config).model_type == "gemma3_text"
    assert opened.config.get_text_config(decoder=True).num_hidden_layers == 2


@pytest.mark.parametrize("decoder", [tiny_gemma3, lambda: tiny_decoder("qwen3_5_text")])
def test_what_fsdp_is_to_keep_in_one_piece_is_there(decoder):
    """It looks for every class that is named, and a text's part has no layers for images."""
    model = thinking_model(decoder(), **FIELDS)
    classes = {type(module).__name__ for module in model.modules()}
    layer = type(decoder_layers(model.base)[0]).__name__
    assert layer in model._no_split_modules <= classes


def test_the_text_part_is_the_one_that_is_there_now():
    """A plain configuration is remembered as its own part; a composite one's part may be replaced."""
    whole = tiny_gemma3().config
    first = text_config_of(whole)
    assert first is whole.text_config is text_config_of(first)
    whole.text_config = copy.deepcopy(first)
    assert text_config_of(whole) is whole.text_config is not first
    assert text_config_of(copy.copy(first)) is not first
    alone = QuietStarConfig(start_token_id=3, end_token_id=4)
    assert text_config_of(alone) is alone
    alone.text_config = first
    assert text_config_of(alone) is first


def test_adapters_and_the_plan_see_the_text_alone():
    import re

    model = build()
    pattern = re.compile(target_pattern(model, None))
    found = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and pattern.fullmatch(n)
    ]
    assert len(found) == 14
    assert all("language_model.layers" in name for name in found)
    assert decoder_sizes(text_config_of(model.config)).layers == 2
    assert type(text_body(model.base)).__name__ == "Gemma3TextModel"


def test_a_soft_cap_that_only_the_text_model_applies_is_noticed():
    with pytest.raises(ValueError, match="'gemma3_text' computes its logits"):
        build(final_logit_softcapping=2.0)(IDS)


@pytest.mark.parametrize(
    ("kind", "allowed"), [("gemma4_text", None), ("gemma4_text", "vision"), ("gemma4_text", "all")]
)
def test_images_alone_may_be_seen_in_both_directions(kind: str, allowed: str | None):
    config = AutoConfig.for_model(
        kind,
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16},
        **{"layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0},
        **{"use_bidirectional_attention": allowed, "num_kv_shared_layers": 0},
    )
    decoder = AutoModelForCausalLM.from_config(config)
    if allowed == "all":
        with pytest.raises(ValueError, match="both directions"):
            thinking_model(decoder, **FIELDS)
    else:
        assert thinking_model(decoder, **FIELDS)(IDS, labels=IDS).loss.isfinite()
