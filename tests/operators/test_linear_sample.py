"""linear_sample: the same draws as from the full logits, in chunks that never hold them all."""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import pytest
import torch
from contract import captured
from places import CPU, CUDA, CUDA_ON_CPU, Place, place_fixture
from sample_tokens_cases import same_draws
from torch import Tensor

from quietstar_ext import linear_sample, sample_tokens

module = importlib.import_module("quietstar_ext.linear_sample")

kernel = place_fixture((CPU, CUDA_ON_CPU, CUDA))
fused = functools.partial(linear_sample, impl="fused")
# The product rounds in float32, the reference in float64: an edge moves more than in sampling.
close = functools.partial(same_draws, atol=2e-5, rtol=1e-5)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.5, "banned": [0, 5]},
    {"top_k": 10, "top_p": 0.8},
    {"min_p": 0.1, "offset": 1000},
    {"softcap": 3.0},
    {"softcap": 20.0, "logit_scale": 2.0, "top_k": 7},
    {"logit_scale": 0.125},
    {"softcap": 30.0, "logit_scale": 4.0, "top_k": 40},
    {"logit_scale": 0.25, "top_p": 0.9},
    {"logit_scale": -2.0, "min_p": 0.05},
    {"softcap": 3.0, "temperature": 0.0, "banned": list(range(80))},
]

with_options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")


def inputs(
    rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Logits with a standard deviation of about two."""
    hidden, weight = torch.randn(rows, width), torch.randn(vocab, width) * 2 / width**0.5
    return hidden.to(device, dtype), weight.to(device, dtype)


def chunks_of(rows: int, row_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", rows * row_bytes)
    monkeypatch.setattr(module, "CUDA_CHUNK_BYTES", rows * row_bytes)


@with_options
@pytest.mark.parametrize("rows", [1, 9, 200])
def test_same_tokens_as_the_reference(
    kernel: Place, rows: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if rows == 200 and kernel.runs_cuda:
        kernel.must_launch = False
        pytest.skip("nine rows in chunks of four are enough")
    hidden, weight = inputs(rows, 48, 1203, device=kernel.device)
    if rows < 200:  # the last of the chunks has fewer rows, which are cut up in another way
        chunks_of(4, 1203 * 4, monkeypatch)
    options = {"seed": 3, "offset": 7} | options
    theirs = linear_sample(hidden, weight, impl="reference", **options)
    close(fused(hidden, weight, **options), theirs, edges=2 if rows == 200 else 1)


@pytest.mark.parametrize("dtype", DTYPES)
@with_options
def test_equals_sampling_from_the_product(
    kernel: Place, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """The product has the dtype of hidden; scale and cap are applied in more than that."""
    if not kernel.runs_cuda and dtype != torch.float32 and len({"softcap", "logit_scale"} & {*options}):
        kernel.must_launch = False
        pytest.skip("on the CPU they are applied to the rounded logits")
    hidden, weight = inputs(8, 32, 1100, dtype, kernel.device)
    tokens, logprobs = fused(hidden, weight, seed=2, **options)
    assert tokens.dtype == torch.int64
    assert logprobs.dtype == torch.float32
    options = dict(options)
    logits = torch.mm(hidden, weight.T).double() * options.pop("logit_scale", 1.0)
    softcap = options.pop("softcap", None)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    # Capped 16-bit logits tie before and, in more digits, not after: which is the largest may differ.
    want = sample_tokens(logits, seed=2, impl="reference", **options)
    same_draws((tokens, logprobs), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_sampling_by_the_kernel(dtype: torch.dtype) -> None:
    hidden, weight = inputs(100, 32, 2000, dtype)
    theirs = sample_tokens(hidden @ weight.T, seed=3, impl="fused")
    assert torch.equal(fused(hidden, weight, seed=3)[0], theirs[0])


@with_options
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 100])
def test_chunks_change_nothing(
    kernel: Place, size: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 11 if kernel.runs_cuda else 65
    hidden, weight = inputs(rows, 16, 1500, device=kernel.device)
    # Products of any shape are exact here, and so the same in chunks of any size.
    hidden, weight = hidden.round(), (weight * 8).round() / 8
    options = {"banned": torch.arange(500, 600, device=kernel.device), "seed": 9} | options
    whole = fused(hidden, weight, **options)
    chunks_of(size, 1500 * 4, monkeypatch)
    parts = fused(hidden, weight, **options)
    assert torch.equal(parts[0], whole[0])
    torch.testing.assert_close(parts[1], whole[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_stay_close_to_exact(dtype: torch.dtype) -> None:
    hidden, weight = inputs(400, 64, 800, dtype)
    ours = fused(hidden, weight, seed=3, softcap=5.0)
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
    fused(hidden, weight, seed=0)
    assert 0 < largest <= 64 * 2**20


def test_rows_per_chunk() -> None:
    def size(rows: int, vocab: int, width: int = 2) -> int:
        return module.cuda_rows_per_chunk(rows, vocab * width)

    assert size(4096, 32_000) == 4096
    assert size(4096, 128_256) == 2048  # 512 MiB would be 2093
    assert size(8192, 128_256) == 2048
    assert size(4096, 1_000_000) == 256  # 268
    assert size(3, 2**31 - 1, 4) == 1
    assert size(4096, 4_000_000) == 67
    assert size(0, 32_000) == 1
    for rows in (1, 100, 2093, 2100, 4000, 9000):
        per_chunk = size(rows, 128_256)
        assert 1 <= per_chunk <= 2093
        # None is much smaller than the others.
        assert rows - (-(-rows // per_chunk) - 1) * per_chunk > per_chunk / 4


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_a_row_that_cannot_be_sampled(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = inputs(20, 8, 50)
    hidden[17] = math.nan
    chunks_of(8, 4 * 50, monkeypatch)
    with pytest.raises(ValueError, match="hidden row 17 cannot be sampled"):
        linear_sample(hidden, weight, seed=0, impl=impl)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_that_cannot_be_sampled_are_marked(kernel_device: str, softcap: float | None) -> None:
    hidden, weight = inputs(6, 8, 700, torch.bfloat16, kernel_device)
    hidden[4] = math.nan
    tokens, logprobs = fused(hidden, weight, softcap=softcap, seed=0)
    assert (tokens == -1).tolist() == [False] * 4 + [True, False]
    assert logprobs.isnan().tolist() == [False] * 4 + [True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
class TestDevice:
    @with_options
    @pytest.mark.parametrize("rows", [4, 700])
    def test_a_captured_graph_draws_anew(self, rows: int, options: dict[str, Any]) -> None:
        hidden, weight = inputs(rows, 512, 128_256, torch.bfloat16, "cuda")
        seed = torch.zeros(1, dtype=torch.int64, device="cuda")
        ids = {k: torch.tensor(v, device="cuda") for k, v in options.items() if k == "banned"}
        call = functools.partial(fused, hidden, weight, **options | ids)
        graph, drawn = captured(lambda: call(seed=seed))
        for value in (1, 2):
            seed.fill_(value)
            for tensor in drawn:
                tensor.fill_(-7)
            graph.replay()
            want = call(seed=value)
            assert torch.equal(drawn[0], want[0])
            assert torch.equal(drawn[1], want[1])

    def test_nothing_waits_for_the_device(self) -> None:
        hidden, weight = inputs(700, 64, 128_256, torch.bfloat16, "cuda")
        seed = torch.zeros(1, dtype=torch.int64, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            fused(hidden, weight, seed=seed, softcap=30.0, top_p=0.9)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_memory(self) -> None:
        hidden, weight = inputs(4096, 64, 128_256, torch.bfloat16, "cuda")
        fused(hidden, weight, seed=0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused(hidden, weight, seed=0)
        assert torch.cuda.max_memory_allocated() - before < 513 * 2**20
