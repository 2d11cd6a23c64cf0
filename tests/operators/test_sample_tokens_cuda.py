"""The CUDA kernel of sample_tokens: the same tests on the CPU (cuda_on_cpu) and on a device (gpu)."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from sample_tokens_cases import OPTIONS, chi_square_deviation, fresh_seed, options_id
from torch import Tensor

from quietstar_ext import build_info, native, sample_tokens
from quietstar_ext.sample_tokens.call import SampleTokens, Sampling
from quietstar_ext.sample_tokens.reference import philox_uniform
from quietstar_ext.sample_tokens.reference import reference as reference_of_sample_tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ORDERS = ["forward", "reverse", "shuffled"]
# The pretended device of cuda_on_cpu has three multiprocessors: fewer rows than that take two launches.
FEW, SOME = 2, 5
MODEL_SHAPES = [(1, 128_256), (64, 151_936), (300, 32_000), (600, 50_257)]

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def fused(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return sample_tokens(logits, **{"seed": 0, **options}, impl="fused")


def reference(logits: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """In float64. Rows that cannot be sampled are marked, and not refused as on the CPU."""
    values: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "banned": None}
    values |= {name: options[name] for name in values if name in options}
    if values["banned"] is not None:
        values["banned"] = torch.as_tensor(values["banned"]).cpu()
    values |= {"seed": torch.tensor([options.get("seed", 0)]), "offset": options.get("offset", 0)}
    return reference_of_sample_tokens(SampleTokens(logits.cpu(), Sampling(**values), fused=False))


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Equal but for one draw in the batch that may fall on an interval's edge."""
    tokens, logprobs = ours[0].cpu(), ours[1].cpu()
    same = tokens == theirs[0]
    assert int((~same).sum()) <= 1
    torch.testing.assert_close(logprobs[same], theirs[1][same], atol=3e-6, rtol=1e-6)


def random(rows: int, vocab: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(rows, vocab) * 3).to(device, dtype)


# ---- agreement with the reference


@pytest.mark.parametrize("options", OPTIONS, ids=options_id)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_tokens_as_the_reference(
    kernel_device: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    # 512 or 1024 elements are a warp's chunk.
    for rows, vocab in ((FEW, 1030), (SOME, 4), (SOME, 513), (SOME, 3100)):
        logits, seed = random(rows, vocab, kernel_device, dtype), fresh_seed()
        ours = fused(logits, seed=seed, **options)
        assert ours[0].dtype == torch.int64
        assert ours[1].dtype == torch.float32
        assert_same(ours, reference(logits, seed=seed, **options))


@pytest.mark.parametrize("options", [{}, {"top_k": 30, "top_p": 0.9}], ids=options_id)
def test_one_token_and_one_row(kernel_device: str, options: dict[str, Any]) -> None:
    tokens, logprobs = fused(torch.randn(3, 1, device=kernel_device), **options)
    assert tokens.tolist() == [0, 0, 0]
    torch.testing.assert_close(logprobs.cpu(), torch.zeros(3), atol=1e-6, rtol=0)
    logits = random(1, 900, kernel_device)
    assert_same(fused(logits, **options), reference(logits, **options))


@pytest.mark.cuda_on_cpu
def test_no_rows(cuda_on_cpu: ModuleType) -> None:
    before = cuda_on_cpu.launches()
    tokens, logprobs = fused(torch.empty(0, 10))
    assert tokens.shape == logprobs.shape == (0,)
    assert cuda_on_cpu.launches() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_several_chunks(kernel_device: str, dtype: torch.dtype) -> None:
    """More than 512 chunks: some share a sum."""
    logits = random(SOME - 2, 530_000 if dtype == torch.bfloat16 else 270_000, kernel_device, dtype)
    for options in ({}, {"temperature": 0.0}, {"top_k": 3}):
        ours = fused(logits, **options)
        assert_same(ours, reference(logits, **options))


@pytest.mark.parametrize("options", [{}, {"top_k": 30}, {"temperature": 0.7}], ids=options_id)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(
    kernel_device: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Tokens and log-probabilities, to the last bit; with few rows they take two launches."""
    rows = SOME if kernel_device == "cpu" else 1000
    logits = random(rows, 3200, kernel_device, dtype)
    tokens, logprobs = fused(logits, seed=3, **options)
    for first, stop in ((0, 1), (rows - FEW, rows)):
        alone = fused(logits[first:stop], seed=3, offset=first, **options)
        assert torch.equal(alone[0], tokens[first:stop])
        assert torch.equal(alone[1], logprobs[first:stop])


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4, 3e7, -1e30])
@pytest.mark.parametrize("temperature", [1e-25, 1e-4, 1.0, 1e6])
def test_extreme_magnitudes(kernel_device: str, shift: float, temperature: float) -> None:
    logits = (torch.randn(SOME, 1100) * 2 + shift).to(kernel_device)
    for dtype in (torch.float32, torch.bfloat16):
        for options in ({}, {"top_p": 0.5}):
            options = {"temperature": temperature, **options}
            there = logits.to(dtype)
            assert_same(fused(there, **options), reference(there, **options))


def test_half_precision_special_values(kernel_device: str) -> None:
    """Every float16 bit pattern is read right: subnormals, both zeros and -inf included."""
    values = torch.arange(-(2**15), 2**15, 61, dtype=torch.int16).view(torch.float16)
    values = values[values.isfinite() | (values == -math.inf)]
    rows = torch.stack([values, torch.zeros_like(values)], 1)[: 60 if kernel_device == "cpu" else None]
    rows = rows.to(kernel_device)
    assert_same(fused(rows), reference(rows))
    everything = values.expand(SOME, -1).to(kernel_device)
    for options in ({}, {"top_k": 40}, {"top_p": 0.9, "temperature": 1e4}):
        assert_same(fused(everything, **options), reference(everything, **options))


@pytest.mark.parametrize("options", [{"top_k": 20}, {"top_p": 0.7}, {"min_p": 0.3}], ids=options_id)
def test_ties_at_a_threshold_are_all_kept(kernel_device: str, options: dict[str, Any]) -> None:
    logits = torch.randint(-2, 2, (30, 300), device=kernel_device).float()
    logits[:, ::3] *= -1.0  # zeros of both signs are one value
    assert_same(fused(logits, **options), reference(logits, **options))
    equal = torch.full((100, 5), 2.0, device=kernel_device)
    assert fused(equal, **options)[0].unique().numel() == 5


# ---- agreement with the CPU kernel, to the edge


def draws_near_edges(row: Tensor, seed: int, count: int) -> Tensor:
    """The counters, out of a million, whose numbers fall closest to an edge between two tokens."""
    edges = row.double().softmax(0).cumsum(0)
    uniform = philox_uniform(torch.tensor([seed]), torch.arange(1_000_000))
    above = torch.searchsorted(edges, uniform).clamp(max=len(row) - 1)
    distance = torch.minimum(
        (edges[above] - uniform).abs(), (edges[(above - 1).clamp(min=0)] - uniform).abs()
    )
    return distance.topk(count, largest=False).indices


@pytest.mark.skipif(
    build_info().get("simd") not in ("avx2", "avx512"), reason="plain C++ rounds products otherwise"
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_at_the_edges_are_those_of_the_cpu_kernel(kernel_device: str, dtype: torch.dtype) -> None:
    """Numbers some 10^-9 from an edge. The exp2 unit and sums in fp32 would move it further: in these
    rows all tokens are one of two sizes, so that what is wrong with one size adds up."""
    row = torch.where(torch.arange(4096) < 2048, -0.3, 0.7).to(dtype)
    if dtype == torch.float32:
        row = torch.randn(4096)
    seed = fresh_seed()
    for counter in draws_near_edges(row, seed, 24).tolist():
        # Three rows of which the middle one counts: one launch with a block per row.
        options = {"seed": seed, "offset": counter - 1}
        rows = row.expand(3, -1)
        ours = fused(rows.to(kernel_device), **options)[0][1]
        with native.cuda_on_cpu(None):  # type: ignore[arg-type]
            assert int(ours) == int(fused(rows, **options)[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"temperature": 0.0}], ids=options_id)
def test_one_launch_or_two(kernel_device: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """A row's token does not depend on the rows that come with it, nor on how the row is cut up."""
    rows = SOME if kernel_device == "cpu" else 300
    logits = random(rows, 17_000, kernel_device, dtype)
    tokens, logprobs = fused(logits, seed=5, offset=10, **options)
    for first in range(0, rows, FEW):
        part = fused(logits[first : first + FEW], seed=5, offset=10 + first, **options)
        assert torch.equal(part[0], tokens[first : first + FEW])
        torch.testing.assert_close(part[1], logprobs[first : first + FEW], atol=1e-6, rtol=1e-6)


# ---- banned ids


@pytest.mark.parametrize("count", [1, 40, 64, 65, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_banned_ids(kernel_device: str, dtype: torch.dtype, count: int) -> None:
    vocab = 2500
    logits = random(SOME, vocab + 1, kernel_device, dtype)[:, 1:]
    banned = torch.cat([torch.randperm(vocab)[:count], torch.tensor([0, vocab - 1, 0])])
    logits[:, banned.to(kernel_device)] += 30
    for options in ({}, {"temperature": 0.0}, {"top_k": 10, "top_p": 0.9}):
        for rows in (FEW, SOME):
            ours = fused(logits[:rows], banned=banned.to(kernel_device), **options)
            assert not torch.isin(ours[0].cpu(), banned).any()
            assert_same(ours, reference(logits[:rows], banned=banned, **options))


def test_a_strided_tensor_of_banned_ids(kernel_device: str) -> None:
    logits = random(SOME, 50, kernel_device)
    ids = torch.arange(50, device=kernel_device)[::2]
    assert (fused(logits, banned=ids)[0] % 2 == 1).all()


# ---- rows that cannot be sampled


@pytest.mark.parametrize("rows", [FEW, SOME])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_cannot_be_sampled_are_marked(
    kernel_device: str, dtype: torch.dtype, rows: int
) -> None:
    good = random(rows, 2100, kernel_device, dtype)
    for poison in (math.nan, math.inf, -math.inf):
        for options in ({}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.5}):
            bad = good.clone()
            if poison == -math.inf:
                bad[1] = poison
            else:
                bad[1, torch.randint(2100, ())] = poison
            tokens, logprobs = fused(bad, **options)
            assert tokens[1] == -1
            assert logprobs[1].isnan()
            want = fused(good, **options)
            others = torch.arange(rows) != 1
            assert torch.equal(tokens[others], want[0][others])
            assert torch.equal(logprobs[others], want[1][others])


@pytest.mark.parametrize("count", [4, 100])
def test_nothing_is_left_after_the_banned_ids(kernel_device: str, count: int) -> None:
    logits = torch.randn(SOME, count + 1, device=kernel_device)
    logits[:, count] = -math.inf
    tokens, logprobs = fused(logits, banned=torch.arange(count, device=kernel_device))
    assert (tokens == -1).all()
    assert logprobs.isnan().all()


def test_minus_infinity_has_no_mass(kernel_device: str) -> None:
    for dtype in DTYPES:
        logits = torch.full((30, 2500), -math.inf, dtype=dtype, device=kernel_device)
        logits[:, 2100] = -6e4
        tokens, logprobs = fused(logits)
        assert (tokens == 2100).all()
        assert logprobs.abs().max() < 1e-6
        logits[:, :1024] = torch.finfo(dtype).min  # a mask that other libraries write
        assert (fused(logits)[0] == 2100).all()
        logits[:, :1024] = -math.inf
        logits[:, 7] = -6e4
        for options in ({}, {"top_k": 50}, {"top_p": 0.9}):
            assert fused(logits, seed=2, **options)[0].unique().tolist() == [7, 2100]


# ---- layouts


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_the_rows_is_read(kernel_device: str, dtype: torch.dtype) -> None:
    """Rows at every alignment, with NaN on either side."""
    for lead in range(16 // dtype.itemsize):
        vocab = int(torch.randint(1, 2300, ()))
        wide = torch.full((SOME, lead + vocab + 13), math.nan, dtype=dtype, device=kernel_device)
        inner = wide[:, lead : lead + vocab]
        inner.copy_(torch.randn(SOME, vocab) * 3)
        for options in ({}, {"top_k": 9}):
            assert_same(fused(inner, **options), reference(inner, **options))


def test_strides(kernel_device: str) -> None:
    wide = random(8, 1301, kernel_device, torch.bfloat16)
    for view in (wide[::2, 3:1203], wide.T[:5], wide[:1].expand(5, -1), wide[:, :1]):
        want = fused(view.clone(memory_format=torch.contiguous_format))
        assert torch.equal(fused(view)[0], want[0])


# ---- determinism and order


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("rows", [FEW, SOME])
def test_the_order_of_threads_changes_nothing(cuda_on_cpu: ModuleType, rows: int) -> None:
    for dtype in DTYPES:
        logits = random(rows, 2600, "cpu", dtype)
        for options in ({}, {"temperature": 0.0}, {"top_k": 90, "top_p": 0.8}, {"banned": [3] * 70}):
            found = []
            for order in ORDERS:
                cuda_on_cpu.set_order(order, 11)
                found.append(fused(logits, seed=3, **options))
            for tokens, logprobs in found[1:]:
                assert torch.equal(tokens, found[0][0])
                assert torch.equal(logprobs, found[0][1])


def test_the_seed_is_read_from_its_tensor(kernel_device: str) -> None:
    logits = torch.zeros(SOME, 4000, device=kernel_device)
    seed = torch.zeros(1, dtype=torch.int64, device=kernel_device)
    for value in (0, 5, -3):
        seed.fill_(value)
        assert torch.equal(fused(logits, seed=seed)[0], fused(logits, seed=value)[0])
        assert_same(fused(logits, seed=seed), reference(logits, seed=value))


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("rows", [FEW, SOME])
def test_a_launch_that_fails(cuda_on_cpu: ModuleType, rows: int) -> None:
    logits = torch.randn(rows, 9000)
    launches = 1 if rows == SOME else 2
    for skip in range(launches):
        cuda_on_cpu.fail_launch(skip)
        with pytest.raises(RuntimeError, match="sample_tokens.*injected launch failure"):
            fused(logits)
    before = cuda_on_cpu.launches()
    fused(logits)
    assert cuda_on_cpu.launches() == before + launches


def test_opcheck(kernel_device: str) -> None:
    seed = torch.tensor([3], device=kernel_device)
    for banned in (None, torch.tensor([1], device=kernel_device)):
        logits = torch.randn(4, 40, device=kernel_device)
        arguments = (logits, 1.0, 5, 0.9, 0.01, banned, seed, 0, True)
        torch.library.opcheck(torch.ops.quietstar.sample_tokens.default, arguments)


# ---- on a device only


class TestDevice:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("options", OPTIONS, ids=options_id)
    @pytest.mark.parametrize(
        "shape", [(1, 128_256), (64, 151_936), (300, 32_000), (600, 50_257)], ids=str
    )
    def test_sizes_of_models(self, shape: tuple[int, int], options: dict[str, Any]) -> None:
        for dtype in DTYPES:
            logits, seed = random(*shape, "cuda", dtype), fresh_seed()
            assert_same(
                fused(logits, seed=seed, **options),
                reference(logits, seed=seed, **options),
            )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_fewer_than_one_draw_in_100000_differs(self, dtype: torch.dtype) -> None:
        draws, row = 2_000_000, torch.randn(32_000).to(dtype)
        tokens, _ = fused(row.cuda().expand(draws, -1), seed=11)
        edges = row.double().exp().cumsum(0)
        uniform = philox_uniform(torch.tensor(11), torch.arange(draws))
        exact = torch.searchsorted(edges, uniform * edges[-1], right=True)
        assert int((tokens.cpu() != exact).sum()) <= 35

    def test_draws_follow_the_softmax(self) -> None:
        logits = torch.randn(1, 2500)
        tokens, _ = fused(logits.cuda().expand(1_000_000, -1), seed=fresh_seed(), temperature=1.5)
        probabilities = (logits[0].double() / 1.5).softmax(0)
        counts = tokens.cpu().bincount(minlength=2500)
        assert abs(chi_square_deviation(counts, probabilities)) < 5

    @pytest.mark.parametrize("options", [{}, {"top_k": 50, "top_p": 0.9}], ids=options_id)
    @pytest.mark.parametrize("rows", [3, 400])
    def test_a_captured_graph_draws_anew(self, rows: int, options: dict[str, Any]) -> None:
        logits = torch.randn(rows, 32_000, device="cuda")
        seed = torch.zeros(1, dtype=torch.int64, device="cuda")
        banned = torch.arange(100, device="cuda")
        options = {**options, "banned": banned, "seed": seed}
        fused(logits, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn = fused(logits, **options)
        for value in (1, 2):
            seed.fill_(value)
            for tensor in drawn:
                tensor.fill_(-7)
            graph.replay()
            want = fused(logits, **options)
            assert torch.equal(drawn[0], want[0])
            assert torch.equal(drawn[1], want[1])
        assert not torch.equal(want[0], fused(logits, **{**options, "seed": 1})[0])

    def test_nothing_waits_for_the_device(self) -> None:
        logits, banned = torch.randn(8, 900, device="cuda"), torch.arange(80, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            for options in ({}, {"top_k": 5, "top_p": 0.5}, {"banned": banned}, {"temperature": 0.0}):
                fused(logits, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_another_stream(self) -> None:
        stream = torch.cuda.Stream()
        logits = torch.zeros(64, 32_000, device="cuda")
        later = torch.randn(64, 32_000, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            logits.copy_(later)
            tokens, _ = fused(logits)
        stream.synchronize()
        assert torch.equal(tokens, fused(later)[0])

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
    def test_another_device(self) -> None:
        logits = torch.randn(64, 32_000, device="cuda:1")
        assert torch.equal(fused(logits)[0].cpu(), fused(logits.to("cuda:0"))[0].cpu())

    def test_more_than_2_to_the_31_elements(self) -> None:
        # A multiple of 8: the copy below then lies in memory as the part does, and is cut into the same
        # chunks, so that sums are the same to the last bit.
        rows, vocab = 70_000, 32_000
        logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device="cuda").normal_()
        tokens, logprobs = fused(logits, seed=4)
        part = slice(rows - 300, rows)
        want = fused(logits[part].clone(), seed=4, offset=rows - 300)
        assert torch.equal(tokens[part], want[0])
        assert torch.equal(logprobs[part], want[1])
