"""Recipes for decoders some of whose layers hand states on: read, planned, and given adapters."""

import pytest
import torch
from families import HYBRIDS, VOCABULARY, thinking_model
from transformers import AutoConfig, AutoModelForCausalLM

from quietstar.checkpoints.adapters import add_adapters
from quietstar.cli import app as cli
from quietstar.plan.costs import step_of
from quietstar.plan.table import recipe_sizes
from quietstar.recipes.recipe import load_recipe
from quietstar.thinking.recurrent.mixers import layers_of_both_kinds, mixer_of
from quietstar.thinking.supported import check_supported
from quietstar.thinking.text_part import decoder_layers

ATTENDING = (2, 5, 8, 10, 12, 14)
LFM2_350M = {
    **{"vocab_size": 65536, "hidden_size": 1024, "intermediate_size": 6656, "num_hidden_layers": 16},
    **{"num_attention_heads": 16, "num_key_value_heads": 8, "conv_L_cache": 3},
    "layer_types": ["full_attention" if i in ATTENDING else "conv" for i in range(16)],
}
QWEN3_5_800M = {
    **{"vocab_size": 248320, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "tie_word_embeddings": True},
    **{"linear_num_key_heads": 16, "linear_num_value_heads": 16},
    **{"linear_key_head_dim": 128, "linear_value_head_dim": 128},
}
# Recipe, configuration as on the hub (composite: the text's part), layers that attend, parameters in M.
RECIPES = {
    "lfm2-350m": ("lfm2", LFM2_350M, 6, (350, 360)),
    "qwen3.5-0.8b": ("qwen3_5", {"text_config": QWEN3_5_800M}, 6, (740, 880)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_and_planned(name: str, tmp_path, capsys):
    family, fields, attending, millions = RECIPES[name]
    AutoConfig.for_model(family, **fields).save_pretrained(tmp_path)
    words = [f"model.name={tmp_path}"]
    recipe = load_recipe(name, words)
    config, sizes = recipe_sizes(recipe)
    assert sizes.hybrid is not None and not sizes.experts
    assert sizes.attending == attending
    assert millions[0] < sizes.all / 1e6 < millions[1]
    step = step_of(recipe)
    assert (step.precision, step.checkpointing, step.length) == ("autocast", True, 256)
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(config.text_config)
    check_supported(decoder)
    attends, hands_on = layers_of_both_kinds(decoder)
    assert len(attends) == attending and len(hands_on) == sizes.layers - attending
    assert cli.main(["plan", name, *words, "--gpu-memory", "80G"]) == 0
    shown = capsys.readouterr().out
    assert f"{sizes.all / 1e6:.1f} M parameters" in shown and "as the recipe says" in shown


@pytest.mark.parametrize("family", HYBRIDS)
def test_adapters_reach_the_layers_that_do_not_attend(family: str):
    """All linear layers of a mixer, and the gradient comes through the columns' states."""
    pytest.importorskip("peft")
    plain = thinking_model(family, seed=4, mixing=0.3, thought_length=3, talk_length=2)
    mixers = [mixer_of(layer) for layer in decoder_layers(plain.base)]
    wanted = {
        id(module): name
        for mixer in mixers
        if mixer is not None
        for name, module in mixer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    model = add_adapters(plain, "nowhere", rank=2, alpha=4).train()
    found = {
        id(module.base_layer): module
        for module in model.modules()
        if hasattr(module, "lora_B") and hasattr(module, "base_layer")
    }
    assert len(set(wanted.values())) > 1 and set(wanted) <= set(found)
    ids = torch.randint(3, VOCABULARY - 2, (2, 12))
    model(ids, labels=ids).loss.backward()
    for layer, name in wanted.items():
        assert found[layer].lora_B["default"].weight.grad.abs().max() > 0, name
