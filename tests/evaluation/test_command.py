"""``quietstar eval``: items, the journal, resumption, errors, several processes."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from evaluation_cases import CSQA_ROWS, GSM_ROWS, run
from real_data import real_data
from small_recipes import rejected, run_python

from quietstar import QuietStarForCausalLM
from quietstar.cli import app as cli
from quietstar.errors import UserError
from quietstar.evaluation import reasoning
from quietstar.evaluation.items import load_rows
from quietstar.evaluation.journal import Journal
from quietstar.evaluation.run import assign_files, fingerprint
from quietstar.evaluation.tasks import OWN, Settings


def test_items_of_local_files(tmp_path, gsm_file: Path, csqa_file: Path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(CSQA_ROWS), tmp_path / "csqa.parquet")
    options = {"hub_name": "openai/gsm8k", "hub_config": "main", "split": "test"}
    assert load_rows(GSM_ROWS[0], data=gsm_file, **options) == GSM_ROWS
    for path in (csqa_file, tmp_path / "csqa.parquet"):
        assert load_rows(CSQA_ROWS[0], data=path, **options) == CSQA_ROWS
    rows = load_rows(("question",), data=gsm_file, limit=2, **options)
    assert rows == [{"question": row["question"]} for row in GSM_ROWS[:2]]
    with pytest.raises(
        UserError, match="1 has no column 'answerKey'; its columns are: answer, question"
    ):
        load_rows(("question", "answerKey"), data=gsm_file, **options)


def test_items_that_cannot_be_used(tmp_path, caplog):
    """They are left out and counted, whatever is wrong with them; a limit counts the others."""
    good = [{"question": f"{n} plus {n}?", "answer": f"so #### {2 * n}"} for n in range(4)]
    bad = [
        '{"question": "cut off',
        '{"question": "no answer"}',
        '{"question": "half a pair \\ud83d", "answer": "#### 1"}',
        '{"question": "none", "answer": "I do not know"}',
        "[1]",
    ]
    lines = [json.dumps(good[0]), *bad, *(json.dumps(row) for row in good[1:])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    task = OWN["gsm8k-cot"]("gsm8k-cot", Settings(data=tmp_path / "a.jsonl", limit=3))
    assert task.items(None) == good[:3]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and "a.jsonl, line 2 is not JSON" in said[0] and "(3 so far)" in said[2]
    (tmp_path / "b.jsonl").write_text("\n".join(bad[3:]))
    with pytest.raises(UserError, match=r"line 1 cannot be used: answer .* \(and 1 more"):
        OWN["gsm8k-cot"]("gsm8k-cot", Settings(data=tmp_path / "b.jsonl")).items(None)


def test_hub_items_have_the_same_columns(monkeypatch, merging):
    import datasets

    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(GSM_ROWS if "gsm8k" in name else CSQA_ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(OWN["gsm8k"]("gsm8k", Settings(limit=4)).items(merging)) == 4
    assert OWN["csqa"]("csqa", Settings()).items(merging)[1]["answerKey"] == "B"
    assert asked == [("openai/gsm8k", "main", "test"), ("tau/commonsense_qa", None, "validation")]


def test_commonsense_qa_in_its_own_layout(tmp_path, csqa_file: Path, merging):
    """The same items as those of the hub's columns, so that a journal of either serves the other."""
    own = [
        {
            "id": row["id"],
            "answerKey": row["answerKey"],
            "question": {
                "stem": row["question"],
                "question_concept": "plate",
                "choices": [
                    {"label": label, "text": text}
                    for label, text in zip(*row["choices"].values(), strict=True)
                ],
            },
        }
        for row in CSQA_ROWS
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, own)))
    found = OWN["csqa"]("csqa", Settings(data=path)).items(merging)
    assert found == OWN["csqa"]("csqa", Settings(data=csqa_file)).items(merging)
    for key, value, said in (
        (
            "question",
            {"stem": 3},
            r"cannot be used: choices is .*; expected \{'label'|choices are labelled",
        ),
        ("question", {"choices": own[0]["question"]["choices"]}, "question is None; expected text"),
        ("answerKey", "F", "answerKey is 'F'; expected one of A, B"),
        ("question", "flat", "has no column 'choices'; its columns are: answerKey, id, question"),
    ):
        path.write_text(json.dumps({**own[0], key: value}))
        with pytest.raises(UserError, match=said):
            OWN["csqa"]("csqa", Settings(data=path)).items(merging)


def test_svamp(tmp_path, folder: str, capsys):
    rows = [
        {"Body": f"Tom has {n} apples", "Question": "How many?", "Answer": float(n)} for n in range(4, 8)
    ]
    path = tmp_path / "svamp.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "Answer": "many"}])))
    assert reasoning.svamp_text(rows[0]) == (
        "Question: Tom has 4 apples. How many?\nAnswer:",
        " 4\n",
    )
    output = tmp_path / "out.json"
    assert run(folder, "--tasks", "svamp", "--data", path, "--output", output) == 0
    shown = capsys.readouterr()
    assert "svamp: 4 items, zero-shot" in shown.out
    found = json.loads(output.read_text())["tasks"]["svamp"]
    assert set(found["exact_match"]) == set(found["probability"]) == {"base", "mixed", "gain"}


@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("svamp", "svamp/test.jsonl"),
        ("csqa", "commonsenseqa/dev.jsonl"),
        ("gsm8k", "gsm8k/test.jsonl"),
    ],
)
def test_published_files(task: str, file: str, merging):
    path = real_data(file)
    items = OWN[task](task, Settings(data=path, max_length=4000)).items(merging)
    assert len(items) == len(path.read_text().splitlines())


def test_the_journal_finds_its_items(tmp_path):
    output = tmp_path / "out.json"
    one, other = Journal.key("run", {"a": 1}), Journal.key("other run", {"a": 1})
    assert one != other
    Journal(output).add([(one, {"x": 1})])
    Journal(output, process=1).add([(other, {"x": 2})])
    with Journal(output).path.open("a") as file:
        file.write('{"key": "cut off')
    journal = Journal(output)
    assert journal.found == {one: {"x": 1}, other: {"x": 2}}
    journal.add([("third", {"x": 3})])
    assert len(Journal(output).found) == 3


def test_the_fingerprint_knows_the_weights(model: QuietStarForCausalLM, folder: str):
    same = QuietStarForCausalLM.from_pretrained(folder)
    assert fingerprint(model) == fingerprint(same)
    with torch.no_grad():
        same.mixing_head.fc3.weight *= 1.01
    assert fingerprint(model) != fingerprint(same)


def test_the_command(folder: str, gsm_file: Path, csqa_file: Path, tmp_path, capsys):
    output = tmp_path / "out.json"
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 9)
    words = [folder, "--tasks", "gsm8k,csqa,gsm8k-cot,perplexity", "--output", output]
    words += ["--data", f"gsm8k={gsm_file}", "--data", f"csqa={csqa_file}", "--limit", 3]
    words += ["--data", f"perplexity={text}", "--block-size", 32, "--votes", 2, "--max-new-tokens", 4]
    assert run(*words) == 0
    shown = capsys.readouterr().out
    for part in ("gsm8k: 3 items", "csqa: 3 items", "maj@2", "decile 10", "pause tokens", str(output)):
        assert part in shown
    found = json.loads(output.read_text())
    assert list(found["tasks"]) == ["gsm8k", "csqa", "gsm8k-cot", "perplexity"]
    assert set(found["tasks"]["csqa"]["accuracy"]) == {"base", "mixed", "gain"}
    lines = (tmp_path / "out.json.items.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 4


def test_a_plain_decoder_gives_the_column_without_thoughts(
    folder: str, model: QuietStarForCausalLM, merging, gsm_file: Path, csqa_file: Path, tmp_path, capsys
):
    """The same numbers as of the model with thoughts around it, from the same file of the same form."""
    decoder = copy.deepcopy(model.base)
    decoder.set_attn_implementation("sdpa")
    decoder.save_pretrained(tmp_path / "plain")
    merging.save_pretrained(tmp_path / "plain")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 9)
    words = ["--tasks", "gsm8k,csqa,gsm8k-cot,perplexity", "--data", f"gsm8k={gsm_file}"]
    words += ["--data", f"csqa={csqa_file}", "--data", f"perplexity={text}", "--block-size", 32]
    words += ["--limit", 3, "--votes", 2, "--max-new-tokens", 4]
    found = {}
    for name, more in ((folder, ["--thinking", "never"]), (tmp_path / "plain", [])):
        output = tmp_path / "out.json"
        assert run(name, *words, *more, "--output", output) == 0
        found[name] = json.loads(output.read_text())
    shown = capsys.readouterr().out.rpartition("gsm8k: 3 items")[2]
    assert "no thought" in shown and "with thoughts" not in shown and "pause" not in shown
    thinking, plain = found[folder], found[tmp_path / "plain"]
    assert plain.keys() == thinking.keys()
    for task, measures in (
        ("gsm8k", ["probability", "exact_match"]),
        ("csqa", ["probability", "accuracy"]),
    ):
        for measure in measures:
            theirs, ours = (f["tasks"][task][measure] for f in (thinking, plain))
            assert list(ours) == ["base"]
            assert ours["base"] == pytest.approx(theirs["base"], rel=1e-4)
    theirs, ours = (f["tasks"]["perplexity"] for f in (thinking, plain))
    assert list(ours["nll"]) == ["base"] and ours["gain"] == {}
    assert ours["nll"]["base"] == pytest.approx(theirs["nll"]["base"], rel=1e-5)
    assert [d["base"]["mean"] for d in ours["nll_by_decile"]] == pytest.approx(
        [d["base"]["mean"] for d in theirs["nll_by_decile"]], rel=1e-4
    )
    assert plain["tasks"]["gsm8k-cot"]["thinking"] == "never"
    lines = (tmp_path / "out.json.items.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 3 * 4  # the two models share the journal's file, not its records
    rejected(
        capsys,
        ["eval", tmp_path / "plain", *words, "--thinking", "every:2"],
        "plain is a model without thoughts (llama)",
        alone=False,
    )


def test_an_interrupted_command_continues(folder: str, gsm_file: Path, tmp_path, monkeypatch, capsys):
    """Stopped after two batches, the same command scores the rest only, and the result is the same."""
    words = [folder, "--tasks", "gsm8k", "--data", gsm_file, "--batch-size", 2]
    assert run(*words, "--output", tmp_path / "whole.json") == 0
    real, scored = reasoning.score_answers, []

    def counted(model, items, *rest):
        if len(scored) == stop:
            raise KeyboardInterrupt
        scored.append(len(items))
        return real(model, items, *rest)

    monkeypatch.setattr(reasoning, "score_answers", counted)
    stop = 2
    assert run(*words, "--output", tmp_path / "out.json") == 130
    assert not (tmp_path / "out.json").exists()
    stop = 99
    assert run(*words, "--output", tmp_path / "out.json") == 0
    assert scored == [2, 2, 2]
    whole, resumed = (json.loads((tmp_path / f).read_text()) for f in ("whole.json", "out.json"))
    assert whole == resumed
    # Other settings are another run, a smaller limit is not.
    assert run(*words, "--output", tmp_path / "out.json", "--limit", 3) == 0
    assert len(scored) == 3
    assert run(*words, "--output", tmp_path / "out.json", "--max-length", 200) == 0
    assert len(scored) == 6
    capsys.readouterr()


@pytest.mark.parametrize(
    "words, message",
    [
        # Lists the tasks of lm-evaluation-harness.
        pytest.param(
            ["--tasks", "gsm8kk"], "unknown task 'gsm8kk', did you mean gsm8k?", marks=pytest.mark.slow
        ),
        (["--tasks", ","], "--tasks is ','"),
        (["--tasks", "gsm8k", "--data", "missing.json"], "missing.json does not exist"),
        (["--tasks", "gsm8k,csqa", "--data", "x.json"], "expected TASK=FILE"),
        (["--tasks", "gsm8k", "--data", "csqa=x.json"], "csqa, which is not among --tasks"),
        (["--tasks", "perplexity", "--block-size", "1"], "--block-size is 1"),
        (["--tasks", "perplexity", "--limit", "0"], "--limit is 0"),
        (["--tasks", "perplexity", "--batch-size", "0"], "--batch-size is 0"),
        (["--tasks", "perplexity", "--votes", "0"], "votes is 0"),
    ],
)
def test_wrong_words(folder: str, words: list[str], message: str, capsys):
    rejected(capsys, ["eval", folder, *words, "--quiet"], message, alone=False)


def test_without_the_harness(folder: str, monkeypatch, capsys):
    for name in ("lm_eval", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "quietstar.evaluation.harness", raising=False)
    assert run(folder, "--tasks", "perplexty") == cli.USER_ERROR
    shown = capsys.readouterr().err
    assert "unknown task 'perplexty', did you mean perplexity?" in shown
    assert "pip install 'quietstar[eval]'" in shown


def test_files_per_task(gsm_file: Path):
    both = ["gsm8k", "gsm8k-cot"]
    assert assign_files([f"gsm8k={gsm_file}"], both) == dict.fromkeys(both, gsm_file)
    assert assign_files([str(gsm_file)], ["gsm8k-cot"]) == {"gsm8k-cot": gsm_file}


@pytest.mark.slow
def test_two_processes_share_the_items(folder: str, gsm_file: Path, tmp_path):
    """Half of the items each, one result, equal to that of one process but for rounding."""
    words = ["eval", folder, "--tasks", "gsm8k", "--data", str(gsm_file), "--quiet", "--device", "cpu"]
    assert cli.main([*words, "--output", str(tmp_path / "one.json")]) == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run_python(*launch, "-m", "quietstar", *words, "--output", "two.json", cwd=tmp_path)
    assert done.stdout.count("gsm8k: 6 items") == 1
    for name in ("two.json.items.jsonl", "two.json.items1.jsonl"):
        assert len((tmp_path / name).read_text().splitlines()) == 3
    one, both = (
        json.loads((tmp_path / f).read_text())["tasks"]["gsm8k"] for f in ("one.json", "two.json")
    )
    for name in ("base", "mixed", "gain"):
        assert both["probability"][name] == pytest.approx(one["probability"][name], rel=1e-3)


def test_the_help_lists_every_format(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    assert "jsonl, json, csv, tsv or parquet" in " ".join(capsys.readouterr().out.split())
