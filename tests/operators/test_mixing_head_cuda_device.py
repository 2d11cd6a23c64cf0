"""mixing_head on a GPU alone: large shapes, graphs, streams, waits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mixing_head_cases import NAMES, concatenated, gradients, make
from mixing_head_cuda_cases import (
    DTYPES,
    fused,
    make_with_large_biases,
    moved,
    on_a_gpu,
    truth,
)
from torch import Tensor

from quietstar_ext import mixing_head


def replayed(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of the call, captured on a stream beside the main one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def assert_near(got: list[Tensor], wanted: list[Tensor]) -> None:
    """Equal but for the rounding of products that PyTorch may make in another order."""
    for name, a, b in zip(["mixed", "w", *NAMES], got, wanted, strict=True):
        error = float((a.double() - b.double()).detach().norm())
        assert error <= 8 * torch.finfo(b.dtype).eps * float(b.detach().double().norm()), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestOnAGpu:
    pytestmark = on_a_gpu

    def test_large(self, dtype) -> None:
        """Twice the same bits, and the reference's numbers.

        Errors are summed over draws. With these biases a column of h2 is on in all rows or in none, so
        the gradients of b2 all have the error of one sum over the rows: a single number, which in one
        draw is often several times torch's, or a fraction of it.
        """
        names = ["mixed", "w", *NAMES]
        errors, budgets, sizes = (dict.fromkeys(names, 0.0) for _ in range(3))
        for _ in range(8):
            tensors, index = make_with_large_biases(700, 5003, 1096, dtype, "cuda")
            ours = fused(tensors, "sigmoid", index)
            again = fused(tensors, "sigmoid", index)
            assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
            outputs = concatenated(tensors, "sigmoid", index)
            theirs = [*outputs, *gradients(outputs, tensors)]
            exact = truth(tensors, "sigmoid", index)
            for name, t, a, b in zip(names, exact, ours, theirs, strict=True):
                errors[name] += float((a - t).norm())
                budgets[name] += float((b - t).norm())
                sizes[name] += float(t.norm())
        unit = 4 * torch.finfo(dtype).eps
        for name in names:
            assert errors[name] <= 1.5 * budgets[name] + unit * sizes[name], name

    def test_a_graph_sees_new_inputs(self, dtype) -> None:
        tensors, index = make_with_large_biases(40, 130, 64, dtype, "cuda")
        grads = [torch.randn(130, size, device="cuda").to(dtype) for size in (64, 1)]
        kept: list[Tensor] = []

        def call() -> None:
            outputs = mixing_head(*tensors, base_index=index, impl="fused")
            kept[:] = [*outputs, *torch.autograd.grad(outputs, tensors, grads)]

        graph = replayed(call)
        captured = list(kept)
        with torch.no_grad():
            for t in (*tensors, *grads):
                t.copy_(t.flip(0))
            index.copy_(torch.randint_like(index, 0, 40))
        graph.replay()
        call()
        assert_near(captured, kept)

    def test_does_not_wait_for_the_device(self, dtype) -> None:
        tensors, index = moved(make(40, 130, 64, True, dtype=dtype), "cuda")
        fused(tensors, "identity", index)
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = mixing_head(*tensors, base_index=index, impl="fused")
            grads = [torch.ones_like(o) for o in outputs]
            torch.autograd.grad(outputs, tensors, grads)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_another_stream(self, dtype) -> None:
        tensors, index = make_with_large_biases(40, 130, 64, dtype, "cuda")
        wanted = fused(tensors, "identity", index)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = fused(tensors, "identity", index)
        stream.synchronize()
        assert_near(got, wanted)

    def test_the_second_device(self, dtype) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("there is one CUDA device")
        tensors, index = moved(make(40, 130, 64, True, dtype=dtype), "cuda:1")
        got, wanted = fused(tensors, "identity", index), truth(tensors, "identity", index)
        assert torch.cuda.current_device() == 0
        assert got[0].device == torch.device("cuda:1")
        assert float((got[0] - wanted[0]).norm()) <= 0.05 * float(wanted[0].norm())

    def test_compiles_as_one_graph(self, dtype) -> None:
        torch.compiler.reset()
        tensors, index = moved(make(5, 23, 16, True, dtype=dtype), "cuda")

        @torch.compile(fullgraph=True, backend="aot_eager")
        def compiled(*inputs):
            return mixing_head(*inputs, "sigmoid", base_index=index, impl="fused")

        got = compiled(*tensors)
        wanted = mixing_head(*tensors, "sigmoid", base_index=index, impl="fused")
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(gradients(got, tensors), gradients(wanted, tensors))

    def test_opcheck(self, dtype) -> None:
        tensors, index = moved(make(5, 9, 8, True, dtype=dtype), "cuda")
        tensors = [t.detach() for t in tensors]
        forward = torch.ops.quietstar.mixing_head_forward
        torch.library.opcheck(forward, (*tensors, index, True))
        mixed, w, *kept = forward(*tensors, index, True)
        grads = torch.randn_like(mixed), torch.randn_like(w)
        torch.library.opcheck(
            torch.ops.quietstar.mixing_head_backward,
            (*tensors, index, True, *kept, *grads, [True] * 7),
        )
