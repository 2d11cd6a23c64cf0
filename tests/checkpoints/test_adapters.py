"""Adapters: trained by a recipe, saved, resumed, opened again, merged; the recipe for a small GPU."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import thinking_model, tiny_decoder
from safetensors.torch import load_file, save_file
from small_recipes import content, from_files
from small_training import Interrupt
from transformers import AutoModelForCausalLM, TrainerCallback

from quietstar import QuietStarForCausalLM, add_meta_tokens
from quietstar.checkpoints.adapters import add_adapters, grow_embeddings, quantization, target_pattern
from quietstar.checkpoints.load import load_checkpoint
from quietstar.cli import app as cli
from quietstar.data.lookup import build_tokenizer
from quietstar.data.stdlib import train_tokenizer
from quietstar.errors import UserError
from quietstar.modeling.loading import keep_4bit_differentiable
from quietstar.recipes.build import build_model
from quietstar.recipes.recipe import AdapterSection, Recipe, load_recipe, parse_recipe
from quietstar.recipes.run import run_recipe

pytest.importorskip("peft")
TEXT = "The quick brown fox jumps over the lazy dog, and the dog lets it. "


@pytest.fixture
def decoder_folder(tmp_path) -> Path:
    """A decoder and a tokenizer that lack the two meta tokens."""
    tokenizer = train_tokenizer([TEXT], 300)
    folder = tmp_path / "decoder"
    # In 4 bits, 64 numbers share a scale.
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    tiny_decoder("llama", vocab_size=len(tokenizer), **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text(TEXT * 40)
    return folder


def recipe(decoder: Path, **sections: dict[str, Any]) -> Recipe:
    changes: dict[str, Any] = {
        "model": {"config": None, "tokenizer": None, "name": str(decoder)},
        "data": from_files(decoder.parent / "text.txt"),
        "thoughts": {"talk_length": 2},
        "training": {"learning_rate": 1e-2},
        "adapter": {"rank": 2, "alpha": 4},
    }
    return parse_recipe(content(**{n: {**v, **sections.get(n, {})} for n, v in changes.items()}))


class Keep(TrainerCallback):
    """Keeps the model that a run has trained."""

    model: Any = None

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
        self.model = model


def logits(model: Any) -> torch.Tensor:
    model.eval()
    ids = torch.arange(3, 15)[None]
    thoughts = torch.full((1, 1, 12, 2), 7)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, thought_ids=thoughts).logits
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trained_saved_opened_and_merged(decoder_folder: Path, tmp_path, dtype: str):
    here = recipe(decoder_folder, model={"dtype": dtype}, training={"bf16": dtype == "bfloat16"})
    keep = Keep()
    result = run_recipe(here, tmp_path / "run", progress=False, callbacks=[keep])
    trained = {n for n, p in keep.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in keep.model.parameters() if p.requires_grad} == {torch.float32}
    assert all("lora_" in n or "modules_to_save" in n for n in trained)
    assert not any("lm_head" in n or "embed_tokens" in n for n in trained)
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "tokenizer.json"} <= files
    assert "model.safetensors" not in files and result.metrics["steps"] == 4

    model, tokenizer = load_checkpoint(str(tmp_path / "run"))
    assert isinstance(model, QuietStarForCausalLM) and len(tokenizer) > 0
    scale = float(logits(keep.model).abs().max())
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    assert (logits(model) - logits(keep.model)).abs().max() < tolerance * scale

    assert cli.main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    merged = QuietStarForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(model))
    words = train_tokenizer([TEXT], 300)
    add_meta_tokens(words)
    assert len(words) == len(tokenizer) == merged.config.text_config.vocab_size
    untrained = QuietStarForCausalLM.from_base(str(decoder_folder), words, thought_length=2)
    assert (logits(untrained) - logits(merged)).abs().max() > 0.05 * scale
    assert cli.main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 2


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(decoder_folder: Path, tmp_path):
    here = recipe(decoder_folder)
    run_recipe(here, tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(here, tmp_path / "parts", progress=False, callbacks=[Interrupt(3)])
    run_recipe(here, tmp_path / "parts", progress=False)
    whole, parts = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_an_adapter_that_is_not_whole(decoder_folder: Path, tmp_path):
    """Neither a random mixing head nor half a file."""
    run_recipe(recipe(decoder_folder, training={"max_steps": 2}), tmp_path / "run", progress=False)
    path = tmp_path / "run" / "adapter_model.safetensors"
    whole = path.read_bytes()
    weights = load_file(path)
    for part in ("mixing_head", "lora_B"):
        save_file({n: t for n, t in weights.items() if part not in n}, path)
        with pytest.raises(UserError, match=rf"adapter_model.safetensors lacks '.*{part}.*whole one"):
            load_checkpoint(str(tmp_path / "run"))
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"cannot load the adapter .*run: .*"):
        load_checkpoint(str(tmp_path / "run"))
    path.write_bytes(whole)
    load_checkpoint(str(tmp_path / "run"))


def test_new_rows_are_the_same_at_every_loading():
    tokenizer = build_tokenizer()
    rows = []
    for seed in (1, 2):
        decoder = tiny_decoder("llama", vocab_size=len(tokenizer) - 2)
        torch.manual_seed(seed)
        grow_embeddings(decoder, tokenizer)
        rows.append(decoder.lm_head.weight.detach()[-2:].clone())
    assert torch.equal(*rows)
    assert torch.allclose(rows[0][0], decoder.lm_head.weight[:-2].mean(0), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_what_is_adapted(family: str):
    model = thinking_model(family)
    wrapped = add_adapters(model, "nowhere", rank=2, alpha=32)
    adapted = {n.partition(".lora_A")[0] for n, _ in wrapped.named_parameters() if ".lora_A" in n}
    inner = [n.removeprefix("base_model.model.") for n in adapted]
    assert len(inner) >= 2 * 4 and all(n.startswith("base.") for n in inner)
    assert not any(part in n for n in inner for part in ("lm_head", "embed_out", "mixing_head"))
    with pytest.raises(UserError, match="adapter.targets names 'q'; expected linear layers"):
        target_pattern(thinking_model(family), ["q"])


def test_a_decoder_in_4_bits(decoder_folder: Path, tmp_path):
    """QLoRA: trained, then opened and merged on the rounded weights that it was fitted to."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    keep = Keep()
    here = recipe(
        decoder_folder,
        model={"dtype": "bfloat16"},
        adapter={"quantize": "4bit"},
        # Evaluated between two steps: bitsandbytes must not repack the weights there.
        data={"eval_files": [str(tmp_path / "text.txt")], "eval_blocks": 2},
        training={"bf16": True, "eval_strategy": "steps", "eval_steps": 1},
    )
    run_recipe(here, tmp_path / "run", progress=False, callbacks=[keep])
    trained = keep.model
    in_4_bits = {n for n, m in trained.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(in_4_bits) == 2 * 7 and all(".layers." in n for n in in_4_bits)

    model, _ = load_checkpoint(str(tmp_path / "run"))
    assert not any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in model.modules())
    scale = float(logits(trained).abs().max())
    assert (logits(model) - logits(trained)).abs().max() < 0.08 * scale

    assert cli.main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    merged = QuietStarForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(model))


def test_gradients_through_4_bits(decoder_folder: Path, monkeypatch):
    """After an evaluation pass, on a CPU that has bitsandbytes' kernel without gradients or one that
    claims to have it, they are those of the same weights in 16 bits."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    gradients = []
    for rounded in (True, False):
        options = {"dtype": torch.bfloat16, **quantization("4bit", str(decoder_folder))}
        decoder = AutoModelForCausalLM.from_pretrained(decoder_folder, **options)
        keep_4bit_differentiable(decoder)
        if not rounded:
            decoder = decoder.dequantize()
        embeds = torch.linspace(-1, 1, 12 * 64).view(1, 12, 64).bfloat16()
        with torch.no_grad():
            decoder.eval()(inputs_embeds=embeds)
        embeds.requires_grad_()
        decoder.train()(inputs_embeds=embeds).logits.float().square().mean().backward()
        gradients.append(embeds.grad.float())
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[1].norm()


def test_a_model_with_thoughts_in_4_bits(decoder_folder: Path, tmp_path):
    """Continued with adapters, its own layers stay as they are."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    words = train_tokenizer([TEXT], 300)
    QuietStarForCausalLM.from_base(str(decoder_folder), words).save_pretrained(tmp_path / "thinks")
    words.save_pretrained(tmp_path / "thinks")
    here = recipe(
        decoder_folder,
        model={"name": str(tmp_path / "thinks"), "dtype": "bfloat16"},
        adapter={"quantize": "4bit"},
        training={"bf16": True, "max_steps": 2},
    )
    model = build_model(here, words)
    assert isinstance(model, QuietStarForCausalLM)
    in_4_bits = {n for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(in_4_bits) == 2 * 7 and all(".layers." in n for n in in_4_bits)
    run_recipe(here, tmp_path / "run", progress=False)
    opened, _ = load_checkpoint(str(tmp_path / "run"))
    assert torch.isfinite(logits(opened)).all()


def test_refused_with_clear_words(decoder_folder: Path, monkeypatch):
    with pytest.raises(UserError, match="adapter.rank is 0; expected 1 or more"):
        recipe(decoder_folder, adapter={"rank": 0})
    with pytest.raises(UserError, match="section adapter has no rank"):
        recipe(decoder_folder, adapter={"rank": None, "quantize": "4bit"})
    with pytest.raises(UserError, match="expected a decoder by name"):
        recipe(
            decoder_folder,
            model={"name": None, "config": {"model_type": "llama"}, "tokenizer": "stdlib"},
        )
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"needs bitsandbytes: pip install 'quietstar\[qlora\]'"):
        run_recipe(recipe(decoder_folder, adapter={"quantize": "4bit"}), decoder_folder.parent / "x")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"adapters need peft.*pip install 'quietstar\[peft\]'"):
        run_recipe(recipe(decoder_folder), decoder_folder.parent / "x")


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_wrapped_by_peft_itself(task_type: str | None):
    """Its wrapper for causal language models hands down every argument that it knows, None or not."""
    from peft import LoraConfig, get_peft_model

    ids = torch.arange(3, 15)[None]
    model = thinking_model()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    before = model.eval().generate(ids, attention_mask=torch.ones_like(ids), **options)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type=task_type)
    wrapped = get_peft_model(model, config)
    made = wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(made, before)  # the updates begin at zero
    wrapped.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    updates = [p for n, p in wrapped.named_parameters() if "lora_B" in n]
    assert len(updates) == 4 and all(bool(p.grad.any()) for p in updates)


def test_embeddings_in_place_of_tokens_are_refused():
    """Given, or put before the text by prompt tuning."""
    from peft import PromptTuningConfig, get_peft_model

    ids = torch.arange(3, 15)[None]
    model = thinking_model()
    with pytest.raises(ValueError, match=r"inputs_embeds were given; expected input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"inputs_embeds were given.*prompt tuning"):
        prompted(input_ids=ids, labels=ids)


def test_the_recipe_for_a_small_gpu():
    small = load_recipe("mistral-7b-lora")
    assert small.adapter.rank and small.adapter.quantize == "4bit"
    assert small.training["activation_checkpointing"] and small.training["bf16"]
    plain = load_recipe("mistral-7b-paper")
    assert plain.adapter == AdapterSection()
    # Recipes without the section keep the fingerprints that their run folders have.
    assert plain.fingerprint() != plain.changed(adapter={"rank": 4}).fingerprint()
