"""thought_attention's CUDA kernels: the same tests on the CPU (cuda_on_cpu) and on a device (gpu).

Tiles: 128 rows forward (fp32: 64), 32 keys; backward 128 rows x 32 keys (D to 64: 64 keys), then
64 text keys x 32 rows (D over 64: 128 keys; D over 128: smaller) and 16 slot keys x 64 rows. Rows are
(column, slot, grouped head).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from attention_budget import NAMES, assert_within_budget, case, ours, truth
from attention_cases import SHAPES, draw, random_shape, sizes_alone
from contract import captured
from torch import Tensor

from quietstar_ext.native import cuda_device, cuda_kernels
from quietstar_ext.thought_attention import thought_attention

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


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
    "many columns to 16 slot keys": (1, 15, 1, 1, 1, 20, 9, 64, {}),
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
@pytest.mark.parametrize("shape", [(1, 4, 1, 5, 5, 8, 40, 64), (1, 4, 1, 33, 33, 1, 5, 64)], ids=str)
def test_the_order_of_threads_changes_no_bit(
    cuda_on_cpu: ModuleType, order: str, shape: tuple[int, ...]
) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        inputs = case((*shape, {"sinks": True}), dtype, "cpu")
        cuda_on_cpu.set_order("forward", 0)
        wanted = ours(*inputs)
        for seed in range(5 if order == "uneven" else 1):
            cuda_on_cpu.set_order(order, torch.initial_seed() + seed)
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


@pytest.mark.cuda_on_cpu
def test_head_sizes_past_the_kernels(cuda_on_cpu: ModuleType, caplog: Any) -> None:
    tensors, start, stop, _ = case((1, 1, 1, 1, 1, 2, 3, 264), torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="take head sizes up to 256, not 264"):
        thought_attention(*tensors, start, stop, impl="fused")
    before = cuda_on_cpu.launches()
    out = thought_attention(*tensors, start, stop)
    assert cuda_on_cpu.launches() == before
    assert torch.equal(out, thought_attention(*tensors, start, stop, impl="reference"))


def random_case(device: str, large: int) -> tuple[Any, ...]:
    sizes, lengths = (2, 8, 24, 33, 64, 72, 96, 128), (0, 1, 31, 64, 40 * large)
    shape = random_shape((0, 1, 2, 5, 15, 17), sizes, lengths, (1, 2, 7, 12 * large))
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

        def call() -> list[Tensor]:
            out, lse = thought_attention(*tensors, start, stop, return_lse=True, impl="fused")
            loss_grads = [torch.ones_like(out), torch.ones_like(lse)]
            return [out, lse, *torch.autograd.grad([out, lse], tensors, loss_grads)]

        graph, kept = captured(call)
        with torch.no_grad():
            for t in tensors:
                t.copy_(torch.randn_like(t))
            stop.copy_(stop.flip(-1))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(kept, call(), strict=True))

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
