"""README: its size and promises, and the longer Python examples, a small model in place of a large."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from benchmark_files import PATH
from families import tiny_decoder
from small_recipes import run_python

import quietstar_ext
from quietstar.data.lookup import LookupLanguage, TextMix, build_tokenizer

README = Path(__file__).parents[2] / "README.md"
DOCS = README.parent / "docs"
PAGES = "".join(path.read_text(encoding="utf-8") for path in (README, DOCS / "api.md"))
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGES, flags=re.S)
MAX_LINES = 150


def example(word: str) -> str:
    (found,) = [code for code in EXAMPLES if word in code]
    return found


def test_a_minute_is_enough():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert "](docs/figures/thought.svg)" in text and "**Status.**" in text


def test_links_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    links = {link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")}
    missing = {link for link in links if not (README.parent / link).is_file()}
    assert len(links) > 15 and not missing, missing


def test_operators_from_plain_pytorch():
    code = example("thought_attention")
    assert "import quietstar\n" not in code and len(code.splitlines()) <= 18
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["tokens"].shape == (64 * 6,)
    assert names["q"].grad.abs().sum() > 0


@pytest.mark.skipif(
    not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="this torch has none of its own"
)
def test_what_torch_has_not():
    """README says what our linear_cross_entropy takes and torch's does not."""
    assert "What torch's `linear_cross_entropy` lacks: weights per row" in README.read_text("utf-8")
    ours = inspect.signature(quietstar_ext.linear_cross_entropy_sum).parameters
    theirs = inspect.signature(torch.nn.functional.linear_cross_entropy).parameters
    assert {"row_weights", "banned", "temperature"} <= set(ours) - set(theirs)


def test_training(tmp_path, monkeypatch):
    code = example("QuietStarTrainer")
    assert len(code.strip().splitlines()) <= 13
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.pad_token = ";"
    tokenizer.save_pretrained("small")
    tiny_decoder("llama", vocab_size=48).save_pretrained("small")
    Path("text.txt").write_text(tokenizer.decode(LookupLanguage(0).tokens(400, TextMix(), 1)))
    for large, small in (
        ('"Qwen/Qwen2.5-0.5B"', '"small"'),
        ("256", "16"),
        ("max_steps=1000", "max_steps=2, save_steps=2, report_to=[], use_cpu=True"),
    ):
        assert large in code
        code = code.replace(large, small)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["model"].config.thought_length == 8
    assert Path("out/checkpoint-2/model.safetensors").is_file()


@pytest.mark.parametrize("command", ["quietstar train", "quietstar generate", "quietstar demo text"])
def test_commands_in_the_readme_exist(command: str):
    from quietstar.cli.app import build_parser

    assert command in README.read_text(encoding="utf-8")
    words = command.split()[1:] + (["tiny"] if command.endswith(("train", "generate")) else [])
    assert build_parser().parse_args(words).run is not None


def test_recipes_in_the_readme_are_shipped():
    from quietstar.recipes.recipe import shipped_recipes

    text = README.read_text(encoding="utf-8")
    for name in ("qwen2.5-0.5b", "llama-3.2-1b", "mistral-7b-paper"):
        assert f"`{name}`" in text and name in shipped_recipes()


METHODS = re.findall(
    r"^\| ([^|]+) \| (`(?:thoughts|training): .*`) \|$",
    (DOCS / "objectives.md").read_text(encoding="utf-8"),
    flags=re.M,
)


@pytest.mark.parametrize(("method", "cell"), METHODS, ids=[m.partition(" (")[0] for m, _ in METHODS])
def test_recipe_lines_of_the_methods(method: str, cell: str, tmp_path):
    from quietstar.config import QuietStarConfig
    from quietstar.recipes.recipe import load_recipe
    from quietstar.recipes.run import training_arguments
    from quietstar.values import load_yaml

    lines: dict = {}
    for line in re.findall(r"`([^`]*)`", cell):
        lines |= load_yaml(line, "README.md")
    recipe = load_recipe("tiny").changed(**lines)
    arguments = training_arguments(recipe, tmp_path, progress=False)
    # Read back, they are what the paper's name stands for and not the defaults.
    for name, value in lines.get("thoughts", {}).items():
        assert getattr(QuietStarConfig(**recipe.thoughts), name) == value, (method, name)
    for name, value in lines.get("training", {}).items():
        assert getattr(arguments, name) == value, (method, name)


def test_there_are_methods():
    assert len(METHODS) == 7


def test_the_tables_are_those_of_the_results():
    """README's and docs/results.md's numbers come from benchmarks/results."""
    run_python("-m", "benchmarks.report", "--check", PYTHONPATH=PATH)


def test_the_sentence_on_a_real_model_is_of_the_results():
    results = json.loads((README.parent / "benchmarks/results/demo/words.json").read_text())
    right = {row["what"]: f"{row['correct']:.3f}" for row in results["rows"]}
    said = f"from {right['no thoughts, at its best']} to {right['full Quiet-STaR']}"
    assert f"thoughts raise greedy accuracy {said}" in README.read_text()


def test_the_sentence_on_sums_is_of_the_results():
    arms = json.loads((README.parent / "benchmarks/results/star-sums.json").read_text())["arms"]

    def ends(arm: str) -> str:
        """At 3 digits after ten iterations, by seed."""
        rows = [run["rows"][10]["accuracy_by_class"]["3 digits"] for run in arms[arm]["seeds"].values()]
        return ", ".join(f"{100 * share:.0f}" for share in rows)

    hinted, alone = ends("with"), ends("without")
    said = f"end at {hinted} % with hints where it fails, at {alone} % without"
    text = " ".join(README.read_text().split())
    assert said in text
    last = arms["with"]["seeds"]["0"]["rows"][28]["accuracy"]
    assert f"seed 0, run longer, at {100 * last:.1f} % of up to 5" in text
