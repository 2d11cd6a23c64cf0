"""``quietstar info``: for a reader, and as data."""

import json
import re

import pytest
import torch

from quietstar.cli import app as cli
from quietstar.cli.installed import compiled
from quietstar_ext import native


def test_info_on_a_gpu_machine_without_kernels(monkeypatch):
    facts = {"simd": "avx2", "cuda_archs": ""}
    monkeypatch.setattr("quietstar_ext.build_info", lambda: dict(facts))
    assert "cuda_kernels" not in compiled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert compiled()["cuda_kernels"].endswith("QUIETSTAR_CUDA=on pip install . compiles them")
    facts["cuda_archs"] = "sm_90"
    assert "cuda_kernels" not in compiled()


def test_info(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("transformers", torch.__version__, "threads", "simd", "cuda archs", "operators on cpu"):
        assert word in printed
    for operator in ("thought_attention", "sample_tokens", "linear_sample", "linear_cross_entropy"):
        (line,) = [line for line in printed.splitlines() if line.split()[:1] == [operator]]
        assert line.split()[1] in ("fused", "reference")


@pytest.mark.parametrize("is_built", [True, False])
def test_info_as_data_says_the_same(is_built: bool, monkeypatch, capsys):
    if not is_built:
        monkeypatch.setattr(native, "_module", None)
        monkeypatch.setattr(native, "_missing", "the native module is missing; pip install .")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    said = [
        re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in text.splitlines() if line[:1] == " "
    ]
    titles = [line for line in text.splitlines() if line and line[0] != " "]

    operators = facts.pop("operators")
    assert titles == [*facts, *(f"operators on {device}" for device in operators)]
    expected = [(k.replace("_", " "), value) for part in facts.values() for k, value in part.items()]
    expected += [fact for device in operators.values() for fact in device.items()]
    assert [name for name, _ in said] == [name for name, _ in expected]
    for (name, words), (_, value) in zip(said, expected, strict=True):
        for part in value.values() if isinstance(value, dict) else [value]:
            shown = {True: "yes", False: "no"}[part] if isinstance(part, bool) else part
            for word in shown if isinstance(shown, list) else [shown or "none"]:
                assert str(word) in words, name
    assert facts["compiled"]["native"] is is_built
    chosen = operators["cpu"]["sample_tokens"]
    assert chosen == (
        {"implementation": "fused"}
        if is_built
        else {"implementation": "reference", "reason": "the native module is missing; pip install ."}
    )
