"""QUIETSTAR_LOG: which calls are written, and what of them."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_table import OPERATORS
from small_training import rows, small_model, trainer

import quietstar_ext as ext
from quietstar_ext import call_log

# What is public and no operator.
OTHER = {"build_info", "use_impl", "use_simd"}
Lines = Callable[[], list[str]]


@pytest.fixture
def lines(capfd, monkeypatch) -> Lines:
    """The lines since the last call; every call is logged unless a test lowers the level."""
    monkeypatch.setattr(call_log, "level", 2)
    monkeypatch.setattr(call_log, "_seen", set())

    def written() -> list[str]:
        return [line for line in capfd.readouterr().err.splitlines() if "quietstar_ext: " in line]

    return written


def test_the_table_has_every_public_operator() -> None:
    named = {operator.name for operator in OPERATORS} | {"thought_attention_with_lse"}
    assert named == set(ext.__all__) - OTHER


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_every_operator_is_logged(operator: Any, impl: str, lines: Lines) -> None:
    for call in operator.calls(torch.float32):
        operator.function(**call, impl=impl)
        (line,) = lines()
        how = f"fused ({ext.build_info()['simd']})" if impl == "fused" else "reference (asked for)"
        assert line.startswith(f"quietstar_ext: {operator.name} {how} on cpu: ")
        if call.get("banned") is not None:
            assert f"banned int64 [{len(call['banned'])}]" in line
        for name, given in call.items():
            if isinstance(given, torch.Tensor) and name != "seed":
                dtype = str(given.dtype).removeprefix("torch.")
                grad = " grad" if given.requires_grad and "sampl" not in operator.name else ""
                assert f"{name} {dtype} {list(given.shape)}{grad}" in line.split(": ", 2)[2], name


def test_attention_with_lse_is_a_line_of_thought_attention(lines: Lines) -> None:
    (operator,) = (o for o in OPERATORS if o.name == "thought_attention")
    call = operator.calls(torch.float32)[0]
    ext.thought_attention_with_lse(**{k: v for k, v in call.items() if k != "return_lse"})
    assert [line.split()[1] for line in lines()] == ["thought_attention"]


def test_why_the_reference_ran(lines: Lines) -> None:
    ext.sample_tokens(torch.zeros(2, 4, dtype=torch.float64), seed=1)
    assert lines()[-1].startswith(
        "quietstar_ext: sample_tokens reference (the kernel takes float32, bfloat16 and float16, not"
        " float64) on cpu: logits float64 [2, 4]"
    )


def test_the_composed_path_is_named(lines: Lines, monkeypatch) -> None:
    from quietstar_ext.thought_attention import api

    monkeypatch.setattr(api, "path_of", lambda *given: "composed")
    monkeypatch.setattr(api, "attend", lambda call, is_composed, order: (call.q, is_composed))
    (operator,) = (o for o in OPERATORS if o.name == "thought_attention")
    _, is_composed = operator.function(**operator.calls(torch.float32)[0])
    assert is_composed and "thought_attention composed (" in lines()[0]


def test_at_level_one_a_kind_of_call_is_a_line(lines: Lines, monkeypatch) -> None:
    monkeypatch.setattr(call_log, "level", 1)
    for count in (4, 5, 7, 4):  # of one magnitude
        ext.sample_tokens(torch.zeros(count, 50), seed=count)
    assert len(lines()) == 1
    changes: list[dict[str, Any]] = [{"size": 8}, {"dtype": torch.bfloat16}, {"banned": [1]}]
    for change in [*changes, {"impl": "reference"}]:
        logits = torch.zeros(change.pop("size", 4), 50, dtype=change.pop("dtype", None))
        for _ in range(2):
            ext.sample_tokens(logits, seed=1, **change)
        assert len(lines()) == 1, change
    hidden, targets = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    weight = torch.zeros(9, 3, requires_grad=True)
    for grads in (True, False, True):
        with torch.set_grad_enabled(grads):
            ext.linear_cross_entropy(hidden, weight, targets)
    assert [" grad" in line for line in lines()] == [True, False]


def test_inside_training(tmp_path, lines: Lines, monkeypatch) -> None:
    monkeypatch.setattr(call_log, "level", 1)
    trainer(tmp_path, small_model(), rows(4), max_steps=1).train()
    named = {line.split()[1] for line in lines()}
    assert {"thought_attention", "linear_sample", "linear_cross_entropy", "mixing_head"} <= {
        name.removesuffix("_sum") for name in named
    }


def test_a_compiled_call_is_one_graph_and_writes_nothing(lines: Lines) -> None:
    logits = torch.randn(3, 20)
    compiled = torch.compile(ext.sample_tokens, fullgraph=True, backend="eager")
    seed = torch.tensor([1])
    tokens, _ = compiled(logits, seed=seed)
    assert lines() == []
    assert torch.equal(tokens, ext.sample_tokens(logits, seed=seed)[0]) and len(lines()) == 1


@pytest.mark.parametrize(("value", "level"), [(None, 0), ("", 0), ("0", 0), ("1", 1), ("2", 2)])
def test_the_environment_sets_the_level(value: str | None, level: int, monkeypatch) -> None:
    monkeypatch.delenv(call_log.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(call_log.VARIABLE, value)
    assert call_log.asked_level() == level


def test_a_process_of_several_that_has_a_log_of_its_own_writes_each_line_once() -> None:
    code = (
        "import logging, torch, quietstar_ext\n"
        "logging.basicConfig(level=logging.DEBUG)\n"
        "for _ in range(2): quietstar_ext.sample_tokens(torch.zeros(1, 4), seed=0)\n"
    )
    env = {**os.environ, call_log.VARIABLE: "2", "RANK": "3"}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.count("[rank 3] quietstar_ext: sample_tokens") == 2
    assert done.stderr.count("sample_tokens") == 2


def test_another_level_is_refused_in_a_sentence() -> None:
    words = [sys.executable, "-P", "-m", "quietstar", "info"]
    env = {**os.environ, call_log.VARIABLE: "verbose"}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    said = "environment variable QUIETSTAR_LOG is 'verbose'; expected one of 0, 1, 2"
    assert done.returncode == 2 and done.stderr == f"quietstar: error: {said}\n"
