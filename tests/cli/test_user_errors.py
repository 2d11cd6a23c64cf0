"""What users get wrong: one sentence and exit status 2, from every command and without a traceback."""

import dataclasses
import importlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_recipes import SIZES, content, from_files, rejected
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quietstar import QuietStarForCausalLM
from quietstar.cli import app as cli
from quietstar.cli import info, train
from quietstar.data.stdlib import train_tokenizer
from quietstar.errors import UserError, blaming
from quietstar.files import RUN_FILE

TEXT = "the quick brown fox jumps over the lazy dog\n" * 40
CONFIG, TRAINING = "model.config.", "training."
NAMED = ("small.yaml", "model.config=", "model.tokenizer=")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a recipe, a text, a decoder (``plain``) and a model with thoughts (``model``)."""
    folder = tmp_path_factory.mktemp("place")
    tokenizer: PreTrainedTokenizerFast = train_tokenizer([TEXT], 270)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=270))
    for name in ("plain", "model"):
        tokenizer.save_pretrained(folder / name)
    plain.save_pretrained(folder / "plain")
    QuietStarForCausalLM.from_base(plain, tokenizer, thought_length=2).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    recipe = content(
        model={"tokenizer": "plain"},
        data=from_files(Path("text.txt"), block_size=12),
        training={"max_steps": 2, "save_strategy": "no"},
    )
    (folder / "small.yaml").write_text(json.dumps(recipe))
    (folder / "empty.yaml").write_text("")
    (folder / "deep.yaml").write_text("a: " + "[" * 1200)
    (folder / "unquoted.yaml").write_text("data: {files: *.txt}\n")
    (folder / "listed.yaml").write_text("? [a]\n: 1\n")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "folder").mkdir()
    for name in ("cut", "shapes", "heads", "config"):
        shutil.copytree(folder / "model", folder / name)
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    weights = folder / "shapes" / "model.safetensors"
    state = load_file(weights)
    save_file(
        {k: torch.zeros(3, 3) if "q_proj" in k else v for k, v in state.items()},
        weights,
        {"format": "pt"},
    )
    settings = json.loads((folder / "heads" / "config.json").read_text())
    settings["text_config"]["num_attention_heads"] = 3
    (folder / "heads" / "config.json").write_text(json.dumps(settings))
    (folder / "config" / "config.json").write_text("{")
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)


def refused(words: list[str], message: str, capsys) -> None:
    rejected(capsys, words, message, alone=False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (CONFIG + "hidden_size=33", "model.config: The hidden size (33) is not a multiple of"),
        (CONFIG + "hidden_size=0", "model.config.hidden_size is 0; expected a whole number >= 1"),
        (CONFIG + "hidden_size=-16", "model.config.hidden_size is -16; expected a whole number"),
        (CONFIG + "hidden_size=large", "model.config.hidden_size is 'large'; expected a whole number"),
        (CONFIG + "hidden_size=null", "model.config.hidden_size is None; expected a whole number"),
        (CONFIG + "hidden_size=1000000", "this machine has"),
        (CONFIG + "num_hidden_layers=0", "model.config.num_hidden_layers is 0"),
        (CONFIG + "num_key_value_heads=3", "num_key_value_heads is 3; expected a divisor of"),
        (CONFIG + "head_dim=7", "model.config: "),  # each transformers has its own words for it
        (CONFIG + "vocab_size=some", "model.config.vocab_size is 'some'"),
        (CONFIG + "rms_norm_eps=x", "model.config: Field 'rms_norm_eps' expected float, got str"),
        (
            CONFIG + "hidden_act=nope",
            "model.config.hidden_act is 'nope', which the installed transformers",
        ),
        (CONFIG + "rope_parameters={rope_type: nope}", "rope_parameters.rope_type is 'nope', which"),
        (CONFIG + "pad_token_id=999", "model.config: Padding_idx must be within num_embeddings"),
        (CONFIG + "dtype=nope", "model.config: "),
        ("model.tokenizer=folder", "cannot load the tokenizer of folder: "),
        (TRAINING + "report_to=nope", "training.report_to is 'nope'; expected one of"),
        (TRAINING + "optim=galore_adamw", "training.optim is 'galore_adamw': "),
        (TRAINING + "lr_scheduler_kwargs={nope: 1}", "training.lr_scheduler_type is 'linear': "),
        (TRAINING + "accelerator_config=nope.json", "training: nope.json: No such file"),
        (TRAINING + "log_level=nope", "training.log_level is 'nope': "),
        (TRAINING + "max_steps=0", "training.max_steps is 0; expected a whole number >= 1, or -1"),
        (TRAINING + "seed=-1", "training.seed is -1; expected a number of at least 0 and below"),
        (TRAINING + "learning_rate=.nan", "training.learning_rate is nan; expected a number"),
        (TRAINING + "per_device_train_batch_size=0", "per_device_train_batch_size is 0"),
        (TRAINING + "gradient_accumulation_steps=-1", "gradient_accumulation_steps is -1"),
        (TRAINING + "adam_beta1=2", "training.adam_beta1 is 2.0; expected a number of at least 0"),
        (TRAINING + "save_steps=0", "training.save_steps is 0"),
        ("data.shuffle_buffer=-1", "data.shuffle_buffer is -1"),
        ("data.files=[*.txt]", "text that begins with * is put in quotes: '*.txt'"),
        ("data.files=[ab]*.txt", "(if it is text: \"'[ab]*.txt'\")"),
        ("data.files=small.pdf", "data file small.pdf does not exist"),
    ],
)
def test_settings(setting: str, message: str, capsys):
    refused(["train", "small.yaml", setting, "--output", "out", "--quiet"], message, capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize("logger", ["wandb", "tensorboard", "comet_ml", "azure_ml", "flyte"])
def test_loggers_that_are_not_installed(logger: str, monkeypatch, capsys):
    from transformers.integrations import integration_utils

    for name in ("wandb", "tensorboard", "comet", "azureml", "flytekit"):
        monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: False)
    words = ["train", "small.yaml", f"report_to={logger}", "--output", "out"]
    refused(words, f"training.report_to is '{logger}', which is not installed: pip install", capsys)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("folder", "recipe folder is a folder; expected a file"),
        ("empty.yaml", "empty.yaml is not a YAML mapping"),
        ("deep.yaml", "deep.yaml is nested too deeply"),
        ("unquoted.yaml", "line 1 is not valid YAML"),
        ("listed.yaml", "listed.yaml: key ['a'] is a list; expected a word (line 1)"),
        ("binary", "recipe binary is not UTF-8 text"),
        ("", "no recipe ''"),
        ("x" * 300, "it is neither a file nor"),
        ("\0", "it is neither a file nor"),
    ],
)
def test_recipes(recipe: str, message: str, capsys):
    refused(["train", recipe, "--output", "out"], message, capsys)
    refused(["plan", recipe], message, capsys)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("text.txt", "output folder text.txt is a file"),
        ("text.txt/out", "cannot be written to: Not a directory"),
        ("/proc/out", "cannot be written to"),
        ("x" * 300, "cannot be written to: File name too long"),
        ("a\0b", "cannot be written to: embedded null byte"),
    ],
)
def test_output_folders(output: str, message: str, capsys):
    refused(["train", "small.yaml", "--output", output], message, capsys)
    refused(["eval", "model", "--tasks", "perplexity", "--output", output + "/x"], "--output", capsys)


def test_an_output_folder_beside_one_that_is_not_there(tmp_path):
    words = ["train", "small.yaml", "--output", str(tmp_path / "new" / ".." / "out"), "--quiet"]
    assert cli.main(words) == 0 and (tmp_path / "out" / RUN_FILE).is_file()


def test_overwriting_spares_the_old_run_until_the_new_one_starts(capsys, tmp_path):
    words = ["train", "small.yaml", "--output", str(tmp_path / "run"), "--quiet", "--overwrite"]
    assert cli.main(words) == 0
    refused([*words, "model.config.hidden_size=33"], "not a multiple", capsys)
    assert (tmp_path / "run" / RUN_FILE).is_file() and (tmp_path / "run" / "metrics.json").is_file()
    assert cli.main([*words, "learning_rate=1e-4"]) == 0
    assert "0.0001" in (tmp_path / "run" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "the model's name is empty"),
        ("nowhere", "model nowhere is neither a folder nor in the local cache of the Hugging"),
        ("folder", "folder holds no model (no config.json)"),
        ("text.txt", "model text.txt is a file"),
        ("x" * 300, "neither a folder nor a name on the Hugging Face Hub"),
        ("a\0b", "neither a folder nor a name on the Hugging Face Hub"),
        ("cut", "cut: a file of its weights is cut short or damaged"),
        ("shapes", "in size [3, 3]; the configuration gives [16, 16]"),
        ("heads", "The hidden size (16) is not a multiple of the number of attention heads (3)"),
        ("config", "model config has no readable config.json"),
    ],
)
def test_models(model: str, message: str, capsys):
    refused(["generate", model, "text"], message, capsys)
    refused(["inspect", model, "text.txt", "--output", "page.html"], message, capsys)
    assert not Path("page.html").exists()


def test_a_model_without_thoughts(capsys):
    message = "plain is a model without thoughts (llama)"
    refused(["generate", "plain", "text", "--show-thoughts"], message, capsys)
    refused(["inspect", "plain", "text.txt", "--output", "page.html"], message, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "model", "half \udcff"], "the prompt is not UTF-8 text"),
        (["generate", "model", "--file", "binary"], "prompt file binary is not UTF-8 text"),
        (["generate", "model", "--file", "\0"], "is not a path"),
        (["generate", "model", "a", "--temperature", "inf"], "--temperature is inf; expected a number"),
        (["generate", "model", "a", "--temperature", "nan"], "--temperature is nan; expected a number"),
        (["generate", "model", "a", "--seed", "9" * 30], "--seed is 999"),
        (["generate", "model", "a", "--device", "nope"], "--device nope cannot be used: "),
        (["generate", "model", "a", "--device", "meta"], "--device meta cannot be used: "),
        (["inspect", "model", "binary"], "text file binary is not UTF-8 text"),
        (["inspect", "model", "\0"], "is not a path"),
        (["inspect", "model", "text.txt", "--output", "x" * 300], "cannot be written"),
        (["inspect", "model", "text.txt", "--output", "folder"], "cannot be written"),
        (["merge", "model", "new"], "model holds no adapter (no adapter_config.json)"),
        (["merge", "plain", "new"], "plain holds no adapter (no adapter_config.json)"),
        (["merge", "folder", "new"], "folder holds no model"),
        (["plan", "small.yaml", "--gpu-memory", "24 apples"], "--gpu-memory is '24 apples'; expected"),
        (["plan", "small.yaml", "--gpu-memory", "24M"], "--gpu-memory is '24M', 0.024 GB; expected"),
        (["plan", "small.yaml", "model.config.hidden_size=33"], "model.config: The hidden size (33)"),
        (["plan", "small.yaml", "model.config.hiden_size=32"], "did you mean hidden_size?"),
        (["plan", "small.yaml", "model.config=", "model.name=folder"], "folder holds no model (no"),
        # Named as the model, though its tokenizer is read first.
        (["train", *NAMED, "model.name=folder"], "folder holds no model (no config.json)"),
        (["train", *NAMED, "model.name=nowhere"], "error: model nowhere is neither a folder nor in"),
        (["eval", "model", "--tasks", "perplexity", "--data", "binary"], "binary is not UTF-8 text"),
        (["eval", "model", "--tasks", "gsm8k", "--data", "text.txt"], "line 1 is not JSON"),
        (
            ["eval", "model", "--tasks", "perplexity", "--output", "folder"],
            "--output folder is a folder",
        ),
    ],
)
def test_words(words: list[str], message: str, capsys):
    refused(words, message, capsys)
    assert not Path("new").exists()


def test_a_glob_needs_no_quotes(tmp_path):
    words = ["train", "small.yaml", "data.files=*.txt", "--output", str(tmp_path / "out"), "--quiet"]
    assert cli.main(words) == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(28, "No space left on device", "model.safetensors"),
            "model.safetensors: No space left",
        ),
        (NotADirectoryError(20, "Not a directory", "a/b"), "a/b: Not a directory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "lower the batch size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "lower the batch size"),
        (MemoryError(), "out of memory"),
    ],
)
def test_a_machine_that_cannot_do_it(error: Exception, message: str, monkeypatch, capsys):
    def fails(args: object) -> int:
        raise error

    monkeypatch.setattr(info, "run", fails)
    refused(["info"], message, capsys)


def test_standard_input_that_is_no_text(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    refused(["generate", "model"], "standard input is not UTF-8 text", capsys)


def test_only_what_can_be_continued_says_so(monkeypatch, capsys):
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    for command, words, continues in ((info, ["info"], False), (train, ["train", "tiny"], True)):
        monkeypatch.setattr(command, "run", interrupted)
        assert cli.main(words) == 130
        assert ("continues" in capsys.readouterr().err) == continues


def test_a_fault_of_ours_is_not_put_down_to_the_user():
    """Other packages' errors become a sentence; those that our code raises stay what they are."""
    with pytest.raises(UserError, match="model.config: IndexError"), blaming("model.config"):
        raise IndexError
    from quietstar.demos.lookup import ARMS
    from quietstar.thinking.layout import text_ranges
    from quietstar_ext import sample_tokens

    with pytest.raises(AttributeError), blaming("model.config"):
        text_ranges(None, "no tensor")  # type: ignore[arg-type]
    # The operators are ours, too, and so is what a dataclass of ours has generated.
    with pytest.raises(TypeError, match="logits is a NoneType"), blaming("model.config"):
        sample_tokens(None, seed=0)  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError), blaming("model.config"):
        ARMS[0].label = "x"  # type: ignore[misc]


def test_packages_are_others_wherever_they_are_installed(tmp_path, monkeypatch):
    (tmp_path / "elsewhere.py").write_text(
        "def read(*_, **options):\n    raise IndexError('cut short')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from quietstar.modeling.loading import load_whole

    elsewhere = importlib.import_module("elsewhere")
    with pytest.raises(UserError, match="the file x: cut short"), blaming("the file x"):
        load_whole(elsewhere.read, "x")


def test_bitsandbytes_does_not_ask_for_kernels(monkeypatch, capsys):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def imports(args: object) -> int:
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no kernels")
        logger.warning("this matters")
        return 0

    monkeypatch.setattr(info, "run", imports)
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler()])
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().err == "this matters\n"


@pytest.mark.slow
def test_a_reader_that_leaves():
    """`quietstar info | true` ends quietly, however late the output is written."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "quietstar", "info"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert done.returncode == 0
