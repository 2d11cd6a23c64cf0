"""The text demo: its stages, its controls, its verdict; and a whole one, very small."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quietstar import QuietStarForCausalLM
from quietstar.cli import demo
from quietstar.demos import text as demo_text
from quietstar.evaluation.perplexity import Estimate
from quietstar.files import read_json

pytestmark = pytest.mark.usefixtures("stdlib_tokenizer_once")


def test_the_control_differs_in_the_thoughts_alone():
    recipes = demo_text.stage_recipes(Path("x"), quick=False)
    ours, control = recipes["quiet-star"].to_dict(), recipes["control"].to_dict()
    assert control["thoughts"].pop("thought_kind") == "none"
    for content in (ours, control):
        del content["name"]
    assert ours == control
    assert recipes["base"].thoughts["thought_kind"] == "none"


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (Estimate(0.05, 0.01), "Thoughts helped: 0.0500 ± 0.0100"),
        (Estimate(0.015, 0.01), "No gain: 0.0150 ± 0.0100"),
        (Estimate(-0.05, 0.01), "ended worse than the control: -0.0500 ± 0.0100"),
        (Estimate(0.05, None), "one block cannot tell"),
    ],
)
def test_verdict(gain: Estimate, words: str):
    assert words in demo_text.verdict(gain)


@pytest.mark.slow
def test_whole_demo_and_its_continuation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_text, "QUICK", {"base_steps": 3, "steps": 2, "blocks": 3})
    seen: list[torch.Tensor] = []
    record_batches(monkeypatch, seen)
    args = argparse.Namespace(what="text", quick=True, fresh=False, output=tmp_path / "demo")
    assert demo.run(args) == 0
    printed = capsys.readouterr().out
    for word in ("tenth 10, hardest", "control", "-> thought", "thinking is worth", "metrics:", "page:"):
        assert word in printed
    assert isinstance(
        AutoModelForCausalLM.from_pretrained(tmp_path / "demo" / "quiet-star"), QuietStarForCausalLM
    )
    assert (tmp_path / "demo" / "thoughts.html").read_text().count('<p class="text">') == 4
    metrics = read_json(tmp_path / "demo" / "metrics.json")
    assert metrics["blocks"] == 3 and len(metrics["by_decile"]) == 10
    assert metrics["nll"]["control"]["mean"] != metrics["nll"]["base"]["mean"]

    # Both arms saw the same rows in the same order (the loader makes one batch more than is used).
    assert len(seen) == 4 + 3 + 3
    for ours, control in zip(seen[4:7], seen[7:10], strict=True):
        assert torch.equal(ours, control)

    # A second call trains nothing and says the same.
    assert demo.run(args) == 0
    assert len(seen) == 10 and read_json(tmp_path / "demo" / "metrics.json") == metrics
    args.fresh = True
    assert demo.run(args) == 0
    assert len(seen) == 20
    again = read_json(tmp_path / "demo" / "metrics.json")
    assert json.dumps(again["nll"]) == json.dumps(metrics["nll"])


def record_batches(monkeypatch, seen: list[torch.Tensor]) -> None:
    """Record the rows of every training batch."""
    from quietstar.recipes import run as train

    build = train.collator_for

    def recording(*args: object) -> object:
        collate = build(*args)  # type: ignore[arg-type]

        def record(rows: list) -> dict:
            batch = collate(rows)
            seen.append(batch["input_ids"])
            return batch

        return record

    monkeypatch.setattr(train, "collator_for", recording)
