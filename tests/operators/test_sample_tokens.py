"""sample_tokens: the distribution, agreement with the reference, determinism, and odd inputs.

Every call that is about the kernel says impl="fused", which raises instead of falling back.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import pytest
import torch
from sample_tokens_cases import OPTIONS, chi_square_deviation, fresh_seed, options_id
from torch import Tensor

from quietstar_ext import build_info, sample_tokens
from quietstar_ext.native import native
from quietstar_ext.sample_tokens.reference import philox_uniform


def fused(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return sample_tokens(logits, **{"seed": 0, **options}, impl="fused")


def reference(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return sample_tokens(logits, **{"seed": 0, **options}, impl="reference")


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Equal but for one draw in the batch that may fall on an interval's edge."""
    same = ours[0] == theirs[0]
    assert int((~same).sum()) <= 1
    torch.testing.assert_close(ours[1][same], theirs[1][same], atol=3e-6, rtol=1e-6)


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
def test_draws_follow_the_softmax(simd: str, vocab: int) -> None:
    draws = 600_000 if vocab < 1000 else 100_000
    logits = torch.randn(1, vocab)
    tokens, _ = fused(logits.expand(draws, -1), seed=fresh_seed(), temperature=1.5)
    probabilities = (logits[0].double() / 1.5).softmax(0)
    assert abs(chi_square_deviation(tokens.bincount(minlength=vocab), probabilities)) < 5


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
    simd: str, options: dict[str, Any], support: list[int]
) -> None:
    # Margins of 0.02 on either side of each threshold, so that the support is beyond doubt.
    p = torch.tensor([0.52, 0.20, 0.19, 0.05, 0.03, 0.01])
    tokens, logprobs = fused(p.log().expand(60_000, -1), seed=fresh_seed(), **options)
    assert tokens.unique().tolist() == support
    kept = p[support].double() / p[support].double().sum()
    counts = tokens.bincount(minlength=6)[support]
    assert len(support) == 1 or abs(chi_square_deviation(counts, kept)) < 5
    expected = torch.full((6,), math.nan).index_copy(0, torch.tensor(support), kept.log().float())
    torch.testing.assert_close(logprobs, expected[tokens], atol=1e-6, rtol=1e-6)


def test_banned_tokens_are_never_drawn(simd: str) -> None:
    vocab = 3000
    logits = torch.randn(2000, vocab)
    banned = torch.randperm(vocab)[:1500]
    logits[:, banned] += 20
    tokens, logprobs = fused(logits, seed=fresh_seed(), banned=banned)
    assert not torch.isin(tokens, banned).any()
    allowed = logits.index_fill(1, banned, -math.inf).log_softmax(1)
    torch.testing.assert_close(logprobs, allowed.gather(1, tokens[:, None])[:, 0])


# ---- agreement with the reference


@pytest.mark.parametrize("vocab", [4, 16, 17, 100, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("options", OPTIONS, ids=options_id)
def test_same_tokens_as_the_reference(simd: str, options: dict[str, Any], vocab: int) -> None:
    logits, seed = torch.randn(48, vocab) * 3, fresh_seed()
    assert_same(fused(logits, seed=seed, **options), reference(logits, seed=seed, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=options_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(simd: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    # bfloat16 logits tie often, so this also compares how ties at a threshold are kept.
    logits = (torch.randn(64, 1300) * 3).to(dtype)
    ours = fused(logits, seed=7, **options)
    assert ours[0].dtype == torch.int64
    assert ours[1].dtype == torch.float32
    assert_same(ours, reference(logits, seed=7, **options))


def test_half_precision_special_values(simd: str) -> None:
    """Every float16 bit pattern is read right: subnormals, both zeros and -inf included."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    values = values[values.isfinite() | (values == -math.inf)]
    logits = values.reshape(-1, 1)
    rows = torch.cat([torch.zeros_like(logits), logits], 1)
    assert_same(fused(rows), reference(rows))
    assert torch.equal(fused(rows, temperature=0)[0], (logits[:, 0] > 0).long())


@pytest.mark.parametrize("options", [{"top_k": 20}, {"top_p": 0.7}, {"min_p": 0.3}], ids=options_id)
def test_ties_at_a_threshold_are_all_kept(simd: str, options: dict[str, Any]) -> None:
    logits = torch.randint(0, 4, (400, 300)).float()
    ours, theirs = fused(logits, **options), reference(logits, **options)
    assert_same(ours, theirs)
    equal = torch.full((3000, 50), 2.0)
    assert fused(equal, **options)[0].unique().numel() == 50


def test_fewer_than_one_draw_in_100000_differs() -> None:
    draws, logits = 50_000, torch.randn(1, 32_000)
    tokens, _ = fused(logits.expand(draws, -1), seed=11)
    edges = logits[0].double().exp().cumsum(0)
    uniform = philox_uniform(torch.tensor(11), torch.arange(draws))
    exact = torch.searchsorted(edges, uniform * edges[-1], right=True)
    assert int((tokens != exact).sum()) <= 2


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4, 3e7, -1e30])
@pytest.mark.parametrize("temperature", [1e-25, 1e-4, 1.0, 1e6])
def test_extreme_magnitudes(simd: str, shift: float, temperature: float) -> None:
    logits = torch.randn(64, 1500) * 2 + shift
    options = {"temperature": temperature}
    assert_same(fused(logits, **options), reference(logits, **options))


# ---- greedy


def test_greedy_takes_the_lowest_id_of_a_tie(simd: str) -> None:
    logits = torch.randint(0, 3, (200, 2100)).float()
    tokens, logprobs = fused(logits, temperature=0)
    assert torch.equal(tokens, (logits == 2).int().argmax(1))
    assert not logprobs.any()
    first = int(tokens[0])
    assert int(fused(logits[:1], temperature=0, banned=[first])[0]) > first


# ---- determinism


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


def test_seed_may_be_a_tensor() -> None:
    logits = torch.randn(20, 100)
    for impl in ("fused", "reference"):
        number = sample_tokens(logits, seed=-3, impl=impl)
        tensor = sample_tokens(logits, seed=torch.tensor(-3), impl=impl)
        assert torch.equal(number[0], tensor[0])


# ---- layouts and sizes


def test_strided_and_unaligned_rows(simd: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        wide = torch.randn(40, 1301).to(dtype)
        for view in (wide[:, 1:], wide[::2, 3:1203], wide[:, :1]):
            want = fused(view.clone())
            got = fused(view)
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])
        columns = wide.T  # the elements of a row do not lie side by side
        assert torch.equal(fused(columns)[0], fused(columns.contiguous())[0])
        shared = wide[:1].expand(30, -1)
        assert torch.equal(fused(shared)[0], fused(shared.contiguous())[0])


def test_nothing_outside_the_row_is_read(simd: str) -> None:
    for vocab in (1, 15, 17, 1024, 1030):
        padded = torch.full((10, vocab + 64), math.nan)
        inner = padded[:, 32 : 32 + vocab]
        inner.copy_(torch.randn(10, vocab))
        assert_same(fused(inner), reference(inner))


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_no_rows_and_one_token(impl: str) -> None:
    tokens, logprobs = sample_tokens(torch.empty(0, 10), seed=0, impl=impl)
    assert tokens.shape == logprobs.shape == (0,)
    tokens, logprobs = sample_tokens(torch.randn(3, 1), seed=0, impl=impl)
    assert tokens.tolist() == [0, 0, 0]
    torch.testing.assert_close(logprobs, torch.zeros(3), atol=1e-6, rtol=0)


def test_minus_infinity_has_no_mass(simd: str) -> None:
    logits = torch.full((500, 2500), -math.inf)
    logits[:, 2100] = -1e20
    tokens, logprobs = fused(logits)
    assert (tokens == 2100).all()
    assert not logprobs.any()
    logits[:, :1024] = torch.finfo(torch.float32).min  # a mask that other libraries write
    assert (fused(logits)[0] == 2100).all()
    logits[:, 7] = -1e20
    for options in ({}, {"top_k": 50}, {"top_p": 0.9}):
        assert fused(logits, seed=2, **options)[0].unique().tolist() == [7, 2100]


# ---- errors


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
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected 0 or"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1; expected 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0; expected a number above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -0.1}, "min_p is -0.1; expected a number from 0 to 1"),
        ({"banned": [4]}, "banned contains 4; expected values from 0 to 3"),
        ({"banned": [-1]}, "banned contains -1"),
        ({"banned": [3, 0, 1, 2]}, "no token is left|banned has all 4 ids"),
        ({"banned": torch.zeros(1)}, "banned has dtype float32; expected int64"),
        ({"seed": 2**63}, "seed is 9223372036854775808; expected a number that fits"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed is a int64 tensor of 2 elements"),
        ({"seed": torch.zeros(1)}, "seed is a float32 tensor of 1 elements"),
    ],
    ids=lambda value: options_id(value) if isinstance(value, dict) else "",
)
def test_bad_options(impl: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_tokens(torch.zeros(2, 4), **{"seed": 0, **options}, impl=impl)


def test_bad_logits() -> None:
    with pytest.raises(TypeError, match="logits is a list; expected a torch.Tensor"):
        sample_tokens([[0.0]], seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"logits has shape \[3\]; expected \[rows, vocab\]"):
        sample_tokens(torch.zeros(3), seed=0)
    with pytest.raises(ValueError, match="logits has dtype int64"):
        sample_tokens(torch.zeros(1, 3, dtype=torch.int64), seed=0)
    with pytest.raises(ValueError, match="logits has no columns"):
        sample_tokens(torch.zeros(3, 0), seed=0)
    with pytest.raises(RuntimeError, match="impl='fused' cannot be used here.*not float64"):
        fused(torch.zeros(1, 3, dtype=torch.float64))


# ---- torch


def test_opcheck() -> None:
    seed = torch.tensor([3])
    for banned in (None, torch.tensor([1])):
        for use_kernel in (True, False):
            arguments = (torch.randn(6, 40), 1.0, 5, 0.9, 0.01, banned, seed, 0, use_kernel)
            torch.library.opcheck(torch.ops.quietstar.sample_tokens.default, arguments)


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_compiles_to_one_graph(impl: str) -> None:
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
