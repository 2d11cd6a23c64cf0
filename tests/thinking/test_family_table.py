"""scripts/families.py: its verdicts are right, and README and docs/families.md state the same counts."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaModel

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script under another name: tests/support/families.py has its own."""
    sys.path.append(str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("families_script", SCRIPTS / "families.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def checker(script) -> ModuleType:
    return sys.modules["family_check"]


def llama(checker):
    return checker.tiny_decoder(checker.tiny_config("llama"))


# Windows within a thought, soft-caps, sinks and experts, latent attention, a part of a whole, and
# embeddings that the decoder scales in place.
@pytest.mark.parametrize(
    ("family", "feature"),
    [
        ("llama", "grouped keys"),
        ("gemma2", "soft-cap on attention"),
        ("gpt_oss", "attention sinks"),
        ("deepseek_v3", "latent attention"),
        ("gemma3", "window 4"),
        ("ctrl", ""),
    ],
)
def test_a_right_family_is_exact(checker, family: str, feature: str):
    verdict = checker.check(family)
    assert verdict.kind == checker.EXACT, verdict
    assert 0 < verdict.difference < 2e-5 and feature in verdict.features


@pytest.mark.parametrize(("family", "words"), [("falcon", "interface"), ("mamba", "with Mamba-1")])
def test_a_refused_family_says_why(checker, family: str, words: str):
    verdict = checker.check(family)
    assert verdict.kind == checker.REFUSED and words in verdict.text


def spoil_long_passes(checker, monkeypatch, spoil) -> None:
    """``spoil(keywords)`` before every pass of Llama that is longer than those of the self-check."""
    forward = LlamaModel.forward

    def spoiled(self, *args, **keywords):
        embeds = keywords.get("inputs_embeds")
        if embeds is not None and embeds.shape[1] > 2 * checker.LENGTH:
            spoil(keywords)
        return forward(self, *args, **keywords)

    monkeypatch.setattr(LlamaModel, "forward", spoiled)


def test_a_wrong_decoder_is_found_wrong(checker, monkeypatch):
    """One that counts positions for itself, which the packed pass is the first to show."""
    decoder = llama(checker)
    spoil_long_passes(checker, monkeypatch, lambda keywords: keywords.pop("position_ids"))
    verdict = checker.judge("llama", decoder)
    assert verdict.kind == checker.WRONG and verdict.text == "thoughts"
    assert verdict.difference > 0.01


def test_anothers_error_is_a_crash_and_not_a_refusal(checker, monkeypatch):
    def fail(keywords):
        raise ValueError("an error of the decoder's own, which names nothing that the user gave")

    decoder = llama(checker)
    spoil_long_passes(checker, monkeypatch, fail)
    verdict = checker.judge("llama", decoder)
    assert verdict.kind == checker.CRASH and "ValueError" in verdict.text


def test_a_configuration_that_does_not_count_its_layers(checker):
    assert not hasattr(checker.tiny_config("blt"), "num_hidden_layers")
    verdict = checker.check("blt")
    assert verdict.kind == checker.REFUSED and "cannot run with thoughts" in verdict.text


def test_a_tiny_difference_and_numbers_that_are_none():
    check = sys.modules["family_check"]._difference
    ones = torch.ones(3)
    assert check(ones * 1.5, ones) == pytest.approx(0.5)
    assert check(ones, ones * torch.nan) == check(ones * torch.inf, ones) == float("inf")


def test_every_process_that_ends_has_a_verdict(script, monkeypatch):
    """One that dies and one that hangs are crashes and stop nothing; the rest is as ever."""
    from family_check import Verdict

    def check(family: str) -> Verdict:
        if family == "dies":
            import os

            os._exit(3)
        if family == "hangs":
            import time

            time.sleep(60)
        return Verdict(family, script.EXACT, 1e-6)

    monkeypatch.setattr(script, "check", check)
    monkeypatch.setattr(script, "SECONDS", 3)
    found = {v.family: v for v in script.run_all(["dies", "hangs", "well", "too"], workers=2)}
    assert {family: v.kind for family, v in found.items()} == {
        **{"dies": script.CRASH, "hangs": script.CRASH, "well": script.EXACT, "too": script.EXACT}
    }
    assert "3" in found["dies"].text and "seconds" in found["hangs"].text


def test_readme_quotes_the_table(script):
    table = script.TABLE.read_text("utf-8")
    readme = script.README.read_text("utf-8")
    assert script.disagreements(table, readme) == []
    assert script.disagreements(table.replace("| exact |", "| wrong |", 1), readme)
    assert script.disagreements(table, readme.replace(" exact,", "0 exact,"))


def test_the_table_has_neither_wrong_families_nor_crashes(script):
    table = script.TABLE.read_text("utf-8")
    counts = Counter(line.split(" | ")[1] for line in table.splitlines() if line.startswith("| "))
    assert counts["exact"] >= 85
    assert counts["wrong"] == counts["crash"] == 0
