"""The composed path of thought_attention: stock attention on the text, an own kernel for the slots.

Where every text position thinks and sees the whole text before it, one slot of one rationale of all
columns is N queries over N keys under an ordinary causal mask. So the text part of all slots is one
call of a stock flash kernel per row and rationale, with the slots as its batch and the keys of every
slot at the same place (stride 0). With the columns of one rationale behind those of the other
(``rationale_major``) all rationales of a row are one call, with S·R as its batch.
``csrc/cuda/thought_diagonal.cu`` adds the slot part and merges the two by their log-sum-exps.

Backward, a softmax weight is exp(x - lse) and its gradient needs sum(dout * out) besides: the stock
backward, given the *merged* out and lse, therefore finds exactly the text's share of the gradients, as
in ring attention. The slots' share comes from the own kernel.

The stock kernels are in ``stock.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quietstar_ext.dispatch import Setting
from quietstar_ext.native import cuda_device, cuda_kernels, fields, takes_cuda_path
from quietstar_ext.operators import register
from quietstar_ext.precision import autocast_inputs
from quietstar_ext.thought_attention.call import (
    Gradients,
    ThoughtAttention,
    last_contiguous,
    new_lse,
    place,
    rows_at_packs,
)
from quietstar_ext.thought_attention.stock import stock_backward, stock_forward, stock_unsupported_reason

PATHS = ("auto", "fused", "composed")


class Borders(NamedTuple):
    """From how many text tokens on a path is the fastest, forward and backward together.

    The composed path writes the text part and reads it again, backward it sums the text gradients of all
    slots, and copies out and its gradient if several rationales are not rationale-major: work linear in
    N. The stock kernel's advantage is a share of the quadratic part.
    """

    composed: int  # ahead of the fused kernel
    cudnn: int  # and, with cuDNN's kernel, ahead of flash


# A guess, where nothing was measured. benchmarks/bench_attention_paths.py prints what a device measures.
UNMEASURED = Borders(composed=2048, cudnn=2**62)
# By compute capability and head size, for one rationale and for two or more: an H200, 32 heads over 8,
# 15 slots (benchmarks/results/nvidia-h200.json). Heads of 128, two rationales, 256 tokens: level, and
# 512 was not measured. Heads of 64 were measured at 256 and 1,024 tokens. All of it is from before one
# call took several rationales, and before cuDNN's kernel read queries where they lie.
MEASURED = {
    ((9, 0), 64): (Borders(composed=256, cudnn=2**62), Borders(composed=256, cudnn=1024)),
    ((9, 0), 128): (Borders(composed=256, cudnn=2048), Borders(composed=1024, cudnn=1024)),
}

_MAX_HEAD_SIZE = 256  # in the stock kernel and in ours

_path = Setting("QUIETSTAR_THOUGHT_ATTENTION", PATHS)


def use_path(path: str) -> contextlib.AbstractContextManager[None]:
    """Inside the block, let calls with ``impl="auto"`` take the ``"fused"`` kernel only, or the
    ``"composed"`` path wherever it applies.

    The environment variable ``QUIETSTAR_THOUGHT_ATTENTION`` sets the same for a process.
    """
    return _path.use(path)


@torch.compiler.assume_constant_result
def _measured(device: torch.device, size: int) -> tuple[Borders, Borders]:
    if device.type != "cuda":
        return UNMEASURED, UNMEASURED
    found = MEASURED.get((torch.cuda.get_device_capability(device), size))
    return (UNMEASURED, UNMEASURED) if found is None else found


def borders(call: ThoughtAttention) -> Borders:
    """What was measured for such calls on their device. Slots and heads multiply the work of both paths
    alike."""
    one, more = _measured(call.q.device, call.q.shape[-1])
    return one if call.q.shape[3] <= call.k_text.shape[2] else more


def takes_composed(text_length: int, reason: str | None, known: Borders = UNMEASURED) -> bool:
    """Whether a call goes the composed path: where it applies, by the length of the text."""
    path = _path.get()
    if reason is not None or path == "fused":
        return False
    return path == "composed" or text_length >= known.composed


def path_of(impl: str, call: ThoughtAttention, every_position: bool) -> str:
    """``"fused"`` or ``"composed"`` for a call that a kernel can take; see
    :func:`composed_unsupported_reason`.

    Raises:
        RuntimeError: ``impl="composed"`` and it cannot.
    """
    if impl == "fused":
        return "fused"
    reason = composed_unsupported_reason(call, every_position)
    if impl != "composed":
        return "composed" if takes_composed(call.k_text.shape[2], reason, borders(call)) else "fused"
    if reason is not None:
        raise RuntimeError(f"thought_attention: impl='composed' cannot be used here: {reason}")
    return "composed"


def composed_unsupported_reason(call: ThoughtAttention, every_position: bool) -> str | None:
    """Half a sentence on why the composed path cannot serve this call, or None where it can.

    ``every_position`` is the caller's promise that M is R·N and column m has the text 0 .. m // R, or
    0 .. m % N.
    """
    columns, size = call.q.shape[3:]
    length, key_slots = call.k_text.shape[2], call.k_thought.shape[2]
    if not takes_cuda_path(call.q):
        return "it is for CUDA devices"
    if not every_position:
        return "the columns may be any (every_position is False)"
    if not length or not columns or columns % length:
        return f"{columns} columns are not a multiple of {length} text tokens"
    if not call.q.shape[2]:
        return "there is no query"
    if call.softcap:
        return "the stock kernel has no soft-cap"
    if call.window and call.window < length + key_slots:
        return f"the window of {call.window} hides some of {length} text tokens from some slots"
    if size > _MAX_HEAD_SIZE:
        return f"heads of {size} are larger than {_MAX_HEAD_SIZE}"
    return stock_unsupported_reason(call.q)


def gains_by_rationale_major(
    rows: Tensor, k_text: Tensor, grid: tuple[int, int], window: int | None, softcap: float | None
) -> bool:
    """Whether a call over every position would go the composed path, for which columns are best
    rationale-major. The fused kernels want neighbours with near anchors.

    Args:
        rows: [B, Hq, rows, D], from which the queries of the call will come.
        k_text: [B, Hkv, N, D].
        grid: slots and columns of the call.
    """
    (nothing,) = autocast_inputs(rows.new_empty(0))  # numbers are not looked at, but their dtype
    batch, heads, _, size = rows.shape
    q = nothing.new_empty(batch, heads, 1, 1, size).expand(-1, -1, *grid, -1)
    k_thought = k_text[:, :, :1, None].expand(-1, -1, *grid, -1)
    tensors = q, k_text, k_text, k_thought, k_thought, nothing, nothing, None
    return path_of("auto", ThoughtAttention(*tensors, 1.0, window or 0, softcap or 0.0), True) != "fused"


def _preferred(call: ThoughtAttention) -> str:
    """Torch's kernel for a call."""
    return "cudnn" if call.k_text.shape[2] >= borders(call).cudnn else "flash"


def _whole_packs(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its rows do not start at multiples of 16 bytes."""
    return tensor if rows_at_packs(tensor, tensor.data_ptr()) else tensor.contiguous()


def _by_call(tensor: Tensor, length: int, rationale_major: bool) -> Tensor:
    """[B, H, S, M, ...] -> [B, C, P, H, S, N, ...], a view: C calls a row, of P rationales each."""
    if rationale_major:
        return tensor.unflatten(3, (-1, length)).movedim(3, 1)[:, None]
    return tensor.unflatten(3, (length, -1)).movedim(4, 1)[:, :, None]


def _as_batch(piece: Tensor) -> Tensor:
    """[P, H, S, N, ...] -> [S·P, H, N, ...], a view where slots and rationales are one stride."""
    return piece.movedim(2, 0).flatten(0, 1)


def _as_piece(tensor: Tensor, slots: int) -> Tensor:
    """[S·P, H, N, ...] -> [P, H, S, N, ...], a view."""
    return tensor.unflatten(0, (slots, -1)).movedim(0, 2)


class ComposedAttention(NamedTuple):
    """A call of the composed path; of the other its forward pass is a :class:`ThoughtAttention`.

    Column m has the text 0 .. m // R, or, if they are rationale-major, 0 .. m % N.
    """

    call: ThoughtAttention
    rationale_major: bool = False


class ComposedAttentionBackward(NamedTuple):
    """Its backward pass, as of :class:`ThoughtAttentionBackward`."""

    forward: ThoughtAttention
    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None  # None
    rationale_major: bool = False


class ThoughtDiagonal(NamedTuple):
    """Slots and text part, merged by the kernel. Every tensor may have any strides but the last, 1."""

    q: Tensor  # [B, Hq, Sq, M, D]
    k_thought: Tensor  # [B, Hkv, Sk, M, D]
    v_thought: Tensor  # [B, Hkv, Sk, M, D]
    text_out: Tensor | None  # as out; None without text
    text_lse: Tensor | None  # as lse
    sinks: Tensor | None  # [Hq] float32 contiguous
    out: Tensor  # [B, Hq, Sq, M, D]
    lse: Tensor  # [B, Hq, Sq, M] float32
    scale: float


class ThoughtDiagonalBackward(NamedTuple):
    """Its backward pass; text_out, text_lse and sinks of the forward call are not looked at."""

    forward: ThoughtDiagonal
    dout: Tensor
    text_dq: Tensor | None  # added to dq
    dq: Tensor
    dk_thought: Tensor
    dv_thought: Tensor
    delta: Tensor  # as lse


def diagonal_forward(call: ThoughtDiagonal) -> None:
    """Write out and lse."""
    cuda_kernels().cuda_thought_diagonal(_fields(call), cuda_device(call.q))


def diagonal_backward(call: ThoughtDiagonalBackward) -> None:
    """Write dq (with text_dq added, where it is given), dk_thought, dv_thought and delta."""
    taken = (_fields(call.forward), *map(place, call[1:]))
    cuda_kernels().cuda_thought_diagonal_backward(taken, cuda_device(call.forward.q))


def _fields(call: ThoughtDiagonal) -> tuple[Any, ...]:
    batch, q_heads, slots, columns, size = call.q.shape
    heads, key_slots = call.k_thought.shape[1:3]
    return fields(
        *(call.q.dtype, batch, q_heads, heads, slots, key_slots, columns, size),
        *(*map(place, (*call[:5], call.out, call.lse)), call.sinks, call.scale),
    )


def _calls(
    tensors: Iterable[Tensor], length: int, rationale_major: bool
) -> Iterator[tuple[int, int, list[Tensor]]]:
    """The row, its number and the pieces [P, H, S, N, ...] of every call of the stock kernel."""
    by_call = [_by_call(t, length, rationale_major) for t in tensors]
    rows, calls = by_call[0].shape[:2]
    for row in range(rows):
        for number in range(calls):
            yield row, number, [t[row, number] for t in by_call]


def _forward(composed: ComposedAttention) -> tuple[Tensor, Tensor]:
    call, rationale_major = composed.call.laid_out(_whole_packs), composed.rationale_major
    q, k_text, v_text, k_thought, v_thought, *_ = call
    slots, length = q.shape[2], k_text.shape[2]
    out, lse = _fake(composed)
    kernel = _preferred(call)
    whole = q, k_thought, v_thought, out, lse
    for row, _, (of_q, of_k, of_v, of_out, of_lse) in _calls(whole, length, rationale_major):
        query = _as_batch(of_q)
        k, v = (t[row].expand(len(query), -1, -1, -1) for t in (k_text, v_text))
        text_out, text_lse = stock_forward(query, k, v, call.scale, kernel)
        slot = of_q, of_k, of_v
        text = _as_piece(last_contiguous(text_out), slots), _as_piece(text_lse, slots)
        diagonal_forward(ThoughtDiagonal(*slot, *text, call.sinks, of_out, of_lse, call.scale))
    return out, lse


def _backward(composed: ComposedAttentionBackward) -> Gradients:
    """As the fused kernel's, for no gradient of lse."""
    forward, rationale_major = composed.forward.laid_out(_whole_packs), composed.rationale_major
    q, k_text, v_text, k_thought, v_thought, *_ = forward
    slots, length = q.shape[2], k_text.shape[2]
    scale, lse, kernel = forward.scale, composed.lse, _preferred(forward)
    out, dout = _whole_packs(composed.out), _whole_packs(composed.dout)
    dq, dk_thought, dv_thought = (torch.empty_like(t) for t in (q, k_thought, v_thought))
    # Each slot has its own part, and each call; they are added up in fp32.
    one_call = rationale_major or q.shape[3] == length
    dk_text, dv_text = (
        torch.empty_like(t, dtype=None if one_call else torch.float32) for t in (k_text, v_text)
    )
    delta = torch.empty_like(lse)
    whole = q, k_thought, v_thought, out, lse, dout, dq, dk_thought, dv_thought, delta
    for row, number, pieces in _calls(whole, length, rationale_major):
        of_q, of_k, of_v, of_out, of_lse, of_dout, *gradients = pieces
        grad, query, result, of_rows = map(_as_batch, (of_dout, of_q, of_out, of_lse))
        k, v = (t[row].expand(len(query), -1, -1, -1) for t in (k_text, v_text))
        text_dq, dk, dv = stock_backward(grad, query, k, v, result, of_rows, scale, kernel)
        for total, parts in ((dk_text[row], dk), (dv_text[row], dv)):
            if number == 0:
                torch.sum(parts, 0, dtype=total.dtype, out=total)
            else:
                total += parts.sum(0, dtype=torch.float32)
        merged = ThoughtDiagonal(of_q, of_k, of_v, None, None, None, of_out, of_lse, scale)
        text_dq = _as_piece(last_contiguous(text_dq), slots)
        diagonal_backward(ThoughtDiagonalBackward(merged, of_dout, text_dq, *gradients))
    return dq, dk_text.to(q.dtype), dv_text.to(q.dtype), dk_thought, dv_thought, delta


def _fake(composed: ComposedAttention) -> tuple[Tensor, Tensor]:
    return torch.empty_like(composed.call.q), new_lse(composed.call.q)


def _backward_fake(composed: ComposedAttentionBackward) -> Gradients:
    dq, dk_text, dv_text, dk_thought, dv_thought = map(torch.empty_like, composed.forward[:5])
    return dq, dk_text, dv_text, dk_thought, dv_thought, torch.empty_like(composed.lse)


operator = register("thought_attention_composed", _forward, _fake)
backward_operator = register("thought_attention_composed_backward", _backward, _backward_fake)
