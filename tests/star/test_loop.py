"""The loop: what is kept and learnt from, its folders, continuing after a kill, its switches."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from small_recipes import rejected
from star_cases import recipe_content, save_base, scripted, solves_even_sums, sum_of

from quietstar.cli import app as cli
from quietstar.data import sums
from quietstar.files import read_json
from quietstar.recipes.recipe import Recipe, parse_recipe
from quietstar.recipes.star_section import StarSection
from quietstar.star import loop, writing
from quietstar.star.loop import run_star
from quietstar.star.problems import build_task
from quietstar.star.writing import read_lines


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("star") / "base")


def run(recipe: Recipe, output: Path) -> dict:
    return run_star(recipe, output, progress=False).metrics


def test_what_is_kept(base, tmp_path, monkeypatch):
    asked = scripted(monkeypatch, solves_even_sums)
    metrics = run(parse_recipe(recipe_content(base)), tmp_path / "run")
    first = tmp_path / "run" / "iteration-01"
    kept = read_lines(first / "kept.jsonl")
    assert {each["source"] for each in kept} == {"generated", "rationalized"}
    for each in kept:
        a, b = map(int, each["problem"].split("+"))
        problem, has_hint = sum_of(each["prompt"])
        assert (problem.a, problem.b) == (a, b) and not has_hint and not each["hint_left_in"]
        assert (each["source"] == "generated") == ((a + b) % 2 == 0)
        assert each["wrong_inside"] == ((a + b) % 10 == 1)
        assert each["iteration"] == 1
    # Nothing but failures is asked again, and what reached no answer is not kept.
    problems = {each["problem"] for each in read_lines(first / "written.jsonl")}
    even = {name for name in problems if sum(map(int, name.split("+"))) % 2 == 0}
    hinted = {each["problem"] for each in read_lines(first / "hinted.jsonl")}
    assert problems - even == hinted and even
    wrong = {name for name in hinted if sum(map(int, name.split("+"))) % 10 == 9}
    assert {each["problem"] for each in kept} == problems - wrong and wrong
    # The table says the same.
    zero, row, _ = metrics["rows"]
    assert zero["iteration"] == 0 and "solved" not in zero
    assert row["problems"] == len(problems) == 110 and row["solved"] == len(even) / 110
    assert row["rationalized"] == len(hinted - wrong) / 110
    assert row["wrong_inside_generated"] == 0 < row["wrong_inside_rationalized"] < 1
    assert set(row["accuracy_by_class"]) == set(row["by_class"]) == {"1 digit", "2 digits"}
    assert any(sum_of(prompt)[1] for prompt in asked)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "rationalize True" in report and "restart True" in report and "| 2 | 2 |" in report
    # What the recipe leaves open is in it, too.
    assert "answer scratch, " in report and "hint scratchpad, " in report and "stop None" in report
    assert (tmp_path / "run" / "accuracy.png").stat().st_size > 1000
    # Held-out sums are never learnt from.
    tested = {each["problem"] for each in read_lines(first / "tested.jsonl") if len(each["problem"]) > 3}
    assert tested and all(sums.held_out(*map(int, name.split("+"))) for name in tested)
    assert not any(sums.held_out(*map(int, name.split("+"))) for name in problems if len(name) > 3)


def test_the_last_batch_counts_though_it_is_not_full(base, tmp_path, monkeypatch):
    sizes = []
    original = writing.Writer._texts

    def recorded(self, prompts, temperature, seed):
        sizes.append(len(prompts))
        return original(self, prompts, temperature, seed)

    recipe = parse_recipe(recipe_content(base, generation_batch=50, max_new_tokens=3))
    monkeypatch.setattr(writing.Writer, "_texts", recorded)
    with pytest.raises(ValueError, match="no problem was solved in iteration 1"):
        run(recipe, tmp_path / "run")
    assert sizes == [50, 50, 5] + 2 * [50, 50, 10]  # 105 to be tested on, 110 without and with hints
    assert len(read_lines(tmp_path / "run" / "iteration-01" / "written.jsonl")) == 110


def files(folder: Path) -> dict[str, bytes]:
    """All that a run leaves, but for times and pictures."""
    kept = ("*.jsonl", "row.json", "model.safetensors", "report.md")
    return {
        str(path.relative_to(folder)): path.read_bytes() for glob in kept for path in folder.rglob(glob)
    }


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def whole(base) -> tuple[Recipe, dict, dict[str, bytes]]:
    """A run that nobody killed."""
    star = {"hints_left_in": 0.3, "older_rationales": True, "restart": False}
    recipe = parse_recipe(recipe_content(base, **star))
    output = base.parent / "run"
    with pytest.MonkeyPatch.context() as patch:
        scripted(patch, solves_even_sums)
        metrics = run(recipe, output)
    found = files(output)
    shutil.rmtree(output)
    return recipe, metrics, found


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (writing.Writer, "_texts", 6),
        (loop, "write_lines", 1),
        (loop, "write_lines", 2),
        (loop, "run_recipe", 1),
        (loop, "accuracy_row", 2),
        (loop, "write_json", 2),
        (loop, "run_recipe", 2),
        (loop, "save_report", 3),
    ],
)
def test_killed_anywhere_it_ends_the_same(base, whole, monkeypatch, owner, name, call):
    recipe, metrics, left = whole
    output = base.parent / "run"
    assert len([file for file in left if file.endswith("model.safetensors")]) == 2
    shutil.rmtree(output, ignore_errors=True)
    scripted(monkeypatch, solves_even_sums)
    calls, original = [0], getattr(owner, name)

    def dies(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(Killed):
            run(recipe, output)
    for path in output.rglob("written.jsonl"):  # a line that was being written
        if path.read_text().count("\n") < 110:
            with path.open("a") as file:
                file.write('{"problem": "1+')
    assert run(recipe, output) == metrics
    assert files(output) == left
    # A run that is done is not repeated.
    monkeypatch.setattr(loop, "run_recipe", None)
    assert run_star(recipe, output, progress=False).continued


def test_a_real_model_writes_the_same_after_a_kill(base, tmp_path, monkeypatch):
    """Greedily and sampled, batch by batch."""
    star = {"samples_per_problem": 2, "sampling_temperature": 1.5, "answer": r"regex:(\d)"}
    recipe = parse_recipe(recipe_content(base, generation_batch=50, max_new_tokens=5, **star))

    def written() -> list[str]:
        with pytest.raises(ValueError, match="no problem was solved"):
            run(recipe, tmp_path / "run")
        return (tmp_path / "run" / "iteration-01" / "written.jsonl").read_text().splitlines()

    monkeypatch.setattr(writing.Writer, "_judged", no_answer_is_right(writing.Writer._judged))
    whole = written()
    assert len(whole) == 220
    texts = [json.loads(line)["completion"] for line in whole]
    assert len(set(texts)) > 20 and any(a != b for a, b in zip(texts[::2], texts[1::2], strict=True))
    path = tmp_path / "run" / "iteration-01" / "written.jsonl"
    path.write_text("\n".join(whole[:120]) + whole[120][:9])
    assert written() == whole


def test_a_text_ends_what_a_real_model_writes(base, tmp_path, monkeypatch):
    """Whatever its tokenizer's pieces are: the sums' are whole words."""
    plain = parse_recipe(recipe_content(base, generation_batch=50, max_new_tokens=12))
    task = build_task(plain)
    problems = task.problems(1)

    def texts(star: StarSection, name: str) -> list[tuple[str, bool]]:
        each = loop._Loop(plain, base, task, "cpu", 7, False)
        each.star = star
        found = each._writer_of(0).write(problems, tmp_path / name)
        return [(written.completion, written.ended) for (written,) in found]

    whole = texts(plain.star, "whole.jsonl")
    stop = next(text for text, _ in whole)[4:7]
    stopped = texts(dataclasses.replace(plain.star, stop=stop), "stopped.jsonl")
    assert sum(stop in text for text, _ in whole) > 1 and not all(stop in text for text, _ in whole)
    for (text, ended), found in zip(whole, stopped, strict=True):
        assert found == ((text[: text.index(stop)], True) if stop in text else (text, ended))


def test_what_takes_long_shows_how_far_it_is(base, tmp_path, monkeypatch, capsys):
    """Writing is most of the time."""
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(recipe_content(base, iterations=1, max_new_tokens=3)))
    assert cli.main(["star", str(path), "--output", str(tmp_path / "run")]) == cli.USER_ERROR
    shown = capsys.readouterr().err
    for what in ("00: testing", "01: solving", "01: rationalizing"):
        assert f"iteration {what}: 100%" in shown
    scripted(monkeypatch, solves_even_sums)
    words = ["star", str(path), "--output", str(tmp_path / "other"), "--quiet"]
    assert cli.main(words) == 0 and "100%" not in capsys.readouterr().err


def no_answer_is_right(judged):
    def judge(self, problem, text, ended):
        return writing.Written(**{**vars(judged(self, problem, text, ended)), "right": False})

    return judge


def test_restart_and_continue(base, tmp_path):
    for restart in (True, False):
        recipe = parse_recipe(recipe_content(base, restart=restart, iterations=3))
        each = loop._Loop(recipe, tmp_path, None, "cpu", 7, False)
        names = [each.training_recipe(number).model.name for number in (1, 2, 3)]
        before = [str(tmp_path / f"iteration-0{n}" / "model") for n in (1, 2)]
        assert names == ([str(base)] * 3 if restart else [str(base), *before])
        assert [each.training_recipe(n).training["seed"] for n in (1, 2)] == [8, 9]


@pytest.mark.parametrize(
    ("growth", "steps"),
    [
        ({"step_growth": 1.2}, [40, 48, 58, 69]),
        ({"steps_added": 20}, [40, 60, 80, 100]),
        ({"step_growth": 1}, [40] * 4),
    ],
)
def test_steps_grow(base, growth, steps):
    star = parse_recipe(recipe_content(base, first_steps=40, **growth)).star
    assert [star.steps(n) for n in (1, 2, 3, 4)] == steps


def test_answers_alone_are_learnt_from(base, tmp_path, monkeypatch):
    scripted(monkeypatch, lambda prompt: ("1 2", True))
    recipe = parse_recipe(recipe_content(base, learn_from="answers", iterations=1))
    row = run(recipe, tmp_path / "run")["rows"][1]
    kept = read_lines(tmp_path / "run" / "iteration-01" / "kept.jsonl")
    assert len(kept) == row["kept"] == 110 and row["solved"] == row["rationalized"] == 0
    assert row["learnt_from"] == {"data": 110}
    for each in kept:
        assert each["prompt"].endswith("Target:\n") and each["source"] == "data"
        assert each["completion"] == sums.apart(sum(map(int, each["problem"].split("+"))))
    assert 0 < row["accuracy"] < 0.1  # those sums that are 12


def test_replayed_text_is_the_share_that_is_asked_for(base, tmp_path, monkeypatch):
    scripted(monkeypatch, solves_even_sums)
    file = tmp_path / "corpus.jsonl"
    pairs = sums.corpus(30, sums.CorpusMix(), 0)
    writing.write_lines(file, [{**pair._asdict(), "more": 1} for pair in pairs])
    star = {"iterations": 1, "replay_files": str(file), "replay_share": 0.5}
    row = run(parse_recipe(recipe_content(base, **star)), tmp_path / "run")["rows"][1]
    learnt = row["learnt_from"]
    assert learnt["replay"] == learnt["generated"] + learnt["rationalized"] > 60
    rows = read_lines(tmp_path / "run" / "iteration-01" / "train.jsonl")
    counts = [
        sum(row["prompt"] == p and row["completion"] == c for row in rows if row["from"] == "replay")
        for p, c in sums.corpus(30, sums.CorpusMix(), 0)
    ]
    assert min(counts) >= learnt["replay"] // 30


def test_the_command(base, tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, solves_even_sums)
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(recipe_content(base)))
    words = ["star", str(path), "--output", str(tmp_path / "run"), "--quiet"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "wrong inside" in printed and "2 digits" in printed and "report:" in printed
    assert len(read_json(tmp_path / "run" / "metrics.json")["rows"]) == 3
    assert cli.main(words) == 0 and "2 digits" in capsys.readouterr().out
    rejected(capsys, ["train", path], "has a section star, which `quietstar star` runs")
    rejected(capsys, [*words, "star.first_steps=3"], "star.first_steps is 2 there and 3 here")
    before = read_json(tmp_path / "run" / "metrics.json")["rows"]
    assert cli.main([*words, "star.iterations=3"]) == 0  # a run goes on with more of them
    after = read_json(tmp_path / "run" / "metrics.json")["rows"]
    assert after[:3] == before and len(after) == 4
    assert cli.main([*words, "star.iterations=1", "--overwrite"]) == 0
    assert not (tmp_path / "run" / "iteration-02").exists()
