"""The configurations of real models: their sizes, and the plan or a sentence that says why not."""

from pathlib import Path

import pytest
from real_data import real_data
from small_recipes import rejected

from quietstar.cli import app as cli
from quietstar.plan.table import recipe_sizes
from quietstar.recipes.recipe import Recipe, load_recipe

# Parameters of the decoder, as published.
PLANNED = {
    "Llama-3.2-1B": 1_235_814_400,
    "Meta-Llama-3.1-8B": 8_030_261_248,
    "Mistral-7B-v0.1": 7_241_732_096,
    "OLMo-2-0425-1B": 1_484_916_736,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-8B": 8_190_735_360,
    "SmolLM2-135M": 134_515_008,
    "TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "gemma-2-9b-it": 9_241_705_984,
}
REFUSED = {
    "DeepSeek-V3": "model type 'deepseek_v3' has other layers (experts, latent attention",
    "MiMo-7B-Base": "MiMo-7B-Base is of model type 'mimo', which the installed transformers (",
    "Mixtral-8x7B-v0.1": "model type 'mixtral' has other layers (experts",
    "Qwen3-30B-A3B": "model type 'qwen3_moe' has other layers (experts",
    "gemma-4-26B-A4B": "model type 'gemma4_text' has layers of several sizes; the plan counts",
    "gpt-oss-20b": "model type 'gpt_oss' has other layers (experts",
    "gpt2": "model type 'gpt2' has no intermediate_size; the plan counts",
    "phi-2": "model type 'phi' has other layers (experts, latent attention, an MLP without a gate)",
    "pythia-410m-shape": "model type 'gpt_neox' has other layers",
}


def words(name: str) -> list[str]:
    folder = real_data("hf_configs") / name
    return ["tiny", f"model.name={folder}", "model.config=null", "model.tokenizer=null"]


def recipe(name: str) -> Recipe:
    first, *rest = words(name)
    return load_recipe(first, rest)


def test_every_one_is_listed():
    there = {path.parent.name for path in Path(real_data("hf_configs")).glob("*/config.json")}
    assert there == {*PLANNED, *REFUSED}


@pytest.mark.parametrize("name", PLANNED)
def test_it_is_planned(name: str, capsys):
    _, sizes = recipe_sizes(recipe(name))
    assert sizes.body + sizes.embeddings == PLANNED[name]
    assert sizes.linear == sizes.counted
    assert cli.main(["plan", *words(name), "--gpu-memory", "80G"]) == 0
    shown = capsys.readouterr().out
    assert f"{sizes.all / 1e6:.1f} M parameters" in shown and "as the recipe says" in shown


@pytest.mark.parametrize("name", REFUSED)
def test_a_sentence_says_why_not(name: str, capsys):
    rejected(capsys, ["plan", *words(name)], REFUSED[name])


def test_a_model_that_is_not_known_is_named_everywhere(capsys, tmp_path):
    message = REFUSED["MiMo-7B-Base"]
    name = real_data("hf_configs") / "MiMo-7B-Base"
    for tokenizer in ("null", "stdlib"):
        given = [*words("MiMo-7B-Base")[:3], f"model.tokenizer={tokenizer}"]
        output = ["--output", tmp_path / "run", "--quiet"]
        rejected(capsys, ["train", *given, *output], message)
    (tmp_path / "text.txt").write_text("some text\n")
    data = ["--tasks", "perplexity", "--data", tmp_path / "text.txt"]
    rejected(capsys, ["eval", name, *data], message)
    rejected(capsys, ["generate", name, "text"], message)
