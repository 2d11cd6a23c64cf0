"""What is checked before anything is written; runs that go on, elsewhere, too; one original model."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from small_recipes import rejected
from star_cases import recipe_content, save_base, scripted, solves_even_sums, sum_of

from quietstar.cli import app as cli
from quietstar.data.pause_tokens import add_pause_tokens, pause_ids
from quietstar.data.sums import Sum, hinted_prompt, scratch_prompt, worked
from quietstar.errors import UserError
from quietstar.files import read_json
from quietstar.recipes.recipe import parse_recipe
from quietstar.recipes.star_section import StarSection
from quietstar.star import loop
from quietstar.star.loop import run_star
from quietstar.star.problems import build_task
from quietstar.star.writing import Writer, read_lines


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("star") / "base")


def test_resume_continues_and_a_moved_run_too(base, tmp_path, monkeypatch, capsys):
    """Killed in the second fine-tuning, which is of the model of the first."""
    scripted(monkeypatch, solves_even_sums)
    path, old, new = (tmp_path / name for name in ("small.yaml", "old", "new"))
    path.write_text(json.dumps(recipe_content(base, restart=False)))
    monkeypatch.chdir(tmp_path)
    rejected(capsys, ["star", path, "--output", old, "--resume"], "holds no run to resume")
    train = "quietstar.training.trainer.QuietStarTrainer.train"
    calls = []

    def dies(self, original=loop.run_recipe.__globals__["QuietStarTrainer"].train, **kwargs):
        calls.append(self)
        if len(calls) == 2:
            raise Killed
        return original(self, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train, dies)
        with pytest.raises(Killed):
            cli.main(["star", str(path), "--output", "old", "--quiet"])
    assert (old / "iteration-02" / "model" / "run.json").is_file()
    assert not (old / "metrics.json").exists() and (old / "report.md").is_file()
    shutil.move(old, new)
    assert cli.main(["star", str(path), "--output", str(new), "--quiet", "--resume"]) == 0
    assert len(read_json(new / "metrics.json")["rows"]) == 3
    assert str(new) in (new / "iteration-02" / "model" / "recipe.yaml").read_text()


def test_what_fine_tuning_refuses_is_found_first(base, tmp_path):
    content = recipe_content(base)
    content["training"]["label_smoothing_factor"] = 0.1
    with pytest.raises(ValueError, match="label_smoothing_factor is 0.1"):
        run_star(parse_recipe(content), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_last_fine_tuning_is_checked_as_the_first(base, tmp_path):
    content = recipe_content(base, iterations=3)
    content["training"]["seed"] = 2**32 - 3
    with pytest.raises(UserError, match="training.seed is 4294967296; expected a number of at least 0"):
        run_star(parse_recipe(content), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_evaluation_and_limits_are_not_the_fine_tuning_s(base, tmp_path, monkeypatch):
    scripted(monkeypatch, solves_even_sums)
    content = recipe_content(base, iterations=1)
    content["training"]["eval_strategy"] = "steps"
    content["data"]["max_train_blocks"] = 1
    run_star(parse_recipe(content), tmp_path / "run", progress=False)
    inner = loop._Loop(parse_recipe(content), tmp_path, None, "cpu", 7, False).training_recipe(1)
    assert inner.training["eval_strategy"] == "no" and inner.data.max_train_blocks is None


def test_rows_that_are_too_long_are_left_out_and_counted(base, tmp_path, monkeypatch):
    def long_for_even_tens(prompt: str) -> tuple[str, bool]:
        problem, _ = sum_of(prompt)
        text, ended = solves_even_sums(prompt)
        return ("x " * 150 if (problem.a + problem.b) % 10 == 0 else "") + text, ended

    scripted(monkeypatch, long_for_even_tens)
    recipe = parse_recipe(recipe_content(base, iterations=1))
    row = run_star(recipe, tmp_path / "run", progress=False).metrics["rows"][1]
    learnt = read_lines(tmp_path / "run" / "iteration-01" / "train.jsonl")
    assert row["too_long"] > 0 and not any("x x" in each["completion"] for each in learnt)
    assert sum(row["learnt_from"].values()) == len(learnt) == row["kept"] - row["too_long"]
    scripted(monkeypatch, lambda prompt: ("x " * 150 + solves_even_sums(prompt)[0], True))
    with pytest.raises(
        UserError, match=r"block_size is 128 and none of the \d+ completions to learn from"
    ):
        run_star(recipe, tmp_path / "other", progress=False)


def test_lengths_of_hinted_and_of_test_prompts_count(base):
    content = recipe_content(base)
    task = build_task(parse_recipe(content))
    longest = max(task.test, key=lambda problem: len(problem.prompt))

    def checked(room: int, **star) -> None:
        recipe = parse_recipe(recipe_content(base, max_new_tokens=room, **star))
        loop._Loop(recipe, base, build_task(recipe), "cpu", 7, False).check()

    writer = loop._Loop(parse_recipe(content), base, task, "cpu", 7, False)._writer_of(0)
    plain = writer.lengths([{"prompt": longest.prompt, "completion": ""}])[0] - 1
    room = 256 - plain
    checked(room, rationalize=False)
    with pytest.raises(
        UserError, match="^the longest problem with its hint has .* expected at most 256"
    ):
        checked(room)
    task.test[0] = type(longest)("long", longest.prompt * 60, "", "1")
    with pytest.raises(UserError, match="^the longest problem has .* expected at most 256"):
        writer.check_lengths(128)


def test_the_original_model_is_the_same_for_all(base, tmp_path, monkeypatch):
    """The mixing head is drawn at random: by whoever writes, and before each fine-tuning."""
    content = recipe_content(base)
    content["thoughts"] = {"thought_length": 2, "talk_length": 2}
    each = loop._Loop(parse_recipe(content), tmp_path, None, "cpu", 7, False)
    each.task = build_task(each.recipe)
    seen = []

    def stopped(self, **kwargs):
        seen.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        raise Killed

    monkeypatch.setattr("quietstar.training.trainer.QuietStarTrainer.train", stopped)
    problems = each.task.problems(1)[:20]
    kept = loop.keep_data(problems, 1)
    writer_of = each._writer_of
    monkeypatch.setattr(each, "_writer_of", lambda number: writer_of(0))  # there is no model 1
    for number in (1, 2):
        torch.rand(number)
        each.folder(number).mkdir()
        each._forget()
        with pytest.raises(Killed):
            each._fine_tune(number, kept)
    each._forget()
    torch.rand(3)
    written_by = writer_of(0)._model.state_dict()
    assert len(seen) == 2 and any("mixing" in name for name in written_by)
    for state in seen:
        assert all(torch.equal(tensor, written_by[name]) for name, tensor in state.items())


def test_a_section_of_defaults_is_one(base, tmp_path):
    content = recipe_content(base)
    content["star"] = {"iterations": 16, "digits": 5}
    recipe = parse_recipe(content)
    assert recipe.star.is_given() and recipe.changed(name="x").star.is_given()
    content["star"] = None
    content["data"] = {"files": ["x.jsonl"], "prompt": "{Q}", "completion": "{A}", "packing": "packed"}
    assert "star" not in parse_recipe(content).to_dict()
    older = dataclasses.asdict(StarSection())  # as it is in the folder of a training from before
    del older["steps_added"]
    assert "star" not in parse_recipe({**content, "star": older}).to_dict()
    with pytest.raises(UserError, match="has no section star, which `quietstar star` needs"):
        run_star(parse_recipe(content), tmp_path / "run", progress=False)


def test_a_run_goes_on_with_its_own_data_alone(base, tmp_path, monkeypatch):
    """What is written already belongs to the problems of then."""
    scripted(monkeypatch, lambda prompt: (f" {2 * int(prompt.split()[1])}", True))
    content = recipe_content(base, answer="number", rationalize=False, iterations=1, test_problems=2)
    del content["star"]["digits"], content["star"]["problems"]
    file = tmp_path / "numbers.jsonl"
    content["data"] = {"files": [str(file)], "prompt": "Twice {n}\nA:", "completion": " {m}"}
    content["data"] |= {"packing": "packed", "block_size": 64}

    def saved(*numbers: int) -> None:
        file.write_text("".join(json.dumps({"n": n, "m": 2 * n}) + "\n" for n in numbers))

    saved(1, 2, 3, 4, 5)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "keep", dies)
        with pytest.raises(Killed):
            run_star(parse_recipe(content), tmp_path / "run", progress=False)
    written = (tmp_path / "run" / "iteration-01" / "written.jsonl").read_bytes()
    for numbers, counts in (((1, 2, 4, 3, 5), "3 problems"), ((1, 2, 3, 4, 5, 6), "4 problems")):
        saved(*numbers)
        said = f"not those that the run in .* began with .3 problems, 2 held out, .* then, {counts}"
        with pytest.raises(UserError, match=said):
            run_star(parse_recipe(content), tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "iteration-01" / "written.jsonl").read_bytes() == written
    saved(1, 2, 3, 4, 5)
    rows = run_star(parse_recipe(content), tmp_path / "run", progress=False).metrics["rows"]
    assert rows[1]["kept"] == 3
    saved(1, 2, 3, 4, 5, 6)
    again = run_star(parse_recipe(content), tmp_path / "run", overwrite=True, progress=False)
    assert again.metrics["rows"][1]["kept"] == 4


def dies(*args, **kwargs):
    raise Killed


def test_killed_while_it_is_overwritten_a_run_ends_the_same(base, tmp_path, monkeypatch):
    """Nothing half removed is taken for what is left of it."""
    scripted(monkeypatch, solves_even_sums)
    recipe = parse_recipe(recipe_content(base))
    metrics = run_star(recipe, tmp_path / "run", progress=False).metrics
    before = sorted((tmp_path / "run").rglob("*"))
    rmtree = loop.shutil.rmtree

    def dies_within(path):
        for inner in Path(path).glob("model"):
            rmtree(inner)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop.shutil, "rmtree", dies_within)
        with pytest.raises(Killed):
            run_star(recipe, tmp_path / "run", overwrite=True, progress=False)
    assert run_star(recipe, tmp_path / "run", progress=False).metrics["rows"] == metrics["rows"]
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_a_run_does_not_take_the_folder_of_the_other_command(base, tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, solves_even_sums)
    path, run = tmp_path / "small.yaml", tmp_path / "run"
    path.write_text(json.dumps(recipe_content(base, iterations=1)))
    words = ["star", path, "--quiet", "--overwrite", "--output"]
    assert cli.main([str(word) for word in (*words, run)]) == 0
    model = run / "iteration-01" / "model"
    rejected(capsys, [*words, model], "belongs to a run of `quietstar train`, whose files would stay")
    inner = model / "recipe.yaml"
    train = ["train", inner, "--quiet", "--overwrite", "--output", run]
    rejected(capsys, train, "belongs to a run of `quietstar star`, whose files would stay beside")
    said = f"{run} holds no model (no config.json); there is one in {model}"
    rejected(capsys, ["generate", run, "1"], said)


def test_overwritten_a_run_is_no_longer_done_before_it_loses_anything(base, tmp_path, monkeypatch):
    scripted(monkeypatch, solves_even_sums)
    recipe = parse_recipe(recipe_content(base, iterations=1))
    run_star(recipe, tmp_path / "run", progress=False)
    monkeypatch.setattr(loop.shutil, "rmtree", dies)
    with pytest.raises(Killed):
        run_star(recipe, tmp_path / "run", overwrite=True, progress=False)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_hints_in_shots_where_it_rationalizes(base, tmp_path, monkeypatch):
    asked = scripted(monkeypatch, solves_even_sums_behind_shots)
    shot = Sum(1, 2, 1)
    shots = [{"prompt": scratch_prompt(shot), "completion": worked(shot)}]
    model = save_base(tmp_path / "long", max_position_embeddings=512)
    recipe = parse_recipe(recipe_content(model, shots=shots, iterations=1))
    run_star(recipe, tmp_path / "run", progress=False)
    for prompt in asked:
        hinted = sum_of(prompt.rpartition("\n\n")[2])[1]
        assert prompt.startswith(hinted_prompt(shot) if hinted else scratch_prompt(shot))
    assert any(prompt.startswith(hinted_prompt(shot)) for prompt in asked)


def solves_even_sums_behind_shots(prompt: str) -> tuple[str, bool]:
    return solves_even_sums(prompt.rpartition("\n\n")[2])


def test_pauses_are_not_written(base):
    each = loop._Loop(parse_recipe(recipe_content(base)), base, None, "cpu", 7, False)
    writer = each._writer_of(0)
    add_pause_tokens(writer._tokenizer, 2)
    again = Writer(writer._model, writer._tokenizer, each.task, each.star, 0)
    assert set(pause_ids(writer._tokenizer)) <= set(again._meta)


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_it_writes_as_it_trains(base, bf16: bool, dtype: torch.dtype):
    recipe = parse_recipe(recipe_content(base)).changed(training={"bf16": bf16})
    each = loop._Loop(recipe, base, None, "cpu", 7, False)
    writer = each._writer_of(0)
    found = set()
    layer = writer._model.get_submodule("model.layers.0.mlp.up_proj")
    layer.register_forward_hook(lambda module, args, output: found.add(output.dtype))
    writer._texts([[1, 2, 3]], 0.0, 0)
    assert found == {dtype}
