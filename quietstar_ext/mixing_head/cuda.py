"""The mixing head on a CUDA device: the products are PyTorch's, what lies between them our kernels'."""

from __future__ import annotations

import torch

from quietstar_ext.mixing_head.call import Mixed, MixingHead, MixingHeadBackward, Sizes, kernel_fields
from quietstar_ext.native import DTYPE_CODES, cuda_device, cuda_kernels


@torch.compiler.assume_constant_result
def max_width(device: torch.device) -> int:
    """Widths beyond it would need more shared memory than a block may have."""
    width: int = cuda_kernels().cuda_mixing_max_width((device.index or 0, 0))
    return width


def _run(step: str, sizes: Sizes, tensors: dict[str, torch.Tensor | None]) -> None:
    """Launch a step; ``tensors`` are contiguous."""
    thought = tensors["thought"]
    assert thought is not None
    taken = kernel_fields(sizes, tensors)
    getattr(cuda_kernels(), f"cuda_mixing_{step}")(taken, cuda_device(thought))


def forward(call: MixingHead) -> Mixed:
    """Whether or not there are rows."""
    base, thought, w1, b1, w2, b2, w3, index, sigmoid = call.laid_out()
    rows, size = thought.shape
    mixed, w = torch.empty_like(thought), thought.new_empty(rows, 1)
    gate = thought.new_empty(rows, dtype=torch.float32)
    if rows == 0 or size == 0:
        act_of_0 = 0.5 if sigmoid else 0.0
        empty = torch.empty_like(thought), torch.empty_like(thought)
        return Mixed(mixed, w.fill_(act_of_0), gate.fill_(act_of_0), *empty)
    # Both halves of the first layer stay in fp32 until they are added: rounded before they cancel,
    # they would leave many a relu on its other side.
    product = _product_in_fp32(thought, w1[:, size:].T)
    h1 = product if thought.dtype == torch.float32 else torch.empty_like(thought)
    from_base = _product_in_fp32(base, w1[:, :size].T)
    tensors: dict[str, torch.Tensor | None] = {
        **{"index": index, "base": base, "thought": thought, "from_base": from_base},
        **{"product": product, "b1": b1, "h1": h1},
    }
    sizes = (DTYPE_CODES[thought.dtype], rows, base.shape[0], size, sigmoid)
    _run("first", sizes, tensors)
    # The bias is added in the product's own fp32 sum; relu is made where h2 is read.
    h2 = torch.nn.functional.linear(h1, w2, b2)
    _run("tail", sizes, {**tensors, "h2": h2, "w3": w3, "mixed": mixed, "w": w, "gate": gate})
    return Mixed(mixed, w, gate, h1, h2)


def _product_in_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, accumulated and returned in fp32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cpu":  # a test: PyTorch has this product on devices only
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def backward(call: MixingHeadBackward) -> list[torch.Tensor | None]:
    """The seven gradients, for at least one row and column; None where a product is not wanted."""
    base, thought, w1, _, w2, _, w3, index, sigmoid = call.forward.laid_out()
    _, gate, h1, h2, grad_mixed, grad_w, wanted = call
    (rows, size), positions = thought.shape, base.shape[0]
    code, grad_mixed = DTYPE_CODES[thought.dtype], grad_mixed.contiguous()
    grad_thought, grad_h2 = torch.empty_like(thought), torch.empty_like(thought)
    grad_base, grad_from_base = torch.empty_like(base), torch.empty_like(base)
    grad_b1, grad_b2, grad_w3 = (thought.new_empty(size) for _ in range(3))
    workspace = thought.new_empty(
        cuda_kernels().cuda_mixing_workspace(code, rows, positions, size), dtype=torch.float32
    )
    grad_gate = grad_w.flatten().float().contiguous()
    tensors: dict[str, torch.Tensor | None] = {
        **{"index": index, "base": base, "thought": thought, "w3": w3, "gate": gate},
        **{"h1": h1, "h2": h2, "grad_mixed": grad_mixed, "grad_gate": grad_gate},
        **{"grad_thought": grad_thought, "grad_h2": grad_h2},
        **{"grad_b2": grad_b2, "grad_w3": grad_w3, "workspace": workspace},
    }
    sizes = (code, rows, positions, size, sigmoid)
    _run("tail_backward", sizes, tensors)
    first, order = _rows_of_positions(index, positions)
    grad_h1 = grad_h2 @ w2
    tensors.update(first=first, order=order, grad_h1=grad_h1, grad_b1=grad_b1)
    tensors.update(grad_base=grad_base, grad_from_base=grad_from_base)
    _run("first_backward", sizes, tensors)

    grad_w1 = torch.empty_like(w1) if wanted[2] else None
    if wanted[0]:
        grad_base.addmm_(grad_from_base, w1[:, :size])
    if wanted[1]:
        grad_thought.addmm_(grad_h1, w1[:, size:])
    if grad_w1 is not None:
        torch.mm(grad_from_base.T, base, out=grad_w1[:, :size])
        torch.mm(grad_h1.T, thought, out=grad_w1[:, size:])
    grad_w2 = grad_h2.T @ h1 if wanted[4] else None
    return [grad_base, grad_thought, grad_w1, grad_b1, grad_w2, grad_b2, grad_w3[None]]


def _rows_of_positions(
    index: torch.Tensor | None, positions: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """first [positions + 1] and order [rows], int64: the rows of position p are
    ``order[first[p]:first[p + 1]]``, in ascending order. None for no index, row for row."""
    if index is None:
        return None, None
    # A radix sort's time is that of its keys' bytes.
    narrow = torch.int16 if positions < 2**15 else torch.int32 if positions < 2**31 else torch.int64
    keys, order = index.to(narrow).sort(stable=True)
    stops = torch.arange(positions + 1, dtype=narrow, device=index.device)
    return torch.searchsorted(keys, stops), order
