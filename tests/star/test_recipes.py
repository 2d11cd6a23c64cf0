"""The recipes that are shipped for STaR: read, planned, and their prompts on real rows."""

import dataclasses
import io
import re
import shlex
from pathlib import Path

import pytest
from real_data import real_data
from rich.console import Console

from quietstar.errors import UserError
from quietstar.plan.table import print_plan
from quietstar.recipes.recipe import load_recipe, parse_recipe
from quietstar.recipes.star_section import StarSection
from quietstar.star.answers import extractor
from quietstar.star.problems import OfData, Sums, build_task
from quietstar.star.writing import shots_text
from quietstar.values import load_yaml

PAGE = Path(__file__).parents[2] / "docs" / "star.md"


def test_svamp_is_planned():
    folder = real_data("hf_configs") / "SmolLM2-135M"
    recipe = load_recipe("star-svamp", [f"model.name={folder}"])
    out = io.StringIO()
    print_plan(Console(file=out, width=200), recipe, 24e9, "24G")
    assert "as the recipe says" in out.getvalue()


def test_svamp_s_problems():
    folder = real_data("svamp")
    words = [f"data.files={folder / 'train.jsonl'}", f"data.eval_files={folder / 'test.jsonl'}"]
    recipe = load_recipe("star-svamp", [*words, "data.name=null"])
    task = build_task(recipe)
    held_out = len((folder / "test.jsonl").read_text().splitlines())
    assert isinstance(task, OfData) and len(task.test) == min(held_out, recipe.star.test_problems)
    first = task.problems(1)[0]
    assert first.answer == "51" and first.kind == "Subtraction" and first.prompt.endswith("\nAnswer:")
    assert task.hinted(first) == first.prompt.removesuffix("\nAnswer:") + " (51)\nAnswer:"
    # A shot is a problem like the others, with the equation before the answer.
    for shot in recipe.star.shots or ():
        assert shot["prompt"].startswith("Question: ") and shot["prompt"].endswith("\nAnswer:")
        left, _, right = shot["completion"].strip(" ()\n").partition(")")
        terms, _, result = left.partition(" = ")
        assert (
            eval(terms) == int(result) == int(task.find_answer(shot["completion"]) or "") == int(right)
        )
    assert shots_text(recipe.star).endswith(" (24 / 3 = 8) 8\n\n")


@pytest.mark.parametrize(
    ("preset", "file", "answer", "hint"),
    [
        ("gsm8k-steps", "gsm8k/train.jsonl", "final", " (72)\nA:"),
        ("csqa", "commonsenseqa/train.jsonl", "letter", "(A) ignore (CORRECT)\n"),
    ],
)
def test_question_sets(preset: str, file: str, answer: str, hint: str):
    path = real_data(file)
    words = ["data.name=null", "data.eval_split=null", f"data.preset={preset}", f"data.files={path}"]
    words += [f"star.answer={answer}", "star.hint=null", "star.problem_class=null", "star.problems=50"]
    task = build_task(load_recipe("star-svamp", [*words, "star.shots=null"]))
    assert hint in task.hinted(task.test[0])
    problems = task.problems(1)
    assert len(problems) == 50 and problems == task.problems(1) != task.problems(2)
    assert not {p.name for p in problems} & {p.name for p in task.test}


def test_sums_are_new_in_every_iteration():
    task = build_task(load_recipe("star-sums"))
    assert isinstance(task, Sums)
    first, second = ({p.name for p in task.problems(n) if p.kind == "4 digits"} for n in (1, 2))
    assert len(first) == 250 and first != second and not first & {p.name for p in task.test}
    assert first == {p.name for p in task.problems(1) if p.kind == "4 digits"}
    assert [sum(p.kind.startswith(str(n)) for p in task.test) for n in range(1, 6)] == [100] * 5


def test_steps_are_added_by_a_key_of_their_own():
    star = load_recipe("star-sums", ["star.steps_added=+30"]).star
    assert [star.steps(n) for n in (1, 2, 3)] == [160, 190, 220]
    words = ["star.steps_added=null", "star.step_growth=+20"]  # a factor of 20 to YAML
    with pytest.raises(UserError, match="step_growth is 20.*at most 5; star.steps_added adds a number"):
        load_recipe("star-sums", words)


def test_the_examples_of_the_docs():
    """The recipe can be read, and so can the training on kept rationales."""
    text = PAGE.read_text(encoding="utf-8")
    block = text.partition("## A recipe")[2].partition("```yaml\n")[2].partition("```")[0]
    recipe = parse_recipe(load_yaml(block, "docs/star.md"))
    (shot,) = recipe.star.shots or []
    assert extractor(str(recipe.star.answer))(shot["completion"]) == "12"
    (command,) = re.findall(r"```bash\n(quietstar train .*?)```", text, flags=re.S)
    words = shlex.split(command.replace("\\\n", " "))
    training = load_recipe(words[2], words[3:])
    assert training.data.prompt == "{prompt}" and training.thoughts["think_at"] == "completion"
    assert training.data.files == ["quietstar-runs/star-svamp/iteration-*/kept.jsonl"]


def test_every_setting_is_in_the_docs():
    text = PAGE.read_text(encoding="utf-8")
    missing = [f.name for f in dataclasses.fields(StarSection) if f"`{f.name}`" not in text]
    assert not missing
