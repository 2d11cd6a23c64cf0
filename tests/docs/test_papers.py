"""docs/papers: a recipe for each paper, each of which trains and is what its name stands for."""

import json
import re
from pathlib import Path

import pytest
from small_recipes import run_cli

from quietstar import QuietStarForCausalLM
from quietstar.files import read_json
from quietstar.recipes.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "docs" / "papers"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SMALL = [
    *("training.max_steps=2", "data.max_train_blocks=16", "data.eval_blocks=0"),
    *("model.config.hidden_size=16", "model.config.intermediate_size=32", "model.vocab_size=512"),
    *("model.config.num_hidden_layers=2", "training.per_device_train_batch_size=2"),
]


@pytest.fixture
def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the recipes find their problems."""
    rows = [
        {"question": f"{a} + {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}
        for a in range(2, 10)
        for b in range(2, 7)
    ]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("star", "fast-quiet-star")])
def test_recipe_trains(name: str, problems: Path, stdlib_tokenizer_once):
    run_cli("train", FOLDER / f"{name}.yaml", "--quiet", *SMALL)
    model = QuietStarForCausalLM.from_pretrained(problems / "quietstar-runs" / name)
    for key, value in load_recipe(str(FOLDER / f"{name}.yaml")).thoughts.items():
        assert getattr(model.config, key) == value, key
    log = read_json(problems / "quietstar-runs" / name / "checkpoint-2" / "trainer_state.json")
    assert log["global_step"] == 2


def test_curriculum(problems: Path, stdlib_tokenizer_once):
    """Fast Quiet-STaR's stages, a step each: thoughts become shorter, the last stage has none."""
    path = FOLDER / "fast-quiet-star.yaml"
    stages = load_recipe(str(path)).training["thought_schedule"]
    assert [stage.get("thought_length") for stage in stages] == [13, 9, 5, None]
    short = json.dumps([{**stage, "steps": 1} for stage in stages[:-1]] + stages[-1:])
    words = [*SMALL, "training.max_steps=4", "training.logging_steps=1"]
    run_cli("train", path, "--quiet", *words, f"training.thought_schedule={short}")
    folder = problems / "quietstar-runs" / "fast-quiet-star"
    log = read_json(folder / "checkpoint-4" / "trainer_state.json")["log_history"]
    assert [entry["stage"] for entry in log if "stage" in entry] == [1, 2, 3, 4]
    assert QuietStarForCausalLM.from_pretrained(folder).config.thought_kind == "none"


def test_star(problems: Path, stdlib_tokenizer_once):
    """One iteration; a model that knows nothing learns from the data's own completions."""
    run_cli(
        "train", FOLDER / "pause-tokens.yaml", "--quiet", "--output", "base", *SMALL, "pause_tokens=null"
    )
    words = ["model.name=base", "star.iterations=1", "star.first_steps=2", "star.learn_from=answers"]
    run_cli("star", FOLDER / "star.yaml", "--quiet", *words, "star.max_new_tokens=4")
    row = read_json(problems / "quietstar-runs" / "star" / "iteration-01" / "row.json")
    assert row["too_long"] == 0


def test_every_recipe_is_in_the_table():
    text = (FOLDER.parent / "objectives.md").read_text(encoding="utf-8")
    assert re.findall(r"\[([\w-]+)\.yaml\]\(papers/\1\.yaml\) \| ", text) and len(RECIPES) == 7
    assert set(re.findall(r"\(papers/([\w-]+)\.yaml\)", text)) == set(RECIPES)
