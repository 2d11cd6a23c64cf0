"""The mixing head's operators and first derivatives: products of PyTorch, our kernels between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quietstar_ext.derivatives import first_only, reject_batched
from quietstar_ext.mixing_head.call import Mixed, MixingHead, MixingHeadBackward
from quietstar_ext.native import (
    DTYPE_CODES,
    cuda_device,
    cuda_kernels,
    fields,
    native,
    native_unsupported_reason,
    takes_cuda_path,
)
from quietstar_ext.operators import register
from quietstar_ext.precision import wide_product

Sizes = tuple[int, int, int, int, bool]  # dtype's number, rows, positions, width, sigmoid

# The tensors of MixingHead in csrc/include/quietstar/mixing_head.h, in its order.
_TENSORS = (
    *("index", "base", "thought", "from_base", "product", "b1", "h1", "h2", "b2", "w3", "mixed", "w"),
    *("gate", "grad_mixed", "grad_gate", "grad_thought", "grad_base", "grad_h1", "grad_from_base"),
    *("grad_h2", "grad_b1", "grad_b2", "grad_w3", "first", "order", "workspace"),
)


def fused_unsupported_reason(thought: Tensor) -> str | None:
    """Half a sentence on why no kernel takes these rows, or None where one does."""
    reason = native_unsupported_reason(thought)
    if reason is None and takes_cuda_path(thought):
        width, limit = thought.shape[1], max_width(thought.device)
        if width > limit:
            return f"the CUDA kernel takes widths up to {limit} on this device, not {width}"
    return reason


@torch.compiler.assume_constant_result
def max_width(device: torch.device) -> int:
    """Of the CUDA kernels: beyond it they need more shared memory than a block may have."""
    width: int = cuda_kernels().cuda_mixing_max_width((device.index or 0, 0))
    return width


def fused(call: MixingHead) -> tuple[Tensor, Tensor]:
    """mixed [rows, d] and w [rows, 1]."""
    mixed, w = _MixingHead.apply(call.sigmoid, *call[:8])
    return mixed, w


class _MixingHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sigmoid: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        mixed, w, *kept = forward_operator(*tensors, sigmoid)
        ctx.save_for_backward(*tensors, *kept)
        ctx.sigmoid = sigmoid
        return mixed, w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        reject_batched("mixing_head", grads[0])
        wanted = ctx.needs_input_grad[1:8]
        tensors, kept = ctx.saved_tensors[:8], ctx.saved_tensors[8:]
        with torch.no_grad():
            results = backward_operator(*tensors, ctx.sigmoid, *kept, *grads, wanted)
        shown = [g if want else None for g, want in zip(results, wanted, strict=True)]
        return (None, *first_only("mixing_head", tensors[:7], shown), None)


def _launch(step: str, sizes: Sizes, tensors: dict[str, Tensor | None]) -> None:
    """Run a step; ``tensors`` are contiguous, by their names in the kernels' struct."""
    thought = tensors["thought"]
    assert thought is not None
    taken = fields(*sizes, *map(tensors.get, _TENSORS), torch.get_num_threads())
    if takes_cuda_path(thought):
        getattr(cuda_kernels(), f"cuda_mixing_{step}")(taken, cuda_device(thought))
    else:
        getattr(native(), f"mixing_{step}")(taken)


def _forward(call: MixingHead) -> Mixed:
    """Whether or not there are rows."""
    call = call.laid_out()
    base, thought, _, b1, w2, b2, w3, index, sigmoid = call
    rows, size = thought.shape
    mixed, w = torch.empty_like(thought), thought.new_empty(rows, 1)
    gate = thought.new_empty(rows, dtype=torch.float32)
    if rows == 0 or size == 0:
        act_of_0 = 0.5 if sigmoid else 0.0
        kept = gate.fill_(act_of_0), torch.empty_like(thought), torch.empty_like(thought)
        return Mixed(mixed, w.fill_(act_of_0), *kept)
    # A bias added after the product was rounded to 16 bits could end on relu's other side.
    bias_in_kernel = not takes_cuda_path(thought) and thought.dtype == torch.float32
    tensors: dict[str, Tensor | None] = {"index": index, "base": base, "thought": thought, "b1": b1}
    products = _first_products(call)
    tensors.update(w3=w3, mixed=mixed, w=w, gate=gate, **products)
    sizes = (DTYPE_CODES[thought.dtype], rows, base.shape[0], size, sigmoid)
    _launch("first", sizes, tensors)
    h2 = torch.nn.functional.linear(products["h1"], w2, None if bias_in_kernel else b2)
    tensors.update(h2=h2, b2=b2 if bias_in_kernel else None)
    _launch("tail", sizes, tensors)
    if not takes_cuda_path(thought):
        w.copy_(gate[:, None])
    return Mixed(mixed, w, gate, products["h1"], h2)


def _first_products(call: MixingHead) -> dict[str, Tensor]:
    """The products of the first layer, of which the kernel makes h1 = relu(product + from_base[index]).

    The halves must not be rounded to 16 bits before they cancel, or many a relu switches. On CUDA both
    stay in fp32 until they are added. On the CPU the base half is taken in fp32 and cut in two: the
    upper part goes into the product's own fp32 sum, and the kernel adds the rest, far smaller, to the
    rounded result.
    """
    base, thought, w1, b1, *_, index, _ = call
    size, is_float32 = thought.shape[1], base.dtype == torch.float32
    w_base, w_thought = w1[:, :size], w1[:, size:]
    if takes_cuda_path(thought):
        product = wide_product(thought, w_thought.T)
        h1 = product if is_float32 else torch.empty_like(thought)
        return {"from_base": wide_product(base, w_base.T), "product": product, "h1": h1}
    if is_float32:
        return {"from_base": torch.addmm(b1, base, w_base.T), "h1": thought @ w_thought.T}
    from_base = torch.addmm(b1.float(), base.float(), w_base.float().T)
    upper = from_base.to(base.dtype)
    rest = from_base.sub_(upper).to(base.dtype)
    h1 = upper if index is None else upper.index_select(0, index)
    return {"from_base": rest, "h1": h1.addmm_(thought, w_thought.T)}


def _backward(call: MixingHeadBackward) -> list[Tensor]:
    """Gradients of base, thought, w1, b1, w2, b2 and w3; empty where not wanted."""
    base, thought, w1, _, w2, _, w3, index, sigmoid = forward = call.forward.laid_out()
    _, gate, h1, h2, grad_mixed, grad_w, wanted = call
    (rows, size), positions, dtype = thought.shape, base.shape[0], thought.dtype
    if thought.numel() == 0:
        shapes = forward.gradient_shapes()
        return [base.new_zeros(s if want else (0,)) for s, want in zip(shapes, wanted, strict=True)]
    on_cuda, code = takes_cuda_path(thought), DTYPE_CODES[dtype]
    grad_base, grad_from_base = torch.empty_like(base), torch.empty_like(base)
    grad_thought, grad_h1, grad_h2 = (torch.empty_like(thought) for _ in range(3))
    sums = dtype if on_cuda else torch.float32
    grad_b1, grad_b2, grad_w3 = (thought.new_empty(size, dtype=sums) for _ in range(3))
    tensors: dict[str, Tensor | None] = {"index": index, "base": base, "thought": thought, "w3": w3}
    tensors.update(gate=gate, h1=h1, h2=h2, grad_mixed=grad_mixed.contiguous())
    tensors.update(grad_gate=grad_w.flatten().float().contiguous(), grad_thought=grad_thought)
    tensors.update(grad_base=grad_base, grad_from_base=grad_from_base, grad_h1=grad_h1, grad_h2=grad_h2)
    tensors.update(grad_b1=grad_b1, grad_b2=grad_b2, grad_w3=grad_w3)
    if on_cuda:
        needed = cuda_kernels().cuda_mixing_workspace(code, rows, positions, size)
        tensors["workspace"] = thought.new_empty(needed, dtype=torch.float32)
    sizes = (code, rows, positions, size, sigmoid)
    _launch("tail_backward", sizes, tensors)
    torch.mm(grad_h2, w2, out=grad_h1)
    if on_cuda:
        tensors["first"], tensors["order"] = _rows_of_positions(index, positions)
    _launch("first_backward", sizes, tensors)

    nothing = base.new_empty(0)
    grad_w1 = w1.new_empty(w1.shape) if wanted[2] else nothing
    if wanted[0]:
        grad_base.addmm_(grad_from_base, w1[:, :size])
    if wanted[1]:
        grad_thought.addmm_(grad_h1, w1[:, size:])
    if wanted[2]:
        torch.mm(grad_from_base.T, base, out=grad_w1[:, :size])
        torch.mm(grad_h1.T, thought, out=grad_w1[:, size:])
    grad_w2 = grad_h2.T @ h1 if wanted[4] else nothing
    results = grad_base, grad_thought, grad_w1, grad_b1, grad_w2, grad_b2, grad_w3[None]
    return [
        result.to(dtype) if want else nothing.clone()
        for result, want in zip(results, wanted, strict=True)
    ]


def _rows_of_positions(index: Tensor | None, positions: int) -> tuple[Tensor | None, Tensor | None]:
    """first [positions + 1] and order [rows], int64: the rows of position p are
    ``order[first[p]:first[p + 1]]``, in ascending order. None for no index, row for row."""
    if index is None:
        return None, None
    # A radix sort's time is that of its keys' bytes.
    narrow = torch.int16 if positions < 2**15 else torch.int32 if positions < 2**31 else torch.int64
    keys, order = index.to(narrow).sort(stable=True)
    stops = torch.arange(positions + 1, dtype=narrow, device=index.device)
    return torch.searchsorted(keys, stops), order


def _fake(call: MixingHead) -> Mixed:
    thought, rows = call.thought, call.thought.shape[0]
    mixed, h1, h2 = (thought.new_empty(thought.shape) for _ in range(3))
    return Mixed(mixed, thought.new_empty(rows, 1), thought.new_empty(rows, dtype=torch.float32), h1, h2)


def _backward_fake(call: MixingHeadBackward) -> list[Tensor]:
    shapes = call.forward.gradient_shapes()
    return [
        call.forward.base.new_empty(shape if want else (0,))
        for shape, want in zip(shapes, call.wanted, strict=True)
    ]


forward_operator = register("mixing_head_forward", _forward, _fake)
backward_operator = register("mixing_head_backward", _backward, _backward_fake)
