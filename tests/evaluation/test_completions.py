"""The probability of any completion: by the model's own losses, alone and beside others."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_cases import GSM_ROWS, run
from small_recipes import rejected

from quietstar.data.pairs import encode_pair
from quietstar.evaluation.completions import (
    CompletionThoughts,
    _scores,
    load_items,
    score_completions,
)
from quietstar.evaluation.perplexity import undisturbed

ITEMS = [
    {"prompt": "Q: 1 2 3\nA:", "completion": " 18\n"},
    {"prompt": "Q: 4\nA:", "completion": " 5 6 7 and more\n"},
    {"prompt": "A long question before it Q: 9\nA:", "completion": " A\n"},
]


@pytest.mark.parametrize("rule", ["all", "completion"])
def test_scores_are_the_model_s_losses(model, merging, rule: str):
    """With a thought before every token, or one at the completion's start whose talk goes on from it."""
    with undisturbed(model, think_at=rule, talk_length=3):
        found = score_completions(model, merging, ITEMS)
        for item, record in zip(ITEMS, found, strict=True):
            row = encode_pair(merging, item["prompt"], item["completion"])
            ids = torch.tensor([row["input_ids"][:-1]])
            labels = torch.tensor([row["labels"][:-1]])
            start, (anchor,) = row["labels"].count(-100), row["completion_anchors"]
            count = ids.shape[1] - start
            at = [[anchor]] if rule == "completion" else [list(range(start - 1, ids.shape[1] - 1))]
            output = model(ids, labels=labels, anchors=torch.tensor(at))
            base = output.base_losses[0, start - 1 :].tolist()
            mixed = list(base)
            if rule == "completion":
                own = output.talk_losses[:, 0, 0, 0].tolist()[: ids.shape[1] - 1 - anchor]
                mixed = mixed[: anchor - start + 1] + own + base[anchor - start + 1 + len(own) :]
            else:
                mixed = output.talk_losses[0, 0, 0].tolist()
            assert len(mixed) == len(base) == count
            for name, losses in (("base", base), ("mixed", mixed)):
                # The meta tokens have no probability here.
                assert record[f"{name}_nll"] == pytest.approx(sum(losses), rel=0.03)
                assert record[f"{name}_probability"] == pytest.approx(math.exp(-record[f"{name}_nll"]))
        assert any(abs(r["base_nll"] - r["mixed_nll"]) > 1e-3 for r in found)
        alone = [score_completions(model, merging, [item])[0] for item in ITEMS]
        for ours, theirs in zip(found, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


def test_the_mean_over_several_thoughts(model, merging):
    """It is that of the probabilities with each alone; and what greedy decoding of it writes."""
    with undisturbed(model, think_at="completion", talk_length=3):
        several = CompletionThoughts(temperature=1.0, seed=3, count=4)
        found = score_completions(model, merging, ITEMS, several)
        assert several.ids is not None and several.ids.shape[:2] == (3, 4)
        assert not torch.equal(several.ids[:, 0], several.ids[:, 1])
        each = [
            score_completions(model, merging, ITEMS, CompletionThoughts(ids=several.ids[:, [number]]))
            for number in range(4)
        ]
        given = score_completions(model, merging, ITEMS, CompletionThoughts(ids=several.ids))
    for number, record in enumerate(found):
        alone = [records[number]["mixed_probability"] for records in each]
        assert max(alone) > 1.001 * min(alone)
        assert record["mixed_probability"] == pytest.approx(sum(alone) / 4, rel=1e-4)
        assert record["mixed_nll"] == pytest.approx(-math.log(sum(alone) / 4), rel=1e-4)
        assert record["base_nll"] == pytest.approx(each[0][number]["base_nll"], rel=1e-5)
        assert given[number] == pytest.approx(record, rel=1e-4)
    with pytest.raises(ValueError, match="count is 2, temperature 0.0; expected count 1"):
        CompletionThoughts(count=2)


def test_what_greedy_decoding_of_a_mean_writes():
    """The first tokens say which thought to believe: .9 * .9 of two thoughts, one of which is sure that
    the first token is another."""
    chances = torch.tensor([[[0.9, 0.1], [0.9, 0.1]], [[0.2, 0.8], [0.01, 0.99]]])
    for true, is_first in ((torch.tensor([0, 0]), True), (torch.tensor([0, 1]), False)):
        found = _scores(None, chances.log(), true)
        assert found["correct"] == is_first
        wanted = chances.gather(2, true.expand(2, -1)[..., None])[..., 0].prod(1).mean()
        assert found["probability"] == pytest.approx(float(wanted))


def test_a_plain_decoder_and_a_model_without_thoughts(model, merging):
    with undisturbed(model, thought_kind="none"):
        bare = score_completions(model, merging, ITEMS)
        plain = score_completions(model.base, merging, ITEMS)
    assert set(bare[0]) == set(plain[0]) == {"base_nll", "base_probability", "base_correct"}
    whole = score_completions(model, merging, ITEMS)
    for ours, theirs, other in zip(bare, whole, plain, strict=True):
        assert ours["base_nll"] == pytest.approx(theirs["base_nll"], rel=1e-4)
        assert ours["base_nll"] == pytest.approx(other["base_nll"], rel=0.03)


def test_a_completion_that_greedy_decoding_writes(model, merging):
    with undisturbed(model, thought_kind="none"):
        ids = torch.tensor([merging("Q: 1\nA:")["input_ids"]])
        logits = model(ids).logits[0, -1]
        logits[[model.config.start_token_id, model.config.end_token_id]] = -torch.inf
        texts = merging.batch_decode(logits.argsort(descending=True)[:, None])
        order = [t for t in texts if len(merging(t)["input_ids"]) == 1 and t.strip()]
        found = score_completions(
            model, merging, [{"prompt": "Q: 1\nA:", "completion": text} for text in order[:2]]
        )
    best = texts[0] == order[0]
    assert [record["base_correct"] for record in found] == [best, False]
    assert found[0]["base_probability"] > found[1]["base_probability"]


def test_the_command(folder: str, gsm_file: Path, tmp_path, capsys):
    output = tmp_path / "out.json"
    words: list[Any] = [folder, "--tasks", "completions", "--data", gsm_file, "--output", output]
    assert run(*words, "--preset", "gsm8k", "--limit", 4) == 0
    assert "completions: 4 items, mean [95% interval]" in capsys.readouterr().out
    found = json.loads(output.read_text())["tasks"]["completions"]
    assert list(found) == ["items", "probability", "exact_match", "nll"]
    assert set(found["nll"]) == {"base", "mixed", "gain"}
    own = ["--prompt", "Q: {question}\nA:", "--completion", " {answer:final}\n"]
    assert run(*words[:-1], tmp_path / "own.json", *own, "--limit", 4) == 0
    assert json.loads((tmp_path / "own.json").read_text())["tasks"]["completions"] == found


def test_drawn_thoughts(folder: str, gsm_file: Path, tmp_path, capsys):
    """The command's mean over several, of a model that thinks at completions; from a seed."""
    once = tmp_path / "once"
    shutil.copytree(folder, once)
    config = json.loads((once / "config.json").read_text())
    (once / "config.json").write_text(json.dumps({**config, "think_at": "completion"}))
    words: list[Any] = [once, "--tasks", "completions", "--data", gsm_file, "--preset", "gsm8k"]
    found = []
    for number, more in enumerate(([], *(["--thoughts", 3, "--seed", seed] for seed in (1, 1, 2)))):
        output = tmp_path / f"{number}.json"
        assert run(*words, *more, "--output", output) == 0
        found.append(json.loads(output.read_text())["tasks"]["completions"])
    assert "completions: 6 items, 3 drawn thoughts, mean" in capsys.readouterr().out
    nll = [each["nll"]["mixed"]["mean"] for each in found]
    assert len(set(nll)) == 3 and found[1] == found[2] and found[1]["thoughts"] == 3
    assert found[0]["nll"]["base"] == found[1]["nll"]["base"]
    (once / "config.json").write_text(
        json.dumps({**config, "think_at": "completion", "thought_temperature": 0.0})
    )
    said = (
        "--thoughts is 3, of a model whose thought_temperature is 0; its thoughts would all be the same"
    )
    rejected(
        capsys, ["eval", *words, "--thoughts", 3, "--output", tmp_path / "x.json"], said, alone=False
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "task completions has no data set of its own; expected --data FILE"),
        (
            ["--data", "gsm.jsonl"],
            "task completions has no templates; expected --preset, or --prompt and",
        ),
        (
            ["--data", "gsm.jsonl", "--prompt", "{question}"],
            "data.prompt is given without data.completion",
        ),
        (["--data", "gsm.jsonl", "--preset", "gsm8k", "--limit", "0"], "--limit is 0"),
        (["--data", "gsm.jsonl", "--preset", "gsm8k", "--thoughts", "0"], "--thoughts is 0; expected"),
        (
            ["--data", "gsm.jsonl", "--preset", "gsm8k", "--thoughts", "2"],
            "--thoughts is 2, of a model that does not think at completions alone; expected one that",
        ),
        (["--data", "gsm.jsonl", "--preset", "svamp"], "line 1 has no column 'Body' for data.prompt"),
        (
            ["--data", "gsm.jsonl", "--preset", "gsm8k", "--max-length", "4"],
            "tokens; expected at most 4 (--max-length) (and 5 more that cannot be used)",
        ),
    ],
)
def test_wrong_words(folder: str, gsm_file: Path, words: list[str], said: str, capsys):
    words = [str(gsm_file) if word == "gsm.jsonl" else word for word in words]
    rejected(capsys, ["eval", folder, "--tasks", "completions", *words, "--quiet"], said, alone=False)


def test_items_that_are_too_long_are_left_out(gsm_file: Path, merging, caplog):
    rows = [{**GSM_ROWS[0], "question": "word " * 200}, *GSM_ROWS]
    gsm_file.write_text("\n".join(map(json.dumps, rows)))
    items = load_items(merging, gsm_file, {"preset": "gsm8k"}, 128)
    assert len(items) == len(GSM_ROWS) and "expected at most 128" in caplog.records[0].getMessage()
