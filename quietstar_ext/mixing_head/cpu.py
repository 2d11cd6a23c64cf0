"""The mixing head on the CPU: the products are PyTorch's, what lies between them our kernels'."""

from __future__ import annotations

import torch

from quietstar_ext.mixing_head.call import Mixed, MixingHead, MixingHeadBackward, Sizes, kernel_fields
from quietstar_ext.native import DTYPE_CODES, native


def _run(step: str, sizes: Sizes, tensors: dict[str, torch.Tensor | None]) -> None:
    taken = kernel_fields(sizes, tensors, torch.get_num_threads())
    getattr(native(), f"mixing_{step}")(taken)


def forward(call: MixingHead) -> Mixed:
    """Whether or not there are rows."""
    call = call.laid_out()
    base, thought, _, _, w2, b2, w3, index, sigmoid = call
    rows, size = thought.shape
    narrow = base.dtype != torch.float32
    from_base, h1 = _first_products(call)
    mixed = torch.empty_like(thought)
    gate = torch.full((rows,), 0.5 if sigmoid else 0.0, dtype=torch.float32)
    if rows == 0 or size == 0:
        return Mixed(mixed, gate[:, None].to(mixed.dtype, copy=True), gate, h1, h1.clone())
    sizes = (DTYPE_CODES[base.dtype], rows, base.shape[0], size, sigmoid)
    tensors: dict[str, torch.Tensor | None] = {
        **{"index": index, "base": base, "thought": thought, "from_base": from_base, "h1": h1},
    }
    _run("first", sizes, tensors)
    # A bias added after the product was rounded to 16 bits could end on relu's other side.
    h2 = torch.nn.functional.linear(h1, w2, b2) if narrow else h1 @ w2.T
    bias = None if narrow else b2
    _run("tail", sizes, {**tensors, "h2": h2, "b2": bias, "w3": w3, "mixed": mixed, "gate": gate})
    return Mixed(mixed, gate[:, None].to(mixed.dtype, copy=True), gate, h1, h2)


def _first_products(call: MixingHead) -> tuple[torch.Tensor, torch.Tensor]:
    """from_base [P, d] and h1 [rows, d], of which the kernel makes relu(h1 + from_base[index]).

    In 16 bits, the halves must not be rounded before they cancel, or many a relu switches. So the base
    half is taken in fp32 and cut in two: the upper part goes into the product's own fp32 sum, and the
    kernel adds the rest, far smaller, to the rounded result.
    """
    base, thought, w1, b1, *_, index, _ = call
    size = thought.shape[1]
    w_base, w_thought = w1[:, :size], w1[:, size:]
    if base.dtype == torch.float32:
        return torch.addmm(b1, base, w_base.T), thought @ w_thought.T
    from_base = torch.addmm(b1.float(), base.float(), w_base.float().T)
    upper = from_base.to(base.dtype)
    rest = from_base.sub_(upper).to(base.dtype)
    h1 = upper if index is None else upper.index_select(0, index)
    return rest, h1.addmm_(thought, w_thought.T)


def backward(call: MixingHeadBackward) -> list[torch.Tensor | None]:
    """The seven gradients, for at least one row and column; None where a product is not wanted."""
    base, thought, w1, _, w2, _, w3, index, sigmoid = call.forward.laid_out()
    _, gate, h1, h2, grad_mixed, grad_w, wanted = call
    (rows, size), dtype = thought.shape, thought.dtype
    grad_mixed = grad_mixed.contiguous()
    grad_gate = grad_w.flatten().float().contiguous()
    grad_thought, grad_h2, grad_h1 = (torch.empty_like(thought) for _ in range(3))
    grad_base, grad_from_base = torch.empty_like(base), torch.empty_like(base)
    grad_b1, grad_b2, grad_w3 = (torch.empty(size, dtype=torch.float32) for _ in range(3))
    tensors: dict[str, torch.Tensor | None] = {
        **{"index": index, "base": base, "thought": thought, "w3": w3, "gate": gate},
        **{"h1": h1, "h2": h2, "grad_mixed": grad_mixed, "grad_gate": grad_gate},
        **{"grad_thought": grad_thought, "grad_base": grad_base, "grad_h1": grad_h1},
        **{"grad_from_base": grad_from_base, "grad_h2": grad_h2},
        **{"grad_b1": grad_b1, "grad_b2": grad_b2, "grad_w3": grad_w3},
    }
    sizes = (DTYPE_CODES[dtype], rows, base.shape[0], size, sigmoid)
    _run("tail_backward", sizes, tensors)
    torch.mm(grad_h2, w2, out=grad_h1)
    _run("first_backward", sizes, tensors)

    grad_w1 = w1.new_empty(w1.shape if wanted[2] else (0,))
    if wanted[0]:
        grad_base.addmm_(grad_from_base, w1[:, :size])
    if wanted[1]:
        grad_thought.addmm_(grad_h1, w1[:, size:])
    if wanted[2]:
        torch.mm(grad_from_base.T, base, out=grad_w1[:, :size])
        torch.mm(grad_h1.T, thought, out=grad_w1[:, size:])
    return [
        grad_base,
        grad_thought,
        grad_w1,
        grad_b1.to(dtype),
        grad_h2.T @ h1 if wanted[4] else None,
        grad_b2.to(dtype),
        grad_w3.to(dtype)[None],
    ]
