"""Names of models: a GGUF file does everywhere what a folder does, and what is none is said."""

import os
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import TEXT, write_gguf
from small_recipes import content, from_files, rejected
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quietstar import QuietStarForCausalLM
from quietstar.checkpoints.load import load_checkpoint
from quietstar.cli import app as cli
from quietstar.errors import UserError
from quietstar.modeling.pretrained import is_gguf, load_config, load_decoder, load_tokenizer
from quietstar.recipes.recipe import parse_recipe
from quietstar.recipes.run import run_recipe

IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path)
    return path


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_the_model_in_the_file(file: Path, tmp_path):
    """Its weights are those that were written, and nothing of a quantizer is left."""
    expected, tokenizer = write_gguf(tmp_path / "again.gguf")
    model = load_decoder(file)
    assert model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    assert getattr(model, "hf_quantizer", None) is None
    assert getattr(model.config, "quantization_config", None) is None
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], weight, msg=name)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-5)
    assert load_config(file).hidden_size == 64
    ours = load_tokenizer(file)
    text = "the lazy dog jumps  over 51"
    assert ours(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (ours.eos_token, ours.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    assert ours.decode(ours(text)["input_ids"]) == text
    assert load_decoder(str(file), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_thoughts_for_it_are_trained_and_saved(file: Path, tmp_path):
    tokenizer = load_tokenizer(file)
    model = QuietStarForCausalLM.from_base(file, tokenizer, thought_length=2).train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.base.parameters())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    opened = QuietStarForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(opened.base), logits(model.base))
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


def test_commands_take_it(file: Path, tmp_path, monkeypatch, capsys):
    """Trained by a recipe, what comes out is an ordinary folder; the file itself is measured and
    continued without thoughts."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    recipe = parse_recipe(
        content(
            model={"name": str(file), "config": None, "tokenizer": None},
            data=from_files(
                Path("text.txt"), block_size=12, max_train_blocks=8, eval_blocks=2, txt_documents="line"
            ),
        )
    )
    run_recipe(recipe, "run", progress=False)
    assert {path.name for path in Path("run").glob("*.safetensors")} == {"model.safetensors"}
    assert AutoModelForCausalLM.from_pretrained("run").config.thought_length == 2
    capsys.readouterr()
    for name in ("run", str(file)):
        words = ["--tasks", "perplexity", "--data", "text.txt", "--limit", "2", "--block-size", "16"]
        assert cli.main(["eval", name, *words, "--output", "out.json", "--quiet"]) == 0
        assert ("with thoughts" in capsys.readouterr().out) == (name == "run")
        assert cli.main(["generate", name, "the lazy", "--max-new-tokens", "3"]) == 0
        assert capsys.readouterr().out.strip()
    words = ["text.txt", "--output", "page.html", "--tokens", "16"]
    assert cli.main(["inspect", "run", *words, "--tokenizer", "run"]) == 0
    for asking in (
        ["inspect", file, *words],
        ["generate", file, "the", "--show-thoughts"],
        ["generate", file, "the", "--thinking", "every:2"],
        ["eval", file, "--tasks", "gsm8k-cot", "--thinking", "every:2"],
    ):
        rejected(capsys, asking, "is a model without thoughts (GGUF file); expected one that quietstar")


def test_adapters_on_it(file: Path, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    sections = content(
        model={"name": str(file), "config": None, "tokenizer": None},
        data=from_files(Path("text.txt"), block_size=12, max_train_blocks=8),
        adapter={"rank": 2},
        training={"max_steps": 1},
    )
    run_recipe(parse_recipe(sections), "run", progress=False)
    model, _ = load_checkpoint("run", device="cpu")
    assert torch.isfinite(logits(model)).all()
    quantized = parse_recipe({**sections, "adapter": {"rank": 2, "quantize": "4bit"}})
    with pytest.raises(UserError, match="adapter.quantize is '4bit' and .*small.gguf a GGUF file"):
        run_recipe(quantized, "other", progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-3000], "broken.gguf is damaged, or of a kind that"),
        (lambda data: data[:200], "broken.gguf is damaged, or of a kind that"),
        (lambda data: b"GGUF", "broken.gguf is damaged, or of a kind that"),
        (lambda data: b"PK" + data[2:], "broken.gguf is not a GGUF file: it begins with b'PKUF'"),
        (lambda data: b"", "broken.gguf is not a GGUF file: it begins with b''"),
    ],
)
def test_damaged_files(file: Path, change: Any, message: str, tmp_path, capsys):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        load_decoder(broken)
    rejected(capsys, ["generate", broken, "the"], message)


def test_an_unknown_architecture(tmp_path, capsys):
    write_gguf(tmp_path / "other.gguf", "nobody")
    message = "other.gguf is damaged, or of a kind that transformers cannot read: .*nobody"
    for load in (load_decoder, load_tokenizer, load_config, QuietStarForCausalLM.from_base):
        with pytest.raises(UserError, match=message):
            load(tmp_path / "other.gguf")
    rejected(capsys, ["eval", tmp_path / "other.gguf", "--tasks", "perplexity"], "nobody")


def test_what_is_no_file(tmp_path, file: Path, monkeypatch):
    assert not is_gguf(tmp_path) and not is_gguf("someone/some-model") and is_gguf(file)
    with pytest.raises(UserError, match="GGUF file nowhere.gguf does not exist"):
        is_gguf("nowhere.gguf")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match="x.txt is a file; expected a folder, a GGUF file"):
        load_decoder(tmp_path / "x.txt")
    monkeypatch.setattr(metadata, "version", lambda name: "0.9.1")
    with pytest.raises(UserError, match=r"gguf \(>= 0.10\), which is there in version 0.9.1: pip"):
        load_tokenizer(file)


def test_without_the_package(file: Path, monkeypatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    message = r"gguf \(>= 0.10\), which is not installed: pip install 'quietstar\[gguf\]'"
    with pytest.raises(UserError, match=message):
        load_decoder(file)


@pytest.mark.slow
def test_a_real_file(tmp_path):
    """SmolLM2-135M-Instruct: it knows English, and a run on it leaves an ordinary folder."""
    name = os.environ.get("QUIETSTAR_GGUF")
    if not name:
        pytest.skip("QUIETSTAR_GGUF names no file (SmolLM2-135M-Instruct.Q4_1.gguf)")
    tokenizer = load_tokenizer(name)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token in (tokenizer.eos_token, None)
    assert tokenizer(" 51")["input_ids"] == [216, 37, 33]
    text = "Paris is the capital of France, and Berlin is the capital of Germany."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    model = QuietStarForCausalLM.from_base(name, tokenizer, thought_length=2, init_start_from=" =")
    assert sum(p.numel() for p in model.base.parameters()) == 134_515_008 + 2 * 576
    with torch.no_grad():
        assert model.eval()(ids, labels=ids).base_losses.mean() < 2.5
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert QuietStarForCausalLM.from_pretrained(tmp_path).dtype == torch.float32
