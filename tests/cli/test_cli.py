"""The command line, from its words to its exit status, and a whole small run."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_recipes import SIZES, TINY_LLAMA, content, from_files, rejected
from small_training import Interrupt
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import quietstar
from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.cli import app as cli
from quietstar.cli import info, train
from quietstar.data.blocks import TokenBlocks
from quietstar.data.lookup import LookupLanguage, TextMix
from quietstar.errors import UserError
from quietstar.evaluation.perplexity import Estimate, deciles, estimate, summarize, token_losses
from quietstar.files import read_json
from quietstar.recipes.build import build_data, build_model, build_tokenizer
from quietstar.recipes.recipe import Recipe, parse_recipe
from quietstar.recipes.run import run_recipe
from quietstar.training.trainer import NonFiniteLoss
from quietstar.versions import package_versions

pytestmark = pytest.mark.usefixtures("stdlib_tokenizer_once")
COMMANDS = [command.__name__.rpartition(".")[2] for command in cli.COMMANDS]
TEXT = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 60)
    return path


@pytest.fixture
def recipe_file(tmp_path, text_file: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(small(text_file).to_dict()))  # JSON is YAML
    return path


def small(text_file: Path, **sections: dict) -> Recipe:
    changes: dict[str, dict] = {
        "model": {"tokenizer": "stdlib", "vocab_size": 300},
        "data": from_files(text_file, block_size=12, max_train_blocks=40, eval_blocks=0),
        "thoughts": {"talk_length": 2},
        "training": {},
    }
    return parse_recipe(content(**{n: {**v, **sections.get(n, {})} for n, v in changes.items()}))


class TestErrors:
    """Bad input: exit status 2 and one line that says what to do."""

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["train", "tyni"], "no recipe tyni: it is neither a file nor one of the shipped ones"),
            (["train", "tiny", "learning_rat=1"], "did you mean training.learning_rate?"),
            (["train", "tiny", "thought_length=0"], "thoughts.thought_length is 0"),
            (["train", "tiny", "data.name=", "files=no.txt"], "data file no.txt does not exist"),
            (["train", "tiny", "eval_blocks=0", "eval_strategy=steps"], "data.eval_blocks is 0"),
            (["train", "tiny", "model.config.hiden_size=8"], "did you mean hidden_size?"),
            (["train", "tiny", "model.config.vocab_size=8"], "the tokenizer has 2048 tokens"),
            (
                ["train", "tiny", "model.config.model_type=lama"],
                "which the installed transformers does not know",
            ),
            (["train", "tiny", "model.config=", "model.name=./no"], "./no is neither a folder nor"),
        ],
    )
    def test_one_line(self, words: list[str], message: str, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        if "./no" in words[-1]:
            words.append("model.tokenizer=")
        rejected(capsys, words, message)
        assert not (tmp_path / "quietstar-runs").exists()

    def test_traceback_on_request(self, monkeypatch, capsys):
        monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
        assert cli.main(["train", "tyni"]) == 2
        assert "Traceback" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("error", "status", "said"),
        [
            # A fault of the program is not hidden.
            (AssertionError("a bug"), 1, "(?s)Traceback.*a bug.*"),
            (KeyboardInterrupt(), 130, "[^\\n]*\\n"),
            (NonFiniteLoss("step 7 is not finite"), 2, "quietstar: error: step 7 is not finite\\n"),
        ],
    )
    def test_what_a_command_raises(self, monkeypatch, capsys, error, status: int, said: str):
        def fails(args: argparse.Namespace) -> int:
            raise error

        monkeypatch.setattr(info, "run", fails)
        assert cli.main(["info"]) == status
        assert re.fullmatch(said, capsys.readouterr().err)


def test_words_after_options_are_settings(monkeypatch):
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(train, "run", lambda args: seen.append(args))
    assert cli.main(["train", "tiny", "a=1", "--output", "x", "b=2"]) == 0
    assert seen[0].settings == ["a=1", "b=2"] and seen[0].output == Path("x")


def test_a_command_decides_about_threads_and_memory_before_it_runs(monkeypatch, capsys):
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    kept: list[bool] = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: kept.append(True))
    assert cli.main(["info", "--json"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == "1000" and kept


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"quietstar {package_versions()['quietstar']}\n"


def test_the_command_line_itself_imports_the_standard_library_alone():
    """Help takes no longer than Python takes to start: nothing else is loaded for it."""
    code = (
        "import atexit, sys\n"
        "old = set(sys.modules)\n"
        "atexit.register(lambda: print('loaded', *{m.split('.')[0] for m in set(sys.modules) - old}))\n"
        "from quietstar_command import main\n"
        "main()"
    )
    for words in (["--help"], *([name, "--help"] for name in COMMANDS)):
        done = subprocess.run([sys.executable, "-P", "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0 and "usage: quietstar" in done.stdout, done.stderr
        mark, *loaded = done.stdout.splitlines()[-1].split()
        assert mark == "loaded" and "quietstar" in loaded
        assert set(loaded) - {"quietstar", "quietstar_command"} <= set(sys.stdlib_module_names)


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-P", "-m", "quietstar", "train", "tyni"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    # Whatever other packages have to say comes before.
    assert done.stderr.splitlines()[-1].startswith("quietstar: error: no recipe tyni")


class TestRun:
    def test_from_a_text_file_to_a_checkpoint(self, recipe_file: Path, tmp_path, capsys):
        output = tmp_path / "out"
        words = ["train", str(recipe_file), "eval_blocks=4", "txt_documents=line", "--quiet"]
        lines = tmp_path / "text.txt"
        lines.write_text((TEXT + "\n") * 60)
        assert cli.main([*words, "--output", str(output)]) == 0
        assert "NLL with thoughts" in capsys.readouterr().out
        metrics = read_json(output / "metrics.json")
        assert metrics["steps"] == 4
        assert (
            metrics["evaluation"]["blocks"] == 4
            and len(metrics["evaluation"]["by_decile_of_base_nll"]) == 10
        )
        model = AutoModelForCausalLM.from_pretrained(output)
        assert isinstance(model, QuietStarForCausalLM)
        assert (model.config.thought_length, model.config.talk_length) == (2, 2)
        tokenizer = AutoTokenizer.from_pretrained(output)
        quietstar.check_tokenizer(tokenizer, model.config)

        # The same again is not trained again; another recipe is rejected, and nothing is lost.
        before = (output / "model.safetensors").read_bytes()
        assert cli.main([*words, "--output", str(output)]) == 0
        assert cli.main([*words, "--output", str(output), "learning_rate=1"]) == 2
        assert "belongs to another run" in capsys.readouterr().err
        assert (output / "model.safetensors").read_bytes() == before

    def test_an_interrupted_run_ends_as_one_that_was_not(self, text_file: Path, tmp_path):
        recipe = small(text_file)
        whole = run_recipe(recipe, tmp_path / "whole", progress=False)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, tmp_path / "parts", progress=False, callbacks=[Interrupt(3)])
        parts = run_recipe(recipe, tmp_path / "parts", progress=False, resume=True)
        assert parts.metrics["steps"] == 4
        models = [QuietStarForCausalLM.from_pretrained(r.output).state_dict() for r in (whole, parts)]
        for name, value in models[0].items():
            torch.testing.assert_close(models[1][name], value, rtol=0, atol=1e-6, msg=name)

    def test_continuing_from_a_checkpoint(self, text_file: Path, tmp_path):
        first = run_recipe(small(text_file), tmp_path / "first", progress=False)
        second = {"name": str(first.output), "config": None, "tokenizer": None}
        for base_only in (False, True):
            recipe = small(
                text_file, model={**second, "base_only": base_only}, training={"max_steps": 1}
            )
            result = run_recipe(recipe, tmp_path / f"second-{base_only}", progress=False)
            assert result.metrics["steps"] == 1

    def test_streaming(self, text_file: Path, tmp_path):
        recipe = small(
            text_file, data={"streaming": True, "packing": "document", "txt_documents": "line"}
        )
        text_file.write_text((TEXT + "\n") * 60)
        assert run_recipe(recipe, tmp_path / "out", progress=False).metrics["steps"] == 4

    def test_the_wrong_tokenizer(self, text_file: Path, tmp_path):
        config = LlamaConfig(**SIZES, vocab_size=290)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
        recipe = small(text_file, model={"name": str(tmp_path / "base"), "config": None})
        with pytest.raises(
            UserError, match="the tokenizer has 300 tokens but the model's vocabulary has 290"
        ):
            run_recipe(recipe, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()

    def test_a_tokenizer_without_the_meta_tokens(self, text_file: Path, tmp_path):
        first = run_recipe(small(text_file), tmp_path / "first", progress=False)
        core = json.loads(
            (first.output / "tokenizer.json").read_text().replace("<|startthought|>", "<|no|>")
        )
        other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)))
        other.save_pretrained(tmp_path / "other")
        model = {"name": str(first.output), "config": None, "tokenizer": str(tmp_path / "other")}
        with pytest.raises(ValueError, match=r"no <\|startthought\|> token"):
            run_recipe(small(text_file, model=model), tmp_path / "out", progress=False)

    def test_data_too_short_is_said_before_the_folder_is_made(self, text_file: Path, tmp_path):
        text_file.write_text("short")
        with pytest.raises(UserError, match="too short"):
            run_recipe(small(text_file), tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()


class TestPerplexity:
    def test_estimate_of_equal_blocks_is_the_textbook_one(self):
        values = torch.randn(20, 7, dtype=torch.float64).numpy()
        found = estimate(values, values == values)
        means = values.mean(1)
        assert found.mean == pytest.approx(values.mean())
        assert found.error == pytest.approx(means.std(ddof=1) / 20**0.5)

    def test_estimate_ignores_what_is_not_counted(self):
        values = torch.tensor([[1.0, 99.0], [3.0, 5.0], [99.0, 99.0]], dtype=torch.float64).numpy()
        counted = torch.tensor([[True, False], [True, True], [False, False]]).numpy()
        assert estimate(values, counted).mean == 3.0
        assert estimate(values[:1], counted[:1]) == Estimate(1.0, None)

    def test_deciles_are_equally_large(self):
        difficulty = torch.randn(10, 10, dtype=torch.float64).numpy()
        decile = deciles(difficulty, difficulty == difficulty)
        for d in range(10):
            assert (decile == d).sum() == 10
        assert difficulty[decile == 0].max() < difficulty[decile == 9].min()

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_losses_are_the_models_own(self, side: str):
        model = tiny_model()
        rows = [{"input_ids": torch.randint(4, 60, (n,))} for n in (9, 12, 12, 7)]
        items = [
            {**r, "attention_mask": torch.ones_like(r["input_ids"]), "labels": r["input_ids"]}
            for r in rows
        ]
        found = token_losses(model, items, batch_size=3, padding_side=side, progress=False)
        assert found.counted.sum() == sum(len(r["input_ids"]) - 1 for r in rows)
        for number, item in enumerate(items):
            alone = model(input_ids=item["input_ids"][None], labels=item["labels"][None])
            for ours, theirs in (
                (found.base, alone.base_losses[0]),
                (found.mixed, alone.talk_losses[0, 0, 0, : len(item["labels"]) - 1]),
            ):
                kept = torch.from_numpy(ours[number][found.counted[number]])
                torch.testing.assert_close(kept.float(), theirs, rtol=1e-4, atol=1e-4)
        plain = summarize(found)
        assert plain["gain"]["mean"] == pytest.approx(
            plain["base_nll"]["mean"] - plain["mixed_nll"]["mean"]
        )

    def test_without_thoughts_and_without_traces(self):
        model = tiny_model(thought_kind="none").train()
        items = [dict.fromkeys(("input_ids", "attention_mask", "labels"), torch.arange(4, 14))]
        state = torch.get_rng_state()
        found = token_losses(model, items, progress=False)
        assert (found.base == found.mixed).all()
        assert model.training and torch.equal(state, torch.get_rng_state())

    def test_no_text(self):
        with pytest.raises(UserError, match="no text to evaluate on"):
            token_losses(tiny_model(), [], progress=False)


def tiny_model(**fields: str) -> QuietStarForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=64)
    thoughts = QuietStarConfig(config, thought_length=2, start_token_id=1, end_token_id=2, **fields)
    model = QuietStarForCausalLM(thoughts)
    torch.nn.init.normal_(model.mixing_head.fc3.weight)  # zeros would hide what thoughts do
    return model.eval()


def test_demo_dispatch(monkeypatch):
    called: list[str] = []
    for name in ("lookup", "text"):
        module = importlib.import_module(f"quietstar.demos.{name}")
        monkeypatch.setattr(module, "run_demo", lambda *args, name=name, **kw: called.append(name))
    assert cli.main(["demo"]) == 0 and cli.main(["demo", "text", "--quick"]) == 0
    assert called == ["lookup", "text"]


class TestLookup:
    @staticmethod
    def recipe(**data: object) -> Recipe:
        content = {"name": "lookup", "block_size": 12, "max_train_blocks": 4, **data}
        model = {"config": TINY_LLAMA, "tokenizer": "lookup", "init_embedding_from": "—"}
        return parse_recipe({"model": model, "data": content})

    def test_rows_and_the_embeddings_they_begin_with(self):
        recipe = self.recipe(lookup={"language": 4, "seed": 3, "work": 0.5, "asides": 1})
        tokenizer = build_tokenizer(recipe.model)
        model = build_model(recipe, tokenizer)
        (dash,) = tokenizer("—")["input_ids"]
        start = model.thought_embedding.start * model.config.embedding_scale
        torch.testing.assert_close(start, model.get_input_embeddings().weight[dash])
        rows, heldout = build_data(recipe, tokenizer)
        assert isinstance(rows, TokenBlocks) and len(rows) == 4 and heldout is None
        mix = TextMix(work=0.5, asides=1.0)
        assert rows.tokens.tolist() == LookupLanguage(4).blocks(4, 12, mix, 3).tolist()

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            ({"lookup": {"sed": 1}}, "unknown key 'sed' in data.lookup; known keys: language, seed"),
            ({"lookup": {"work": "often"}}, "data.lookup.work is 'often'; expected a number"),
        ],
    )
    def test_refused(self, data: dict, words: str):
        recipe = self.recipe(**data)
        with pytest.raises(UserError) as error:
            build_data(recipe, build_tokenizer(recipe.model))
        assert words in str(error.value)
