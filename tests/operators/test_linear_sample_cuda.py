"""linear_sample on CUDA: the same tests on the CPU (cuda_on_cpu) and on a device (gpu)."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from quietstar_ext import linear_sample, sample_tokens

module = importlib.import_module("quietstar_ext.linear_sample")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.5, "banned": [0, 3]},
    {"softcap": 2.0},
    {"softcap": 30.0, "logit_scale": 4.0, "top_k": 40},
    {"logit_scale": 0.25, "top_p": 0.9},
    {"logit_scale": -2.0, "min_p": 0.05},
    {"softcap": 3.0, "temperature": 0.0, "banned": list(range(80))},
]


def options_id(options: dict[str, Any]) -> str:
    return "-".join(options) or "plain"


def inputs(rows: int, width: int, vocab: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Logits with a standard deviation of about two."""
    hidden, weight = torch.randn(rows, width), torch.randn(vocab, width) * 2 / width**0.5
    return hidden.to(device, dtype), weight.to(device, dtype)


def chunks_of(rows: int, row_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CUDA_CHUNK_BYTES", rows * row_bytes)
    monkeypatch.setattr(module, "CUDA_CHUNK_ROWS", 0)


@pytest.mark.parametrize("options", OPTIONS, ids=options_id)
@pytest.mark.parametrize("rows", [1, 9])
def test_equals_the_reference(
    kernel_device: str, rows: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight = inputs(rows, 24, 1203, torch.float32, kernel_device)
    # The last of the chunks has fewer rows, which are cut up in another way.
    chunks_of(4, 1203 * 4, monkeypatch)
    ours = linear_sample(hidden, weight, seed=3, offset=7, impl="fused", **options)
    theirs = linear_sample(hidden, weight, seed=3, offset=7, impl="reference", **options)
    same = ours[0] == theirs[0]
    assert int((~same).sum()) <= 1  # a draw may fall on an interval's edge
    torch.testing.assert_close(ours[1][same], theirs[1][same], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=options_id)
def test_equals_sampling_from_the_product(
    kernel_device: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """The product has the dtype of hidden; scale and cap are applied in more than that."""
    hidden, weight = inputs(8, 32, 1100, dtype, kernel_device)
    tokens, logprobs = linear_sample(hidden, weight, seed=2, impl="fused", **options)
    assert tokens.dtype == torch.int64
    assert logprobs.dtype == torch.float32
    options = dict(options)
    logits = torch.mm(hidden, weight.T).double() * options.pop("logit_scale", 1.0)
    softcap = options.pop("softcap", None)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    want = sample_tokens(logits, seed=2, impl="reference", **options)
    same = tokens == want[0]
    # Capped 16-bit logits tie before and, in more digits, not after: which is the largest may differ.
    assert int((~same).sum()) <= 1
    torch.testing.assert_close(logprobs[same], want[1][same], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_chunks_change_nothing(kernel_device: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = inputs(11, 16, 1500, torch.float32, kernel_device)
    # Products of any shape are exact here, and so the same in chunks of any size.
    hidden, weight = hidden.round(), (weight * 8).round() / 8
    banned = torch.arange(500, 600, device=kernel_device)
    whole = linear_sample(hidden, weight, seed=9, banned=banned, impl="fused")
    chunks_of(size, 1500 * 4, monkeypatch)
    parts = linear_sample(hidden, weight, seed=9, banned=banned, impl="fused")
    assert torch.equal(parts[0], whole[0])
    torch.testing.assert_close(parts[1], whole[1], atol=1e-6, rtol=1e-6)


def test_rows_per_chunk() -> None:
    def size(rows: int, vocab: int, width: int = 2) -> int:
        return module.cuda_rows_per_chunk(rows, vocab * width)

    assert size(4096, 32_000) == 512  # 32 MiB would be 524
    assert size(4096, 128_256) == 512
    assert size(4096, 1_000_000) == 128  # 256 MiB would be 134
    assert size(3, 2**31 - 1, 4) == 1
    assert size(4096, 2_000_000) == 67
    assert size(0, 32_000) == 1
    for rows in (1, 100, 513, 524, 525, 600, 2000):
        per_chunk = size(rows, 32_000)
        assert 1 <= per_chunk <= 524
        # None is much smaller than the others.
        assert rows - (-(-rows // per_chunk) - 1) * per_chunk > per_chunk / 4


def test_rows_that_cannot_be_sampled_are_marked(kernel_device: str) -> None:
    for softcap in (None, 5.0):
        hidden, weight = inputs(6, 8, 700, torch.bfloat16, kernel_device)
        hidden[4] = math.nan
        tokens, logprobs = linear_sample(hidden, weight, softcap=softcap, seed=0, impl="fused")
        assert (tokens == -1).tolist() == [False] * 4 + [True, False]
        assert logprobs.isnan().tolist() == [False] * 4 + [True, False]


def test_seed_and_autocast(kernel_device: str) -> None:
    hidden, weight = inputs(6, 16, 900, torch.float32, kernel_device)
    seed = torch.tensor([41], device=kernel_device)
    with torch.autocast(kernel_device, torch.bfloat16):
        ours = linear_sample(hidden, weight, seed=seed, impl="fused")
    theirs = linear_sample(hidden.bfloat16(), weight.bfloat16(), seed=41, impl="fused")
    assert torch.equal(ours[0], theirs[0])


def test_opcheck(kernel_device: str) -> None:
    hidden, weight = inputs(4, 8, 40, torch.float32, kernel_device)
    seed = torch.tensor([3], device=kernel_device)
    arguments = (hidden, weight, 1.0, 5, 0.9, 0.0, None, seed, 0, 3.0, 1.0, True)
    torch.library.opcheck(torch.ops.quietstar.linear_sample.default, arguments)


class TestDevice:
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    ]

    @pytest.mark.parametrize("options", OPTIONS, ids=options_id)
    @pytest.mark.parametrize("rows", [4, 700])
    def test_a_captured_graph_draws_anew(self, rows: int, options: dict[str, Any]) -> None:
        hidden, weight = inputs(rows, 512, 128_256, torch.bfloat16, "cuda")
        seed = torch.zeros(1, dtype=torch.int64, device="cuda")
        options = dict(options)
        if "banned" in options:
            options["banned"] = torch.tensor(options["banned"], device="cuda")
        linear_sample(hidden, weight, seed=seed, impl="fused", **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn = linear_sample(hidden, weight, seed=seed, impl="fused", **options)
        for value in (1, 2):
            seed.fill_(value)
            for tensor in drawn:
                tensor.fill_(-7)
            graph.replay()
            want = linear_sample(hidden, weight, seed=value, impl="fused", **options)
            assert torch.equal(drawn[0], want[0])
            assert torch.equal(drawn[1], want[1])

    def test_nothing_waits_for_the_device(self) -> None:
        hidden, weight = inputs(700, 64, 128_256, torch.bfloat16, "cuda")
        seed = torch.zeros(1, dtype=torch.int64, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            linear_sample(hidden, weight, seed=seed, softcap=30.0, top_p=0.9, impl="fused")
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_memory(self) -> None:
        hidden, weight = inputs(4096, 64, 128_256, torch.bfloat16, "cuda")
        linear_sample(hidden, weight, seed=0, impl="fused")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_sample(hidden, weight, seed=0, impl="fused")
        assert torch.cuda.max_memory_allocated() - before < 257 * 2**20
