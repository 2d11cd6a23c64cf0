"""What inductor makes of compiled code for a CUDA device, without the device and without Triton.

Every graph that torch.compile gives to inductor is copied, moved to a CUDA device of fake tensors, and
lowered by inductor's own passes and scheduler, as on an H200. So fusion is a device's: on the CPU
inductor would fuse by other rules, and split no reductions. The code that it writes is read instead of
run: a call of a Triton kernel is a launch, and so is each call of an extern kernel (a product of
cuBLAS). The names of the kernels are those that a profile of an H200 shows. What tuning on a device
would choose is not seen; it changes a kernel, and not their number.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from benchmarks.launches import MULTIPROCESSORS, Launches

DEVICE = torch.device("cuda", 0)
H200 = SimpleNamespace(
    name="NVIDIA H200",
    multi_processor_count=MULTIPROCESSORS,
    major=9,
    minor=0,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block_optin=232448,
    total_memory=141 << 30,
    L2_cache_size=50 << 20,
)
# A launch: a Triton kernel, a library's, or an operator that inductor hands on.
_LAUNCH = re.compile(
    r"(?P<fused>triton_\w+)\.run\(|extern_kernels\.(?P<extern>\w+)\(|(?P<op>torch\.ops\.[\w.]+)\("
)


class _Written(Exception):
    """Inductor is done as far as it is wanted; holds the code."""


def cuda_code(graph: GraphModule, inputs: list[Any], options: dict[str, Any]) -> str:
    """The Python code that inductor writes for a graph on an H200: it allocates, and launches.

    Args:
        graph: behind AOTAutograd, as inductor's ``inner_compile`` gets it; inputs: its fake tensors and
            sizes; options: the others that it gets.
    """
    graph, inputs = _on_cuda(graph, inputs)
    written = []

    def stop(lowering: GraphLowering) -> None:
        written.append(str(getattr(lowering.codegen()[0], "value", "")))
        raise _Written

    with _pretended_device(), mock.patch.object(GraphLowering, "compile_to_module", stop):
        try:
            compile_fx.compile_fx_inner(graph, inputs, **options)
        except Exception:
            if not written:
                raise
    return written[0]


def launches_in(code: str) -> Counter[str]:
    """The launches in a wrapper's code by name."""
    body = code[code.index("def call(") :].split("\ndef ")[0]
    found: Counter[str] = Counter()
    for match in _LAUNCH.finditer(body):
        found[match["fused"] or match["extern"] or match["op"]] += 1
    return found


@contextlib.contextmanager
def compiled_for_cuda(launches: Launches) -> Iterator[None]:
    """``torch.compile`` inside the block compiles for a CUDA device, and what it compiles runs as it is
    and counts what the device would launch."""

    def inner(graph: GraphModule, inputs: list[Any], **options: Any) -> Callable[[list[Any]], Any]:
        found = launches_in(cuda_code(graph, inputs, options))

        def run(args: list[Any]) -> Any:
            for name, count in found.items():
                launches.add("fused" if name.startswith("triton_") else "products", name, count)
            taken, args[:] = list(args), []
            with launches.uncounted():
                return graph(*taken)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(graph: GraphModule, inputs: list[Any]) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=inner)

    torch._dynamo.reset()
    try:
        with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=backend)):
            yield
    finally:
        torch._dynamo.reset()


def _on_cuda(graph: GraphModule, inputs: list[Any]) -> tuple[GraphModule, list[Any]]:
    def moved(value: Any) -> Any:
        return DEVICE if isinstance(value, torch.device) else value

    graph = copy.deepcopy(graph)
    for node in graph.graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, moved), map_aggregate(node.kwargs, moved)
    graph.recompile()
    fake = torch._guards.detect_fake_mode(inputs)
    assert fake is not None
    with fake:
        return graph, [_twin(each) if isinstance(each, Tensor) else each for each in inputs]


def _twin(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)


@contextlib.contextmanager
def _pretended_device() -> Iterator[None]:
    """An H200 for whoever asks for a device's properties, and no Triton where its version goes into a
    kernel's text."""
    answers: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "get_device_properties": H200,
            "get_device_capability": (9, 0),
            "current_device": 0,
        },
        CudaInterface: {
            "get_device_properties": H200,
            "get_compute_capability": 90,
            "is_bf16_supported": True,
        },
        torch.utils._triton: {"triton_hash_with_backend": "none"},
        torch._inductor.scheduler: {"has_triton": True},
    }
    with contextlib.ExitStack() as stack:
        for place, values in answers.items():
            for name, value in values.items():
                answer: Any = functools.partial(_given, value)
                answer = staticmethod(answer) if isinstance(place, type) else answer
                stack.enter_context(mock.patch.object(place, name, answer))
        stack.enter_context(inductor_config.patch(fx_graph_cache=False))
        # As a method it makes sure of the device first, which a build without CUDA cannot have.
        stack.enter_context(mock.patch.object(Tensor, "copy_", _copy))
        yield


def _copy(self: Tensor, src: Tensor) -> Tensor:
    return torch.ops.aten.copy_.default(self, src)


def _given(value: Any, *asked: Any, **options: Any) -> Any:
    return value
