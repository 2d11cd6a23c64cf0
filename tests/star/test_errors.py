"""What cannot be run is said in one sentence, and nothing is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_recipes import rejected
from star_cases import recipe_content, save_base, scripted, sum_of

from quietstar.errors import UserError
from quietstar.recipes.recipe import parse_recipe
from quietstar.star import loop
from quietstar.star.loop import run_star
from quietstar.star.problems import build_task

QUESTIONS = [
    {
        "Q": f"What is {n} and {n}?",
        "A": f"adding\n#### {2 * n}",
        "C": "(A) one\n(B) two",
        "K": "xy"[n % 2],
        "E": "\n" * (n % 2),
    }
    for n in range(1, 9)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("star") / "base")


def on_questions(base: Path, folder: Path, data: dict[str, Any] | None = None, **star: Any):
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    content = recipe_content(base, **{"answer": "final", "test_problems": 3, **star})
    del content["star"]["digits"], content["star"]["problems"]
    templates = {"prompt": "Q: {Q}\nA:", "completion": " {A}"}
    content["data"] = {"files": [str(file)], "block_size": 128, **templates, **(data or {})}
    return content


@pytest.mark.parametrize(
    ("star", "said"),
    [
        ({"iterations": 0}, "star.iterations is 0; expected a whole number >= 1"),
        ({"problems": 0}, "star.problems is 0; expected a whole number >= 1, or null"),
        ({"hints_left_in": 1.5}, "star.hints_left_in is 1.5; expected a share from 0 to 1"),
        ({"replay_share": 1.0}, "star.replay_share is 1.0; expected a share from 0 to below 1"),
        ({"replay_share": 0.5}, "star.replay_share is 0.5 and star.replay_files None; expected both or"),
        (
            {"sampling_temperature": -1},
            "star.sampling_temperature is -1.0; expected a number of at least",
        ),
        ({"samples_per_problem": 4}, "expected 1, or a temperature above 0"),
        ({"step_growth": "-20"}, "star.step_growth is -20.0; expected a factor above 0 and at most 5"),
        ({"step_growth": "fast"}, "star.step_growth is 'fast'"),
        (
            {"step_growth": 5, "iterations": 1000},
            "expected a last iteration of at most 1000000000 steps",
        ),
        ({"steps_added": -1}, "star.steps_added is -1; expected a whole number >= 0, or null"),
        (
            {"steps_added": 20, "step_growth": 1.5},
            "star.steps_added is 20 and star.step_growth 1.5; expected one of them",
        ),
        ({"answer": "finall"}, "star.answer is 'finall'; expected one of .*; did you mean final?"),
        ({"answer": "regex:(a"}, r"star.answer is 'regex:\(a', no regular expression"),
        ({"answer": "regex:a"}, "star.answer is 'regex:a' with 0 groups; expected one"),
        ({"hint": "choice"}, "star.hint is 'choice' and the problems are sums; expected scratchpad"),
        ({"hint": "question"}, "star.hint is 'question' and the problems are sums; expected scratchpad"),
        ({"digits": 19}, "star.digits is 19; expected at most 18"),
        ({"hint": "inside"}, "star.hint is 'inside'; expected 'choice' or 'question' or 'scratchpad'"),
        ({"shots": "1 + 1"}, "star.shots is '1 \\+ 1'; expected a list or null"),
        ({"shots": ["1 + 1"]}, "star.shots has the entry '1 \\+ 1'; expected {prompt, completion}"),
        (
            {"iteratons": 3},
            "unknown key 'star.iteratons' in section star; did you mean star.iterations?",
        ),
    ],
)
def test_settings_out_of_range(base, star: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        parse_recipe(recipe_content(base, **star))


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        (
            "data",
            {"name": None, "messages": "m", "files": ["x"]},
            "data.messages is given with a section",
        ),
        ("data", {"name": None, "files": ["x"]}, "star.answer is null; expected one of final, letter"),
        (
            "model",
            {"name": None, "config": {"model_type": "llama"}},
            "model.name is null with a section",
        ),
        (
            "data",
            {"prompt": "{Q}", "completion": "{A}"},
            "data.prompt is given and data.name is sums, which",
        ),
        (
            "training",
            {"dataloader_drop_last": True},
            "training.dataloader_drop_last is true with a section star; expected false",
        ),
        (
            "star",
            None,
            "data.name is sums, problems for `quietstar star`, and the recipe has no section",
        ),
    ],
)
def test_sections_at_odds(base, section: str, values: dict[str, Any] | None, said: str):
    content = recipe_content(base)
    content[section] = None if values is None else {**content[section], **values}
    content["model"].setdefault("tokenizer", "sums")
    with pytest.raises(UserError, match=said):
        parse_recipe(content)


@pytest.mark.parametrize(
    ("data", "star", "said"),
    [
        ({}, {"answer": "scratch"}, "has no answer that star.answer 'scratch' finds in ' adding"),
        (
            {"prompt": "{Q}"},
            {},
            "star.hint is 'question' and the prompt 'What is 4 and 4\\?' has one line",
        ),
        (
            {"prompt": "Q: {Q}\n{C}\nA:", "completion": " {K}"},
            {"answer": r"regex:(\w)", "hint": "choice"},
            r"has no line that begins with \(x\); expected a line for each choice",
        ),
        (
            {},
            {"shots": [{"prompt": "Q: 1\nA:", "completion": " one"}]},
            "star.shots has the completion ' one', in which star.answer finds no answer",
        ),
        (
            {},
            {"test_problems": 8},
            "the data have 8 problems, of which star.test_problems, 8, are held out",
        ),
        (
            {},
            {"shots": [{"prompt": "Q: 1\nA:", "completion": " 1 " * 300 + "\n#### 1"}]},
            r"star.shots has \d+ tokens, the longest problem has \d+ tokens and star.max_new_tokens is"
            " 60; expected at most 256 together, the model's context",
        ),
        (
            {},
            {"problem_class": "{T}"},
            "has no column 'T' for star.problem_class '{T}'; its columns are",
        ),
        ({}, {"problem_class": "{"}, "star.problem_class is '{', which is no template"),
        ({"prompt": "{E}"}, {"rationalize": False}, "questions.jsonl:1 has an empty prompt; expected a"),
        ({"block_size": 8}, {}, "data.block_size is 8 and the shortest prompt to learn from has"),
        (
            {},
            {"replay_files": ["none.jsonl"], "replay_share": 0.5},
            "data file none.jsonl does not exist",
        ),
    ],
)
def test_data_that_do_not_go_with_the_recipe(base, tmp_path, data, star, said):
    recipe = parse_recipe(on_questions(base, tmp_path, data, **star))
    with pytest.raises(UserError, match=said):
        run_star(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (("1 2", True), "star.answer finds no answer in any of 10 completions, e.g. '1 2'; expected"),
        (("#### 5", True), "none of 10 answers is right, e.g. '5'; expected a model that solves some"),
        (
            ("#### 5", False),
            "none of 10 completions ended within star.max_new_tokens, 60, e.g. '#### 5'",
        ),
    ],
)
def test_nothing_is_solved(base, tmp_path, monkeypatch, text, said):
    scripted(monkeypatch, lambda prompt: text)
    recipe = parse_recipe(on_questions(base, tmp_path))
    with pytest.raises(UserError, match=f"no problem was solved in iteration 1: {said}"):
        run_star(recipe, tmp_path / "run", progress=False)
    # What was written is there, and the same command asks nothing again.
    first = tmp_path / "run" / "iteration-01"
    assert len((first / "written.jsonl").read_text().splitlines()) == 5
    monkeypatch.setattr("quietstar.star.writing.Writer._texts", None)
    with pytest.raises(UserError, match="no problem was solved in iteration 1"):
        run_star(recipe, tmp_path / "run", progress=False)


def test_right_answers_that_did_not_end_are_not_called_wrong(base, tmp_path, monkeypatch):
    def answers(prompt: str) -> tuple[str, bool]:
        number = int(prompt.rpartition("What is ")[2].split()[0])
        return f"#### {2 * number if number > 4 else 1}", number <= 4

    scripted(monkeypatch, answers)
    said = r"none of 2 answers is right, e.g. '1'; .* \(8 more did not end within star.max_new_tokens\)"
    with pytest.raises(UserError, match=said):
        run_star(parse_recipe(on_questions(base, tmp_path)), tmp_path / "run", progress=False)


def test_a_problem_without_a_question_is_left_out(base, tmp_path, caplog):
    content = on_questions(base, tmp_path, {"prompt": "{P}"}, rationalize=False)
    file = Path(content["data"]["files"][0])
    rows = [{**row, "P": " " if n == 4 else row["Q"]} for n, row in enumerate(QUESTIONS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = build_task(parse_recipe(content))
    assert len(task.test) + len(task.problems(1)) == 7
    assert "questions.jsonl:5 has an empty prompt" in caplog.text


def test_a_completion_must_be_able_to_end(base, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    content = on_questions(base, tmp_path)
    content["model"]["tokenizer"] = str(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="star.stop is null and the tokenizer has no end-of-text token"):
        run_star(parse_recipe(content), tmp_path / "run", progress=False)


def test_a_folder_of_something_else(base, tmp_path, capsys):
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(recipe_content(base)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    rejected(capsys, ["star", path, "--output", tmp_path / "run"], "holds files but no run.json")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda text: text[:-20],
            "kept.jsonl, line 110 is not as it was written; remove the file: Unterm",
        ),
        (lambda text: text.replace('"kind"', '"sort"'), "kept.jsonl is not as it was written.*'sort'"),
        (lambda text: "[1]\n" + text, "kept.jsonl, line 1 is not as it was written; remove the file: "),
    ],
)
def test_files_that_somebody_else_wrote(base, tmp_path, monkeypatch, damage, said):
    scripted(monkeypatch, lambda prompt: ("x", True))
    recipe = parse_recipe(recipe_content(base, learn_from="answers", iterations=1))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "rows_to_learn", None)
        with pytest.raises(TypeError):
            run_star(recipe, tmp_path / "run", progress=False)
    kept = tmp_path / "run" / "iteration-01" / "kept.jsonl"
    kept.write_text(damage(kept.read_text()))
    with pytest.raises(UserError, match=said):
        run_star(recipe, tmp_path / "run", progress=False)


def test_one_process_alone(base, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is above 1; expected one process"):
        run_star(parse_recipe(recipe_content(base)), tmp_path / "run", progress=False)


def test_problems_of_data(base, tmp_path, monkeypatch):
    """Question and answer from templates, hints behind the question, classes, shots in the prompts."""

    def solves(prompt: str) -> tuple[str, bool]:
        asked = prompt.rpartition("What is ")[2]
        total = 2 * int(asked.split()[0])
        right = total % 4 == 0 or f"({total})" in asked
        return f" thinking\n#### {total if right else 0}", True

    asked = scripted(monkeypatch, solves)
    shots = [{"prompt": "Q: What is 0 and 0?\nA:", "completion": " none\n#### 0"}]
    star = {"shots": shots, "shots_in_training": True, "problem_class": "class {K}", "iterations": 1}
    recipe = parse_recipe(on_questions(base, tmp_path, **star))
    row = run_star(recipe, tmp_path / "run", progress=False).metrics["rows"][1]
    assert row["problems"] == row["kept"] == 5 and row["rationalized"] == pytest.approx(0.4)
    assert row["wrong_inside_generated"] is None and set(row["accuracy_by_class"]) == {
        "class x",
        "class y",
    }
    lines = (tmp_path / "run" / "iteration-01" / "train.jsonl").read_text().splitlines()
    for each in map(json.loads, lines):
        assert each["prompt"].startswith("Q: What is 0 and 0?\nA: none\n#### 0\n\nQ: What is ")
        assert "(" not in each["prompt"] and each["completion"].startswith(" thinking\n#### ")
    assert len(asked) == 2 * 3 + 5 + 2
    assert r"hint question, " in (report := (tmp_path / "run" / "report.md").read_text())
    assert r"stop \n\n, " in report


def test_a_class_may_be_empty(base, tmp_path):
    content = on_questions(base, tmp_path, problem_class="{K}")
    file = Path(content["data"]["files"][0])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["K"] = ""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = build_task(parse_recipe(content))
    assert [problem.kind for problem in [*task.test, *task.problems(1)]] == [
        row["K"] or "none" for row in rows
    ]


def test_sums_in_a_prompt_are_read(base):
    problem, has_hint = sum_of("Input:\n1 2 + 3 4\nTarget:\n4 6\n<scratch>\n")
    assert (problem.a, problem.b, has_hint) == (12, 34, True)
