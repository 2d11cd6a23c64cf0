"""sample_tokens: the distribution, agreement with the reference, and odd inputs, of every kernel.

Every call that is about a kernel says impl="fused", which raises instead of falling back.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import pytest
import torch
from places import CPU, CUDA, CUDA_ON_CPU, EVERY_SIMD, Place, place_fixture
from sample_tokens_cases import (
    OPTIONS,
    chi_square_deviation,
    fresh_seed,
    fused,
    options_id,
    reference,
    same_draws,
)
from torch import Tensor

from quietstar_ext import build_info, sample_tokens
from quietstar_ext.native import native
from quietstar_ext.sample_tokens.reference import philox_uniform

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

kernel = place_fixture((*EVERY_SIMD, CUDA_ON_CPU, CUDA))
# Those that draw by the hundred thousand.
fast_kernel = place_fixture((*EVERY_SIMD, CUDA))
cpu_or_gpu = place_fixture((CPU, CUDA))


def rows_at(kernel: Place, rows: int, few: int = 5) -> int:
    """So many rows, but only a few where a fiber is what a thread is."""
    return few if kernel.name == "cuda_on_cpu" else rows


def random(kernel: Place, rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(rows, vocab) * 3).to(kernel.device, dtype)


# ---- random numbers


def test_philox_known_answers() -> None:
    # From the test vectors of the authors' library (kat_vectors, philox4x32 10 rounds, zero counter
    # and key): the first two words are 6627e8d5 e169c58d.
    expected = (0xE169C58D << 21 | 0x6627E8D5 >> 11) * 2.0**-53
    zero = torch.zeros(1, dtype=torch.int64)
    assert native().philox_uniform(0, 0) == expected
    assert philox_uniform(zero, zero).item() == expected


def test_philox_of_kernel_and_reference_agree() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), fresh_seed()]
    counters = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**40 + 3, 2**63 - 1])
    for seed in seeds:
        theirs = philox_uniform(torch.tensor([seed]), counters).tolist()
        ours = [native().philox_uniform(seed % 2**64, c) for c in counters.tolist()]
        assert ours == theirs
        assert all(0 <= u < 1 for u in ours)


# ---- the distribution


@pytest.mark.parametrize("vocab", [2, 13, 64, 2500])
def test_draws_follow_the_softmax(fast_kernel: Place, vocab: int) -> None:
    draws = 1_000_000 if fast_kernel.device == "cuda" else 600_000 if vocab < 1000 else 100_000
    logits = torch.randn(1, vocab)
    rows = logits.to(fast_kernel.device).expand(draws, -1)
    tokens, _ = fused(rows, seed=fresh_seed(), temperature=1.5)
    probabilities = (logits[0].double() / 1.5).softmax(0)
    counts = tokens.cpu().bincount(minlength=vocab)
    assert abs(chi_square_deviation(counts, probabilities)) < 5


@pytest.mark.parametrize(
    ("options", "support"),
    [
        ({"banned": [0, 2]}, [1, 3, 4, 5]),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_p": 0.6}, [0, 1]),
        ({"top_p": 0.5}, [0]),
        ({"min_p": 0.35}, [0, 1, 2]),
        ({"top_k": 3, "top_p": 0.95, "banned": [0]}, [1, 2, 3]),
    ],
    ids=lambda value: options_id(value) if isinstance(value, dict) else "",
)
def test_draws_follow_the_truncated_distribution(
    fast_kernel: Place, options: dict[str, Any], support: list[int]
) -> None:
    # Margins of 0.02 on either side of each threshold, so that the support is beyond doubt.
    p = torch.tensor([0.52, 0.20, 0.19, 0.05, 0.03, 0.01])
    rows = p.log().to(fast_kernel.device).expand(60_000, -1)
    tokens, logprobs = (t.cpu() for t in fused(rows, seed=fresh_seed(), **options))
    assert tokens.unique().tolist() == support
    kept = p[support].double() / p[support].double().sum()
    counts = tokens.bincount(minlength=6)[support]
    assert len(support) == 1 or abs(chi_square_deviation(counts, kept)) < 5
    expected = torch.full((6,), math.nan).index_copy(0, torch.tensor(support), kept.log().float())
    torch.testing.assert_close(logprobs, expected[tokens], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fewer_than_one_draw_in_100000_differs(cpu_or_gpu: Place, dtype: torch.dtype) -> None:
    draws, limit = (2_000_000, 35) if cpu_or_gpu.device == "cuda" else (50_000, 2)
    row = torch.randn(32_000).to(dtype)
    tokens, _ = fused(row.to(cpu_or_gpu.device).expand(draws, -1), seed=11)
    edges = row.double().exp().cumsum(0)
    uniform = philox_uniform(torch.tensor(11), torch.arange(draws))
    exact = torch.searchsorted(edges, uniform * edges[-1], right=True)
    assert int((tokens.cpu() != exact).sum()) <= limit


# ---- agreement with the reference


@pytest.mark.parametrize("options", OPTIONS, ids=options_id)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_tokens_as_the_reference(
    kernel: Place, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    if kernel.runs_cuda:  # 512 or 1024 elements are a warp's chunk
        shapes = [(2, 1030), (5, 4), (5, 513), (5, 3100)]
    elif dtype == torch.float32:
        shapes = [(48, vocab) for vocab in (4, 16, 17, 100, 1023, 1024, 1025, 5000)]
    else:  # bfloat16 logits tie often, so this also compares how ties at a threshold are kept
        shapes = [(64, 1300)]
    for shape in shapes:
        logits, seed = random(kernel, *shape, dtype), fresh_seed()
        ours = fused(logits, seed=seed, **options)
        assert ours[0].dtype == torch.int64
        assert ours[1].dtype == torch.float32
        same_draws(ours, reference(logits, seed=seed, **options))


def test_half_precision_special_values(kernel: Place) -> None:
    """Every float16 bit pattern is read right: subnormals, both zeros and -inf included."""
    values = torch.arange(-(2**15), 2**15, rows_at(kernel, 1, 61), dtype=torch.int16).view(torch.float16)
    values = values[values.isfinite() | (values == -math.inf)]
    rows = torch.stack([torch.zeros_like(values), values], 1)
    rows = rows[: rows_at(kernel, len(rows), 60)].to(kernel.device)
    same_draws(fused(rows), reference(rows))
    assert torch.equal(fused(rows, temperature=0)[0], (rows[:, 1] > 0).long())
    everything = values[::61].expand(5, -1).to(kernel.device)
    for options in ({}, {"top_k": 40}, {"top_p": 0.9, "temperature": 1e4}):
        same_draws(fused(everything, **options), reference(everything, **options))


@pytest.mark.parametrize("options", [{"top_k": 20}, {"top_p": 0.7}, {"min_p": 0.3}], ids=options_id)
def test_ties_at_a_threshold_are_all_kept(kernel: Place, options: dict[str, Any]) -> None:
    logits = torch.randint(-2, 2, (rows_at(kernel, 400, 30), 300), device=kernel.device).float()
    logits[:, ::3] *= -1.0  # zeros of both signs are one value
    same_draws(fused(logits, **options), reference(logits, **options))
    equal = torch.full((rows_at(kernel, 3000, 100), rows_at(kernel, 50)), 2.0, device=kernel.device)
    assert fused(equal, **options)[0].unique().numel() == equal.shape[1]


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4, 3e7, -1e30])
@pytest.mark.parametrize("temperature", [1e-25, 1e-4, 1.0, 1e6])
def test_extreme_magnitudes(kernel: Place, shift: float, temperature: float) -> None:
    logits = (torch.randn(rows_at(kernel, 64), 1100) * 2 + shift).to(kernel.device)
    for dtype in (torch.float32, torch.bfloat16):
        for options in ({}, {"top_p": 0.5}):
            options = {"temperature": temperature, **options}
            there = logits.to(dtype)
            same_draws(fused(there, **options), reference(there, **options))


@pytest.mark.parametrize("count", [1, 40, 64, 65, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_banned_tokens_are_never_drawn(kernel: Place, dtype: torch.dtype, count: int) -> None:
    vocab = 2500
    logits = random(kernel, rows_at(kernel, 500), vocab + 1, dtype)[:, 1:]
    banned = torch.cat([torch.randperm(vocab)[:count], torch.tensor([0, vocab - 1, 0])])
    logits[:, banned.to(kernel.device)] += 30
    for options in ({}, {"temperature": 0.0}, {"top_k": 10, "top_p": 0.9}):
        for some in (logits[:2], logits):
            ours = fused(some, banned=banned.to(kernel.device), **options)
            assert not torch.isin(ours[0].cpu(), banned).any()
            same_draws(ours, reference(some, banned=banned, **options))


def test_greedy_takes_the_lowest_id_of_a_tie(kernel: Place) -> None:
    logits = torch.randint(0, 3, (rows_at(kernel, 200), 2100), device=kernel.device).float()
    tokens, logprobs = fused(logits, temperature=0)
    assert torch.equal(tokens, (logits == 2).int().argmax(1))
    assert not logprobs.any()
    first = int(tokens[0])
    assert int(fused(logits[:1], temperature=0, banned=[first])[0]) > first


def test_minus_infinity_has_no_mass(kernel: Place) -> None:
    for dtype in DTYPES:
        low = -1e20 if dtype == torch.float32 else -6e4
        logits = torch.full((rows_at(kernel, 500, 30), 2500), -math.inf, dtype=dtype)
        logits = logits.to(kernel.device)
        logits[:, 2100] = low
        tokens, logprobs = fused(logits)
        assert (tokens == 2100).all()
        assert logprobs.abs().max() <= (1e-6 if kernel.runs_cuda else 0)
        logits[:, :1024] = torch.finfo(dtype).min  # a mask that other libraries write
        assert (fused(logits)[0] == 2100).all()
        logits[:, :1024] = -math.inf
        logits[:, 7] = low
        for options in ({}, {"top_k": 50}, {"top_p": 0.9}):
            assert fused(logits, seed=2, **options)[0].unique().tolist() == [7, 2100]


# ---- layouts, sizes and seeds


@pytest.mark.parametrize("options", [{}, {"top_k": 30, "top_p": 0.9}], ids=options_id)
def test_one_token_and_one_row(place: Place, options: dict[str, Any]) -> None:
    one = torch.randn(3, 1, device=place.device)
    tokens, logprobs = sample_tokens(one, seed=0, impl=place.impl, **options)
    assert tokens.tolist() == [0, 0, 0]
    torch.testing.assert_close(logprobs.cpu(), torch.zeros(3), atol=1e-6, rtol=0)
    logits = random(place, 1, 900)
    ours = sample_tokens(logits, seed=0, impl=place.impl, **options)
    same_draws(ours, reference(logits, **options))


def test_strides(kernel: Place) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        wide = random(kernel, rows_at(kernel, 40, 8), 1301, dtype)
        views = [wide[:, 1:], wide[::2, 3:1203], wide[:, :1], wide.T[: rows_at(kernel, 1301)]]
        for view in (*views, wide[:1].expand(rows_at(kernel, 30), -1)):
            want = fused(view.clone(memory_format=torch.contiguous_format))
            got = fused(view)
            assert torch.equal(got[0], want[0])
            assert kernel.runs_cuda or torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_the_rows_is_read(kernel: Place, dtype: torch.dtype) -> None:
    """Rows at every alignment, with NaN on either side."""
    for i, vocab in enumerate([1, 15, 17, 1024, 1030, *torch.randint(1, 2300, (8,)).tolist()]):
        lead = i % (16 // dtype.itemsize)
        wide = torch.full((5, lead + vocab + 13), math.nan, dtype=dtype, device=kernel.device)
        inner = wide[:, lead : lead + vocab]
        inner.copy_(torch.randn(5, vocab) * 3)
        for options in ({}, {"top_k": 9}):
            same_draws(fused(inner, **options), reference(inner, **options))


def test_the_seed_is_read_from_its_tensor(place: Place) -> None:
    logits = torch.zeros(5, 4000, device=place.device)
    seed = torch.zeros(1, dtype=torch.int64, device=place.device)
    for value in (0, 5, -3):
        seed.fill_(value)
        tensor = sample_tokens(logits, seed=seed, impl=place.impl)
        number = sample_tokens(logits, seed=value, impl=place.impl)
        assert torch.equal(tensor[0], number[0])
        same_draws(tensor, reference(logits, seed=value))


@pytest.mark.parametrize("options", [{}, {"top_k": 30, "top_p": 0.9}], ids=options_id)
def test_threads_and_batch_splits_change_nothing(
    simd: str, threads: None, options: dict[str, Any]
) -> None:
    logits = torch.randn(301, 2000)
    torch.set_num_threads(1)
    tokens, logprobs = fused(logits, seed=5, offset=10, **options)
    for count in (2, 3):
        torch.set_num_threads(count)
        again = fused(logits, seed=5, offset=10, **options)
        assert torch.equal(tokens, again[0])
        assert torch.equal(logprobs, again[1])
    parts = [
        fused(logits[a:b], seed=5, offset=10 + a, **options)[0]
        for a, b in ((0, 1), (1, 150), (150, 301))
    ]
    assert torch.equal(tokens, torch.cat(parts))
    assert not torch.equal(tokens, fused(logits, seed=6, offset=10, **options)[0])


# ---- on the CPU: errors, and torch


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_rows_that_cannot_be_sampled(impl: str, temperature: float, poison: float) -> None:
    logits = torch.randn(9, 1500)
    for column in (3, 1499):
        bad = logits.clone()
        bad[7] = -math.inf
        bad[7, column] = poison
        with pytest.raises(ValueError, match="logits row 7 cannot be sampled: it has a NaN or"):
            sample_tokens(bad, seed=0, temperature=temperature, impl=impl)


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_compiles_to_one_graph_for_any_number_of_rows(impl: str) -> None:
    def step(logits: Tensor, seed: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        return sample_tokens(logits * 2, top_k=top_k, banned=[1], seed=seed, impl=impl)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        logits, seed = torch.randn(rows, 50), torch.tensor([rows])
        assert torch.equal(compiled(logits, seed, 8)[0], step(logits, seed, 8)[0])

    def plain(logits: Tensor, seed: int) -> Tensor:
        return sample_tokens(logits, seed=seed, impl=impl)[0]

    compiled_plain = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for seed_number in (3, 4):
        logits = torch.randn(4, 30)
        assert torch.equal(compiled_plain(logits, seed_number), plain(logits, seed_number))


def test_no_gradient_and_inference_mode() -> None:
    logits = torch.randn(4, 30, requires_grad=True)
    assert not fused(logits)[1].requires_grad
    with torch.inference_mode():
        assert torch.equal(fused(logits)[0], fused(logits.detach())[0])


def test_the_gil_is_released() -> None:
    assert build_info()["native"]
    logits = torch.randn(1, 4000).expand(100_000, -1)
    stamps: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            stamps.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    begin = time.perf_counter()
    fused(logits)
    end = time.perf_counter()
    stop.set()
    ticker.join()
    inside = [begin, *(s for s in stamps if begin < s < end), end]
    longest = max(b - a for a, b in zip(inside, inside[1:], strict=False))
    assert longest < 0.7 * (end - begin), "the other thread stood still while the kernel ran"
