"""Recipes on prompts and completions: from the file to trained weights, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from real_data import real_data
from small_recipes import content, from_files
from small_training import Interrupt

from quietstar.cli import app as cli
from quietstar.errors import UserError
from quietstar.files import read_json
from quietstar.plan.costs import Rows, step_of
from quietstar.plan.table import print_plan
from quietstar.recipes.build import build_data, build_tokenizer
from quietstar.recipes.recipe import Recipe, load_recipe, parse_recipe
from quietstar.recipes.run import run_recipe

pytestmark = pytest.mark.usefixtures("stdlib_tokenizer_once")
ROWS = [
    {"Body": f"a b {n}", "Question": "c ?", "Equation": f"( {n}.0 + 1.0 )", "Answer": n + 1.0}
    for n in range(24)
]
TEMPLATES = {"prompt": "{Body} {Question}", "completion": " {Answer:g}"}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def recipe(file: Path, thoughts: dict[str, Any] | None = None, **data: Any) -> Recipe:
    sections: dict[str, Any] = {
        "model": {"tokenizer": "stdlib", "vocab_size": 300},
        "data": {"max_train_blocks": None, "block_size": 60, **from_files(file, **data)},
        "thoughts": thoughts or {},
    }
    return parse_recipe(content(**sections))


def test_what_follows_from_templates(file: Path, tmp_path):
    made = recipe(file, **TEMPLATES)
    assert made.data.packing == "document" and made.data.text_column is None
    again = tmp_path / "again.yaml"
    again.write_text(made.to_yaml())
    assert load_recipe(str(again)) == made
    assert made.changed(training={"max_steps": 2}).data == made.data
    assert recipe(file, **TEMPLATES, packing="packed").data.packing == "packed"
    preset = parse_recipe(content(data={"name": None, "preset": "gsm8k", "max_train_blocks": None}))
    assert (preset.data.name, preset.data.config_name) == ("openai/gsm8k", "main")
    assert recipe(file, preset="svamp").data.name is None
    words = ["data.preset=csqa", "data.name=null", "data.max_train_blocks=null"]
    assert load_recipe("tiny", words).data.name == "tau/commonsense_qa"


def test_recipes_of_text_keep_their_fingerprint(file: Path):
    """That of version 0.1.0: a run that was begun then is continued."""
    assert not {"prompt", "completion", "messages", "preset"} & set(
        recipe(file).relevant_settings()["data"]
    )
    assert recipe(file, **TEMPLATES).fingerprint() != recipe(file).fingerprint()
    assert load_recipe("tiny").fingerprint() == "40464d359a214865"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {**TEMPLATES, "text_column": "Body"},
            "data.text_column is 'Body' and data.prompt is given; expected one of them: a text",
        ),
        (
            {"preset": "svamp", "text_column": "text"},
            "data.text_column is 'text' and data.preset is given",
        ),
        ({"text_column": None}, "data.text_column is null; expected the column that holds the text"),
        (
            {"prompt": "{Body}"},
            "data.prompt is given without data.completion; expected both, or data.prese",
        ),
        (
            {**TEMPLATES, "packing": "concat"},
            "data.packing is 'concat' and data.prompt is given; expected",
        ),
        (
            {**TEMPLATES, "messages": "m"},
            "data.messages and data.prompt are given; expected one of them",
        ),
        ({**TEMPLATES, "completion": "{Answer"}, "data.completion is '{Answer', which is no template: "),
        (
            {**TEMPLATES, "completion": " {Answer:q}"},
            "data.completion is ' {Answer:q}' with the format 'q' of column 'Answer'; expected one of",
        ),
        ({**TEMPLATES, "completion": 3}, "data.completion is 3; expected text or a list"),
        (
            {"name": "stdlib", "files": None, **TEMPLATES},
            "but data.name is stdlib, which has no columns",
        ),
    ],
)
def test_settings_that_do_not_go_together(file: Path, data: dict[str, Any], said: str):
    with pytest.raises(UserError) as error:
        recipe(file, **data)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_thoughts_where_no_completion_is(file: Path):
    said = "thoughts.think_at is 'completion' and the data have no completions; expected"
    with pytest.raises(UserError, match=said):
        recipe(file, {"think_at": "completion"})
    stages = [{"steps": 2, "think_at": "all"}, {"think_at": "completion"}]
    for data in ({}, TEMPLATES):
        sections = {"model": {"tokenizer": "lookup"}, "training": {"thought_schedule": stages}}
        made = content(data={"max_train_blocks": None, **from_files(file, **data)}, **sections)
        if data:
            assert parse_recipe(made).data.packing == "document"
        else:
            with pytest.raises(UserError, match=said):
                parse_recipe(made)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {**TEMPLATES, "prompt": "{Bodi} {Question}"},
            "line 1 has no column 'Bodi' for data.prompt '{Bodi} {Question}'; its columns are: Ans",
        ),
        (
            {**TEMPLATES, "completion": "{Question:g}"},
            "line 1 cannot fill data.completion '{Question:g}': column 'Question' holds 'c ?'",
        ),
        (
            {"messages": "talk"},
            "data.messages is 'talk' and the tokenizer has no chat template; expected",
        ),
    ],
)
def test_what_the_rows_do_not_have_is_said_before_any_work(
    file: Path, tmp_path, data: dict[str, Any], said: str
):
    with pytest.raises(UserError) as error:
        run_recipe(recipe(file, **data), tmp_path / "run", progress=False)
    assert said in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["document", "packed"])
@pytest.mark.parametrize("rule", ["completion", "loss:1:20"])
def test_a_run_from_the_file_to_the_metrics(file: Path, tmp_path, packing: str, rule: str):
    """Continued where it was interrupted, with the same draws of completions."""
    aside = {"template": " ({Equation:equation}) {Answer:number}", "share": 0.5}
    made = recipe(
        file,
        {"think_at": rule, "talk_length": 2},
        prompt=TEMPLATES["prompt"],
        completion=[{"template": " {Answer:g}", "share": 0.5}, aside],
        packing=packing,
        eval_blocks=2,
    )
    if packing == "packed":
        made = made.changed(training={"rows_per_backward": 1, "gradient_accumulation_steps": 2})
    whole = run_recipe(made, tmp_path / "whole", progress=False)
    metrics = read_json(whole.output / "metrics.json")
    assert metrics["steps"] == 4 and metrics["evaluation"]["mixed_nll"]["mean"] > 0
    with pytest.raises(KeyboardInterrupt):
        run_recipe(made, tmp_path / "parts", progress=False, callbacks=[Interrupt(3)])
    parts = run_recipe(made, tmp_path / "parts", progress=False)
    assert parts.continued and parts.metrics["evaluation"] == metrics["evaluation"]


@pytest.mark.parametrize("packing", ["document", "packed"])
def test_a_stream_trains(file: Path, tmp_path, packing: str):
    made = recipe(file, {"think_at": "completion"}, **TEMPLATES, streaming=True, packing=packing)
    result = run_recipe(made, tmp_path / "run", progress=False)
    assert result.metrics["steps"] == 4


def test_evaluation_rows_are_not_trained_on(file: Path):
    made = recipe(file, **TEMPLATES, eval_blocks=4)
    tokenizer = build_tokenizer(made.model)
    train, heldout = build_data(made, tokenizer, progress=False)
    assert len(train) == len(ROWS) - 4 and heldout is not None and len(heldout) == 4
    texts = [tokenizer.decode(heldout[n]["input_ids"]) for n in range(4)]
    assert texts[3] == "a b 3 c ? 4" + tokenizer.eos_token


def test_the_preset_on_the_published_file(tmp_path):
    made = recipe(
        real_data("svamp/train.jsonl"), {"think_at": "completion"}, preset="svamp", block_size=400
    )
    train, _ = build_data(made, build_tokenizer(made.model), progress=False)
    assert len(train) == 600


def test_a_real_model_on_published_problems(tmp_path, capsys):
    """Trained where the completion begins, and measured there; asides for half of the rows."""
    aside = " ({Equation:equation} = {Answer:number}) {Answer:number}\n"
    made = parse_recipe(
        {
            "model": {"name": str(real_data("stories260K"))},
            "data": {
                "preset": "svamp",
                "completion": [" {Answer:number}\n", aside],
                "files": str(real_data("svamp/train.jsonl")),
                "block_size": 256,
            },
            "thoughts": {"think_at": "completion", "thought_length": 3, "talk_length": 3},
            "training": {"max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True},
        }
    )
    train, _ = build_data(made, build_tokenizer(made.model), progress=False)
    tokenizer = build_tokenizer(made.model)
    rows = [train[n] for n in range(50)]
    texts = [tokenizer.decode(row["input_ids"][row["labels"] != -100]) for row in rows]
    assert {text.lstrip()[0] == "(" for text in texts} == {True, False}
    assert all(len(row["completion_anchors"]) == 1 for row in rows)
    run_recipe(made, tmp_path / "run", progress=False)
    words = ["eval", tmp_path / "run", "--tasks", "completions,svamp", "--preset", "svamp", "--limit", 6]
    for task in ("completions", "svamp"):
        words += ["--data", f"{task}={real_data('svamp/test.jsonl')}"]
    words += ["--output", tmp_path / "out.json", "--quiet", "--device", "cpu"]
    assert cli.main([str(word) for word in words]) == 0
    shown = capsys.readouterr().out
    assert "completions: 6 items" in shown and "svamp: 6 items" in shown
    found = read_json(tmp_path / "out.json")["tasks"]
    assert 0 < found["completions"]["nll"]["base"]["mean"] < 60


def test_the_plan_counts_a_thought_per_completion(file: Path):
    made = recipe(file, {"think_at": "completion", "num_rationales": 3}, **TEMPLATES)
    from quietstar.config import QuietStarConfig

    step = step_of(made)
    assert Rows.of(QuietStarConfig(**made.thoughts), step).columns == 2 * 3
    loss = recipe(file, {"think_at": "loss:1:4.5"}, **TEMPLATES)
    packed = recipe(file, {"think_at": "completion"}, **TEMPLATES, packing="packed")
    for other, said in (
        (
            loss,
            "think_at is 'loss:1:4.5', by which the number of thoughts depends on the text; expected",
        ),
        (packed, "think_at is 'completion' and data.packing 'packed', by which the number of thoughts"),
    ):
        with pytest.raises(UserError, match=said):
            print_plan(None, other, 24e9, "24G")  # type: ignore[arg-type]
