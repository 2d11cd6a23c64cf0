"""linear_sample: the same draws as from the full logits, in chunks that never hold them all."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from quietstar_ext import linear_sample, sample_tokens

module = importlib.import_module("quietstar_ext.linear_sample")

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.5, "banned": [0, 5]},
    {"top_k": 10, "top_p": 0.8},
    {"min_p": 0.1, "offset": 1000},
    {"softcap": 3.0},
    {"softcap": 20.0, "logit_scale": 2.0, "top_k": 7},
    {"logit_scale": 0.125},
]


def inputs(rows: int, width: int, vocab: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, width), torch.randn(vocab, width) / width**0.5 * 2


def mismatches(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> int:
    same = ours[0] == theirs[0]
    torch.testing.assert_close(ours[1][same], theirs[1][same], atol=2e-5, rtol=1e-5)
    return int((~same).sum())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_tokens_as_the_reference(options: dict[str, Any]) -> None:
    hidden, weight = inputs(200, 48, 1500)
    ours = linear_sample(hidden, weight, seed=1, impl="fused", **options)
    theirs = linear_sample(hidden, weight, seed=1, impl="reference", **options)
    # The product rounds in float32, the reference in float64: an edge moves more than in sampling.
    assert mismatches(ours, theirs) <= 2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chunks_change_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = inputs(65, 32, 700)
    whole = linear_sample(hidden, weight, seed=1, impl="fused", **options)
    for rows in (1, 16, 64):
        monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 700 * rows)
        chunked = linear_sample(hidden, weight, seed=1, impl="fused", **options)
        assert mismatches(chunked, whole) <= 1


def test_equals_sampling_from_the_product() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = (t.to(dtype) for t in inputs(100, 32, 2000))
        ours = linear_sample(hidden, weight, seed=3, impl="fused")
        theirs = sample_tokens(hidden @ weight.T, seed=3, impl="fused")
        assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_stay_close_to_exact(dtype: torch.dtype) -> None:
    hidden, weight = (t.to(dtype) for t in inputs(400, 64, 800))
    ours = linear_sample(hidden, weight, seed=3, softcap=5.0, impl="fused")
    theirs = linear_sample(hidden, weight, seed=3, softcap=5.0, impl="reference")
    assert int((ours[0] != theirs[0]).sum()) < 80  # an edge moves by a rounded logit's error
    exact = 5 * ((hidden.double() @ weight.double().T) / 5).tanh()
    wanted = exact.log_softmax(1).gather(1, ours[0][:, None])[:, 0].float()
    rounding = {torch.bfloat16: 0.04, torch.float16: 0.006}[dtype]
    torch.testing.assert_close(ours[1], wanted, atol=rounding, rtol=0)


def test_the_logits_are_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    allocate = torch.Tensor.new_empty

    def counted(self: Tensor, *size: Any, **named: Any) -> Tensor:
        nonlocal largest
        result = allocate(self, *size, **named)
        largest = max(largest, result.nbytes)
        return result

    hidden, weight = inputs(3000, 8, 8000)  # 96 MB of logits
    monkeypatch.setattr(torch.Tensor, "new_empty", counted)
    linear_sample(hidden, weight, seed=0, impl="fused")
    assert 0 < largest <= 64 * 2**20


def test_strided_inputs() -> None:
    hidden, weight = inputs(40, 64, 500)
    ours = linear_sample(hidden[::2, ::2], weight[:, ::2], seed=0, impl="fused")
    theirs = linear_sample(
        hidden[::2, ::2].contiguous(), weight[:, ::2].contiguous(), seed=0, impl="fused"
    )
    assert mismatches(ours, theirs) <= 1


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_no_rows(impl: str) -> None:
    hidden, weight = inputs(0, 8, 50)
    tokens, logprobs = linear_sample(hidden, weight, seed=0, impl=impl)
    assert tokens.shape == logprobs.shape == (0,)


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_errors(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = inputs(20, 8, 50)
    with pytest.raises(ValueError, match=r"weight has shape \[50, 8\]; expected \[vocab, 7\]"):
        linear_sample(hidden[:, :7], weight, seed=0, impl=impl)
    with pytest.raises(ValueError, match="weight has dtype bfloat16; expected float32"):
        linear_sample(hidden, weight.bfloat16(), seed=0, impl=impl)
    with pytest.raises(ValueError, match="softcap is -1.0; expected a number greater than 0"):
        linear_sample(hidden, weight, softcap=-1.0, seed=0, impl=impl)
    with pytest.raises(ValueError, match="banned contains 50"):
        linear_sample(hidden, weight, banned=[50], seed=0, impl=impl)
    with pytest.raises(ValueError, match="weight has no rows"):
        linear_sample(hidden, weight[:0], seed=0, impl=impl)
    hidden[17] = math.nan
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 50 * 8)
    with pytest.raises(ValueError, match="hidden row 17 cannot be sampled"):
        linear_sample(hidden, weight, seed=0, impl=impl)


def test_opcheck() -> None:
    hidden, weight = inputs(6, 8, 40)
    seed = torch.tensor([3])
    for use_kernel in (True, False):
        arguments = (hidden, weight, 1.0, 5, 0.9, 0.0, None, seed, 0, 3.0, 1.0, use_kernel)
        torch.library.opcheck(torch.ops.quietstar.linear_sample.default, arguments)


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_compiles_to_one_graph(impl: str) -> None:
    def step(hidden: Tensor, weight: Tensor, seed: Tensor) -> Tensor:
        return linear_sample(hidden, weight, seed=seed, banned=[1], impl=impl)[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    hidden, weight = inputs(6, 8, 40)
    seed = torch.tensor([3])
    assert torch.equal(compiled(hidden, weight, seed), step(hidden, weight, seed))


def test_autocast() -> None:
    hidden, weight = inputs(30, 16, 100)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_sample(hidden, weight, seed=0, impl="fused")
    theirs = linear_sample(hidden.bfloat16(), weight.bfloat16(), seed=0, impl="fused")
    assert torch.equal(ours[0], theirs[0])
