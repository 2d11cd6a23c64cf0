"""thought_attention's CUDA kernels: the same tests on the CPU (cuda_on_cpu) and on a device (gpu).

Tiles: 128 rows forward (fp32: 64), 32 keys; backward 128 rows x 32 keys, then 128 keys x 64 rows
(D over 96: 32 rows; D over 128: smaller). Rows are (column, slot, grouped head).
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_budget import NAMES, assert_within_budget, case, ours, truth
from attention_cases import SHAPES, sizes_alone
from torch import Tensor

from quietstar_ext.native import cuda_device, cuda_kernels
from quietstar_ext.thought_attention import thought_attention

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture
def device(kernel_device: str) -> str:
    return kernel_device


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in SHAPES for dtype in (torch.bfloat16, torch.float32)),
        *((name, torch.float16) for name in ("packed", "text rows", "everything")),
    ],
    ids=str,
)
def test_shapes(device: str, name: str, dtype: torch.dtype) -> None:
    assert_within_budget(*case(SHAPES[name], dtype, device))


#                 B  Hq Hkv Sq Sk  M  N   D
TILES = {
    "D64": (1, 4, 1, 5, 5, 10, 70, 64, {}),
    "D80": (1, 2, 1, 7, 7, 10, 70, 80, {"sliding_window": 40}),
    "D96": (1, 4, 1, 5, 5, 8, 40, 96, {"softcap": 4.0}),
    "D128": (1, 4, 1, 5, 5, 8, 135, 128, {"sinks": True}),
    "D256": (1, 2, 1, 6, 6, 6, 40, 256, {}),
    "few rows per column": (1, 1, 1, 1, 5, 70, 40, 32, {}),
    "many slots": (1, 1, 1, 37, 37, 4, 33, 32, {}),
    "slots in a window": (1, 4, 1, 21, 21, 3, 20, 64, {"sliding_window": 6, "sinks": True}),
    "many slots in a window": (1, 1, 1, 37, 37, 4, 33, 32, {"sliding_window": 5}),
    "few rows in a window": (1, 1, 1, 1, 40, 20, 33, 32, {"sliding_window": 7, "softcap": 4.0}),
    "two batch rows and heads": (2, 4, 2, 4, 9, 5, 66, 40, {"sinks": True, "sliding_window": 30}),
}


@pytest.mark.parametrize("name", TILES)
def test_several_tiles(device: str, name: str) -> None:
    for dtype in (torch.bfloat16, torch.float32) if TILES[name][7] != 96 else (torch.float16,):
        tensors, start, stop, options = case(TILES[name], dtype, device)
        stop = stop.sort(-1).values
        start = torch.minimum(start, stop // 2).int()
        assert_within_budget(tensors, start, stop, options)


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("order", ["reverse", "shuffled", "uneven"])
def test_the_order_of_threads_changes_no_bit(cuda_on_cpu: ModuleType, order: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        inputs = case((1, 4, 1, 5, 5, 8, 40, 64, {"sinks": True}), dtype, "cpu")
        cuda_on_cpu.set_order("forward", 0)
        wanted = ours(*inputs)
        cuda_on_cpu.set_order(order, torch.initial_seed())
        assert all(torch.equal(a, b) for a, b in zip(ours(*inputs), wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 4, 2, 1, 3, 1, 300, 64, {}),
        (2, 2, 1, 1, 0, 2, 150, 40, {"sinks": True}),
        (1, 2, 2, 1, 9, 1, 400, 128, {"sliding_window": 90, "sinks": True}),
        (1, 2, 1, 1, 40, 1, 200, 64, {"sliding_window": 5, "sinks": True}),
    ],
    ids=["grouped heads", "no slots", "window", "window within the slots"],
)
def test_few_rows_are_split_over_their_keys(
    device: str, shape: tuple[Any, ...], dtype: torch.dtype
) -> None:
    tensors, start, stop, options = case(shape, dtype, device)
    start = start // 4
    sizes = (*shape[:3], *shape[3:8])
    needed = cuda_kernels().cuda_thought_attention_workspace(
        sizes_alone(dtype, sizes), False, cuda_device(tensors[0])
    )
    assert needed > 0  # out and lse of each split
    assert_within_budget(tensors, start, stop, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_addresses(device: str, dtype: torch.dtype) -> None:
    """Views with gaps, starting anywhere; heads last; parts of a cache; one row for all columns."""
    tensors, start, stop, options = case((2, 4, 2, 2, 3, 7, 21, 24), dtype, device)

    def in_gaps(t: Tensor, by: int) -> Tensor:
        buffer = t.new_full([size + by for size in t.shape], torch.nan)
        view = buffer[tuple(slice(by, None) for _ in t.shape)]
        with torch.no_grad():
            view.copy_(t)
        return view.detach().requires_grad_()

    def heads_last(t: Tensor) -> Tensor:
        return t.detach().movedim(1, -2).contiguous().movedim(-2, 1).requires_grad_()

    def transposed(t: Tensor) -> Tensor:
        return t.detach().mT.contiguous().mT.requires_grad_()

    for change in (
        lambda t: in_gaps(t, 1),
        lambda t: in_gaps(t, 8),
        heads_last,
        transposed,
        lambda t: t.detach()[:, :, :1].expand_as(t).requires_grad_(),
    ):
        assert_within_budget([change(t) for t in tensors], start, stop, options)


@pytest.mark.parametrize("kind", ["shuffled", "shared", "documents", "everything", "nothing"])
def test_ranges(device: str, kind: str) -> None:
    shape = (1, 2, 1, 4, 4, 40, 150, 32)
    tensors, start, stop, options = case(shape, torch.bfloat16, device)
    anchors = torch.arange(1, 41, device=device, dtype=torch.int32)[None] * 150 // 40
    start = torch.zeros_like(start)
    if kind == "shuffled":
        stop = anchors[:, torch.randperm(40, device=device)]
    elif kind == "shared":
        stop = anchors // 25 * 25
    elif kind == "documents":
        stop, start = anchors, (anchors // 50 * 50).int().clamp(max=anchors)
    elif kind == "everything":
        start, stop = start - 2**31, stop.fill_(2**31 - 1)
    else:
        start, stop = anchors, anchors - 1
    assert_within_budget(tensors, start.int(), stop.int(), options)


@pytest.mark.parametrize("scale", [0.0, -0.4, 3.0])
def test_scales(device: str, scale: float) -> None:
    shape = (1, 2, 1, 3, 3, 6, 20, 16, {"scale": scale})
    tensors, start, stop, options = case(shape, torch.float32, device)
    found, exact = ours(tensors, start, stop, options), truth(tensors, start, stop, options)
    for name, a, b in zip(NAMES, found, exact, strict=False):
        torch.testing.assert_close(
            a.double(), b, rtol=1e-5, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_tf32_by_torchs_own_switch(device: str) -> None:
    inputs = case((1, 4, 2, 3, 3, 10, 40, 64), torch.float32, device)
    exact = truth(*inputs)
    before = torch.backends.cuda.matmul.fp32_precision
    errors: dict[str, list[float]] = {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            found = ours(*inputs)
            errors[precision] = [
                float((a - b).nan_to_num(0, 0, 0).abs().max()) for a, b in zip(found, exact, strict=True)
            ]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for plain, rounded in zip(errors["ieee"], errors["tf32"], strict=True):
        assert plain < 1e-5 < 2e-5 < rounded < 2e-2


def test_large_logits(device: str) -> None:
    tensors, start, stop, options = case((1, 2, 1, 2, 2, 3, 40, 16), torch.float32, device)
    tensors = [(t.detach() * 300).requires_grad_() for t in tensors]
    found, exact = ours(tensors, start, stop, options), truth(tensors, start, stop, options)
    for a, b in zip(found[:2], exact[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-2)
    assert all(t.isfinite().all() for t in found[2:])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nan_stays_in_its_row(device: str, dtype: torch.dtype, softcap: float | None) -> None:
    tensors, start, stop, _ = case((1, 2, 1, 3, 3, 8, 40, 16), dtype, device)
    start.zero_()
    stop.fill_(40)
    with torch.no_grad():
        tensors[0][0, 0, 1, 4] = torch.nan
    out, lse = thought_attention(*tensors, start, stop, softcap=softcap, return_lse=True, impl="fused")
    assert out[0, 0, 1, 4].isnan().all() and lse[0, 0, 1, 4].isnan()
    assert int(out.isnan().any(-1).sum()) == 1
    dq, dk_text, *_ = torch.autograd.grad(out.sum(), tensors)
    assert dq[0, 0, 1, 4].isnan().all() and int(dq.isnan().any(-1).sum()) == 1
    assert dk_text.isnan().all()


@pytest.mark.parametrize(
    "shape", [(0, 2, 1, 2, 2, 3, 4, 8), (1, 2, 1, 2, 2, 0, 4, 8), (1, 2, 1, 1, 0, 3, 0, 8)], ids=str
)
@pytest.mark.cuda_on_cpu
def test_empty(cuda_on_cpu: ModuleType, shape: tuple[int, ...]) -> None:
    tensors, start, stop, options = case(shape, torch.bfloat16, "cpu")
    out, lse = thought_attention(*tensors, start, stop, return_lse=True, impl="fused")
    assert out.shape == tensors[0].shape and lse.shape == out.shape[:-1]
    assert not out.any() and (lse == -torch.inf).all()
    for grad in torch.autograd.grad(out.sum(), tensors, allow_unused=True, materialize_grads=True):
        assert not grad.any()


@pytest.mark.cuda_on_cpu
def test_head_sizes_past_the_kernels(cuda_on_cpu: ModuleType, caplog: Any) -> None:
    tensors, start, stop, _ = case((1, 1, 1, 1, 1, 2, 3, 264), torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="take head sizes up to 256, not 264"):
        thought_attention(*tensors, start, stop, impl="fused")
    before = cuda_on_cpu.launches()
    out = thought_attention(*tensors, start, stop)
    assert cuda_on_cpu.launches() == before
    assert torch.equal(out, thought_attention(*tensors, start, stop, impl="reference"))


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_failed_launch_is_an_error(cuda_on_cpu: ModuleType, number: int) -> None:
    tensors, start, stop, _ = case((1, 1, 1, 1, 1, 2, 3, 8), torch.bfloat16, "cpu")
    cuda_on_cpu.fail_launch(number)
    with pytest.raises(RuntimeError, match="kernel thought_attention.*: injected launch failure"):
        thought_attention(*tensors, start, stop, impl="fused").sum().backward()


def draw(*values: Any) -> Any:
    return values[int(torch.randint(len(values), ()))]


def random_case(device: str, large: int) -> tuple[Any, ...]:
    hkv, groups = draw(1, 2), draw(1, 2, 3, 4)
    sk = draw(0, 1, 2, 5, 15, 17)
    sq = draw(1, sk, max(1, sk - 2)) if sk else 1
    size, length = draw(2, 8, 24, 33, 64, 72, 96, 128), draw(0, 1, 31, 64, 40 * large)
    columns = draw(1, 2, 7, 12 * large)
    options: dict[str, Any] = {"sinks": draw(True, False)}
    if draw(True, False):
        options["sliding_window"] = int(torch.randint(1, draw(12, 100), ()))
    if draw(True, False, False):
        options["softcap"] = 2.5
    shape = (draw(1, 2), hkv * groups, hkv, sq, sk, columns, length, size, options)
    print(shape)
    tensors, start, stop, options = case(shape, draw(*DTYPES), device)
    if draw(True, False):
        stop = stop.sort(-1).values
        start = torch.minimum(start, stop).int()
    return tensors, start, stop, options


@pytest.mark.parametrize("number", range(6))
def test_random_shapes_and_options(device: str, number: int) -> None:
    assert_within_budget(*random_case(device, 1), factor=4)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(60))
def test_many_random_shapes_and_options(device: str, number: int) -> None:
    assert_within_budget(*random_case(device, 4), factor=4)


@pytest.mark.parametrize("name", ["everything"])
def test_operators_are_registered_well(device: str, name: str) -> None:
    tensors, start, stop, options = case(SHAPES[name], torch.float32, device)
    inputs = [t.detach() for t in tensors]
    sinks = options["sinks"].detach() if "sinks" in options else None
    rest = (0.3, options.get("sliding_window", 0), options.get("softcap", 0.0))
    operators = torch.ops.quietstar
    call = (*inputs, start, stop, sinks, *rest)
    torch.library.opcheck(operators.thought_attention.default, call)
    out, lse = operators.thought_attention(*call)
    grads = (out, lse, torch.randn_like(out), torch.randn_like(lse))
    torch.library.opcheck(
        operators.thought_attention_backward.default,
        (*inputs, start, stop, sinks, *rest, *grads),
    )


def captured(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


class TestOnAGpu:
    pytestmark = on_a_gpu
    #        B  Hq Hkv Sq  Sk  M    N     D
    PACKED = (1, 8, 2, 15, 15, 300, 300, 128)

    def causal(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        tensors, start, stop, options = case(shape, dtype, "cuda")
        anchors = torch.arange(1, shape[5] + 1, device="cuda", dtype=torch.int32)
        stop = (anchors * shape[6] // shape[5]).int().expand_as(stop).contiguous()
        return tensors, torch.zeros_like(start), stop, options

    @pytest.mark.parametrize("size", [64, 96, 128, 256])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_large(self, dtype: torch.dtype, size: int) -> None:
        """Within the budget, and twice the same bits."""
        inputs = self.causal((*self.PACKED[:7], size), dtype)
        found = assert_within_budget(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(ours(*inputs), found, strict=True))

    @pytest.mark.parametrize("shape", [(4, 32, 8, 1, 9, 1, 4096, 128), (2, 8, 8, 1, 5, 512, 512, 64)])
    def test_steps(self, shape: tuple[int, ...]) -> None:
        assert_within_budget(*self.causal(shape, torch.bfloat16))

    def test_a_graph_sees_new_inputs(self) -> None:
        tensors, start, stop, options = self.causal(self.PACKED, torch.bfloat16)
        kept: list[Tensor] = []

        def call() -> None:
            out, lse = thought_attention(*tensors, start, stop, return_lse=True, impl="fused")
            loss_grads = [torch.ones_like(out), torch.ones_like(lse)]
            kept[:] = [out, lse, *torch.autograd.grad([out, lse], tensors, loss_grads)]

        graph = captured(call)
        with torch.no_grad():
            for t in tensors:
                t.copy_(torch.randn_like(t))
            stop.copy_(stop.flip(-1))
        graph.replay()
        got = [t.clone() for t in kept]
        call()
        assert all(torch.equal(a, b) for a, b in zip(got, kept, strict=True))

    def test_does_not_wait_for_the_device(self) -> None:
        tensors, start, stop, _ = self.causal(self.PACKED, torch.bfloat16)
        ours(tensors, start, stop, {})
        grad = torch.randn_like(tensors[0])
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = thought_attention(*tensors, start, stop, impl="fused")
            torch.autograd.grad(out, tensors, grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_another_stream(self) -> None:
        inputs = self.causal(self.PACKED, torch.bfloat16)
        wanted = ours(*inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = ours(*inputs)
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
    def test_another_device(self) -> None:
        tensors, start, stop, _ = self.causal(self.PACKED, torch.bfloat16)
        wanted = thought_attention(*tensors, start, stop, impl="fused")
        there = [t.detach().to("cuda:1") for t in (*tensors, start, stop)]
        got = thought_attention(*there, impl="fused")
        assert torch.equal(got.cpu(), wanted.cpu())

    def test_offsets_past_two_to_the_31(self) -> None:
        """The last rows of q lie past 2^31 elements; keys and values too, by their strides."""
        columns, size = 2**31 // (16 * 8 * 128) + 700, 128
        if torch.cuda.mem_get_info()[0] < 16 * 2**30:
            pytest.skip("less than 16 GiB are free")
        q = torch.randn(1, 8, 16, columns, size, device="cuda", dtype=torch.bfloat16)
        assert q.numel() > 2**31
        k_text, v_text = torch.randn(2, 1, 1, 64, size, device="cuda", dtype=torch.bfloat16)
        k, v = torch.randn(2, 1, 1, 16, columns, size, device="cuda", dtype=torch.bfloat16)
        stop = torch.randint(0, 65, (1, columns), device="cuda", dtype=torch.int32)
        start = torch.zeros_like(stop)
        out = thought_attention(q, k_text, v_text, k, v, start, stop, impl="fused")
        some = slice(columns - 50, None)
        wanted = thought_attention(
            *(q[:, :, :, some].float(), k_text.float(), v_text.float()),
            *(k[:, :, :, some].float(), v[:, :, :, some].float()),
            *(start[:, some], stop[:, some]),
            impl="reference",
        )
        torch.testing.assert_close(out[:, :, :, some].float(), wanted, rtol=2e-2, atol=2e-2)
