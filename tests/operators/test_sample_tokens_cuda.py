"""The CUDA kernel of sample_tokens: the same tests on the CPU (cuda_on_cpu) and on a device (gpu)."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from contract import captured
from sample_tokens_cases import OPTIONS, fresh_seed, fused, options_id, reference, same_draws
from torch import Tensor

from quietstar_ext import build_info, native
from quietstar_ext.sample_tokens.reference import philox_uniform

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ORDERS = ["forward", "reverse", "shuffled"]
# The pretended device of cuda_on_cpu has three multiprocessors: fewer rows than that take two launches.
FEW, SOME = 2, 5
# Numbers of rows that take blocks of one row, of two and of four, by device.
BLOCK_SHAPES = {"cpu": (2, 11, 25), "cuda": (100, 500, 1200)}
MODEL_SHAPES = [(1, 128_256), (64, 151_936), (300, 32_000), (600, 50_257)]

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def random(rows: int, vocab: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(rows, vocab) * 3).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_several_chunks(kernel_device: str, dtype: torch.dtype) -> None:
    """More than 512 chunks: some share a sum."""
    logits = random(SOME - 2, 530_000 if dtype == torch.bfloat16 else 270_000, kernel_device, dtype)
    for options in ({}, {"temperature": 0.0}, {"top_k": 3}):
        ours = fused(logits, **options)
        same_draws(ours, reference(logits, **options))


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
    # Of so many rows the middle one counts: one alone, a block per row, blocks of several rows.
    counts = (1, 3, 25) if kernel_device == "cpu" else (1, 300, 1200)
    for i, counter in enumerate(draws_near_edges(row, seed, 24).tolist()):
        count = counts[i % 3]
        options = {"seed": seed, "offset": counter - count // 2}
        rows = row.expand(count, -1)
        ours = fused(rows.to(kernel_device), **options)[0][count // 2]
        with native.cuda_on_cpu(None):  # type: ignore[arg-type]
            assert int(ours) == int(fused(rows, **options)[0][count // 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("vocab", "options"),
    [
        *((3200, options) for options in ({}, {"top_k": 30}, {"temperature": 0.7})),
        *((17_000, options) for options in ({}, {"top_p": 0.8}, {"temperature": 0.0})),
        (70_000, {}),
    ],
    ids=str,
)
def test_a_row_does_not_depend_on_the_others(
    kernel_device: str, dtype: torch.dtype, vocab: int, options: dict[str, Any]
) -> None:
    """Nor on how the rows are cut up: a few take two launches, and one alone, too. To the last bit."""
    rows = SOME if kernel_device == "cpu" else 300
    logits = random(rows, vocab, kernel_device, dtype)
    tokens, logprobs = fused(logits, seed=5, offset=10, **options)
    parts = [slice(0, 1), *(slice(first, first + FEW) for first in range(0, rows, FEW))]
    for part in (*parts, slice(rows - FEW, rows)):
        alone = fused(logits[part], seed=5, offset=10 + part.start, **options)
        assert torch.equal(alone[0], tokens[part])
        assert torch.equal(alone[1], logprobs[part])


@pytest.mark.parametrize("banned", [None, [7, 3333, 7001], range(0, 7003, 100)], ids=str)
def test_blocks_of_every_size_find_the_same(kernel_device: str, banned: Any) -> None:
    """The more rows, the smaller are the blocks of 16-bit logits. Rows lie at every alignment."""
    few, some, many = BLOCK_SHAPES[kernel_device]
    logits = random(many, 7003, kernel_device, torch.bfloat16)
    options = {"seed": fresh_seed(), "banned": None if banned is None else list(banned)}
    tokens, logprobs = fused(logits, **options)
    same_draws((tokens, logprobs), reference(logits, **options))
    for rows in (few, some):
        fewer = fused(logits[:rows], **options)
        assert torch.equal(fewer[0], tokens[:rows])
        assert torch.equal(fewer[1], logprobs[:rows])


def large_rows(rows: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits of which two of three rows are too large for the first pass, so that most blocks of several
    rows have some; which rows these are (half of their tokens tie, at 300); and options."""
    logits = random(rows, 2101, device, dtype)
    large = torch.arange(rows, device=device) % 3 > 0
    logits[large] = torch.randint(299, 301, (int(large.sum()), 2101), device=device).to(dtype)
    return logits, large, {"seed": fresh_seed(), "temperature": 2e-4}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_that_a_whole_block_adds_up_again(kernel_device: str, dtype: torch.dtype) -> None:
    few, some, many = BLOCK_SHAPES[kernel_device]
    logits, large, options = large_rows(many, kernel_device, dtype)
    tokens, logprobs = fused(logits, **options)
    same_draws((tokens, logprobs), reference(logits, **options))
    assert (logits[large].gather(1, tokens[large, None]) == 300).all()
    for rows in (few, some):
        fewer = fused(logits[:rows], **options)
        assert torch.equal(fewer[0], tokens[:rows])
        assert torch.equal(fewer[1], logprobs[:rows])


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


@pytest.mark.cuda_on_cpu
def test_the_order_of_threads_in_blocks_of_several_rows(cuda_on_cpu: ModuleType) -> None:
    logits, _, options = large_rows(BLOCK_SHAPES["cpu"][-1], "cpu", torch.bfloat16)
    want = reference(logits, **options)
    for order, seed in [*((order, 11) for order in ORDERS), *(("uneven", seed) for seed in range(4))]:
        cuda_on_cpu.set_order(order, seed)
        same_draws(fused(logits, **options), want)


@pytest.mark.cuda_on_cpu
def test_how_many_launches_few_rows_take(cuda_on_cpu: ModuleType) -> None:
    for vocab, dtype, launches in (
        (9000, torch.float32, 2),
        (9000, torch.bfloat16, 1),
        (65_528, torch.bfloat16, 1),  # 64 chunks wherever the row begins
        (65_530, torch.bfloat16, 2),
    ):
        before = cuda_on_cpu.launches()
        fused(torch.randn(FEW, vocab).to(dtype))
        assert cuda_on_cpu.launches() == before + launches


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


# ---- on a device only


class TestDevice:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("options", OPTIONS, ids=options_id)
    @pytest.mark.parametrize("shape", MODEL_SHAPES, ids=str)
    def test_sizes_of_models(self, shape: tuple[int, int], options: dict[str, Any]) -> None:
        for dtype in DTYPES:
            logits, seed = random(*shape, "cuda", dtype), fresh_seed()
            same_draws(
                fused(logits, seed=seed, **options),
                reference(logits, seed=seed, **options),
            )

    @pytest.mark.parametrize("options", [{}, {"top_k": 50, "top_p": 0.9}], ids=options_id)
    @pytest.mark.parametrize("rows", [3, 400])
    def test_a_captured_graph_draws_anew(self, rows: int, options: dict[str, Any]) -> None:
        logits = torch.randn(rows, 32_000, device="cuda")
        seed = torch.zeros(1, dtype=torch.int64, device="cuda")
        banned = torch.arange(100, device="cuda")
        options = {**options, "banned": banned, "seed": seed}
        graph, drawn = captured(lambda: fused(logits, **options))
        for value in (1, 2):
            seed.fill_(value)
            for tensor in drawn:
                tensor.fill_(-7)
            graph.replay()
            want = fused(logits, **options)
            assert torch.equal(drawn[0], want[0])
            assert torch.equal(drawn[1], want[1])
        assert not torch.equal(want[0], fused(logits, **{**options, "seed": 1})[0])

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
