"""The composed path of thought_attention: stock attention on the text, an own kernel for the slots.

Where every text position thinks and sees the whole text before it, one slot of one rationale of all
columns is N queries over N keys under an ordinary causal mask. So the text part of all slots is one
call of a stock flash kernel per row and rationale, with the slots as its batch and the keys of every
slot at the same place (stride 0). ``csrc/cuda/thought_diagonal.cu`` adds the slot part and merges the
two by their log-sum-exps.

Backward, a softmax weight is exp(x - lse) and its gradient needs sum(dout * out) besides: the stock
backward, given the *merged* out and lse, therefore finds exactly the text's share of the gradients, as
in ring attention. The slots' share comes from the own kernel.

The stock kernels are in ``thought_attention_stock.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from quietstar_ext.derivatives import first_only
from quietstar_ext.dispatch import Setting
from quietstar_ext.native import takes_cuda_path
from quietstar_ext.thought_attention_diagonal import diagonal_backward, diagonal_forward
from quietstar_ext.thought_attention_stock import stock_backward, stock_forward, why_not_stock

PATHS = ("auto", "fused", "composed")

# From how many text tokens on the composed path is taken. A guess from what the two move and compute,
# and too long on an H200 for heads of 128 (docs/gpu_paths.md). The composed path writes the text part
# and reads it again, backward it copies out and its gradient if there are several rationales and sums
# the text gradients of all slots: work linear in N. The stock kernel's advantage, if it has one, is a
# share of the quadratic part. benchmarks/bench_attention_paths.py times both and prints the length from
# which it is ahead.
COMPOSED_FROM_TEXT_LENGTH = 2048

_MOST_SIZE = 256  # of a head, in the stock kernel and in ours

_path = Setting("QUIETSTAR_THOUGHT_ATTENTION", PATHS)


def use_path(path: str) -> contextlib.AbstractContextManager[None]:
    """Inside the block, let calls with ``impl="auto"`` take the ``"fused"`` kernel only, or the
    ``"composed"`` path wherever it applies.

    The environment variable ``QUIETSTAR_THOUGHT_ATTENTION`` sets the same for a process.
    """
    return _path.use(path)


def takes_composed(text_length: int, why_not: str | None) -> bool:
    """Whether a call goes the composed path: where it applies, by the length of the text alone.

    Columns, slots and heads multiply the work of both paths alike.
    """
    path = _path.get()
    if why_not is not None or path == "fused":
        return False
    return path == "composed" or text_length >= COMPOSED_FROM_TEXT_LENGTH


def goes_composed(
    impl: str,
    q: torch.Tensor,
    k_text: torch.Tensor,
    k_thought: torch.Tensor,
    every_position: bool,
    window: int,
    softcap: float,
) -> bool:
    """Whether a call that a kernel can take goes this way; see :func:`why_not_composed`.

    Raises:
        RuntimeError: ``impl="composed"`` and it cannot.
    """
    if impl == "fused":
        return False
    why_not = why_not_composed(q, k_text, k_thought, every_position, window, softcap)
    if impl != "composed":
        return takes_composed(k_text.shape[2], why_not)
    if why_not is not None:
        raise RuntimeError(f"thought_attention: impl='composed' cannot be used here: {why_not}")
    return True


def why_not_composed(
    q: torch.Tensor,
    k_text: torch.Tensor,
    k_thought: torch.Tensor,
    every_position: bool,
    window: int,
    softcap: float,
) -> str | None:
    """Half a sentence on why the composed path cannot serve this call, or None where it can.

    Args:
        q: [B, Hq, Sq, M, D]; k_text: [B, Hkv, N, D]; k_thought: [B, Hkv, Sk, M, D].
        every_position: the caller's word that M is R·N and column m has the text 0 .. m // R.
        window, softcap: 0 for none.
    """
    columns, size = q.shape[3:]
    length, key_slots = k_text.shape[2], k_thought.shape[2]
    if not takes_cuda_path(q):
        return "it is for CUDA devices"
    if not every_position:
        return "the columns may be any (every_position is False)"
    if not length or not columns or columns % length:
        return f"{columns} columns are no multiple of {length} text tokens"
    if softcap:
        return "the stock kernel has no soft-cap"
    if window and window < length + key_slots:
        return f"the window of {window} hides some of {length} text tokens from some slots"
    if size > _MOST_SIZE:
        return f"heads of {size} are larger than {_MOST_SIZE}"
    return why_not_stock(q)


def composed_attention(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_thought: torch.Tensor,
    v_thought: torch.Tensor,
    text_start: torch.Tensor,
    text_stop: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, Hq, Sq, M, D] and lse [B, Hq, Sq, M] fp32, where :func:`why_not_composed` is None.

    Arguments as in :func:`quietstar_ext.thought_attention`; the text ranges are looked at only for a
    gradient of lse, which the stock backward cannot take: the fused kernel finds it.
    """
    inputs = (q, k_text, v_text, k_thought, v_thought, text_start, text_stop, sinks, scale)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs if isinstance(t, torch.Tensor)):
        return _Composed.apply(*inputs)
    return torch.ops.quietstar.thought_attention_composed(*inputs)


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k_text: torch.Tensor,
        v_text: torch.Tensor,
        k_thought: torch.Tensor,
        v_thought: torch.Tensor,
        text_start: torch.Tensor,
        text_stop: torch.Tensor,
        sinks: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = (q, k_text, v_text, k_thought, v_thought, text_start, text_stop, sinks)
        out, lse = torch.ops.quietstar.thought_attention_composed(*inputs, scale)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        sinks, dsinks = inputs[7], None
        ops = torch.ops.quietstar
        with torch.no_grad():
            if dout is None:
                dout = torch.zeros_like(out)
            if dlse is None:
                backward = ops.thought_attention_composed_backward
                *gradients, delta = backward(*inputs[:5], out, lse, dout, ctx.scale)
            else:
                backward = ops.thought_attention_backward
                *gradients, delta = backward(*inputs, out, lse, dout, dlse, ctx.scale, 0, 0.0)
            if sinks is not None and ctx.needs_input_grad[7]:
                # A sink is a logit with the value 0. Every row sees its anchor, so lse is finite.
                p = torch.exp(sinks.float()[:, None, None] - lse)
                dsinks = -(p * delta).sum((0, 2, 3)).to(sinks.dtype)
        return (*first_only("thought_attention", inputs, (*gradients, None, None, dsinks)), None)


def _whole_packs(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied only where its rows do not start at multiples of 16 bytes."""
    fine = tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        fine = fine and (size == 1 or stride * tensor.itemsize % 16 == 0)
    return tensor if fine else tensor.contiguous()


# ---- both, merged


def _last_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _pieces(batch: int, rationales: int) -> Iterator[tuple[int, slice]]:
    """Batch row and columns of each call: one rationale of all positions."""
    for row in range(batch):
        for rationale in range(rationales):
            yield row, slice(rationale, None, rationales)


def _slots_first(tensor: torch.Tensor, row: int, columns: slice) -> torch.Tensor:
    """[B, H, S, M, ...] -> [S, H, N, ...], a view."""
    return tensor[row, :, :, columns].transpose(0, 1)


def _as_piece(tensor: torch.Tensor) -> torch.Tensor:
    """[S, H, N, ...] -> [1, H, S, N, ...], a view."""
    return tensor.transpose(0, 1)[None]


def _forward(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_thought: torch.Tensor,
    v_thought: torch.Tensor,
    text_start: torch.Tensor,
    text_stop: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k_text, v_text = _whole_packs(q), _whole_packs(k_text), _whole_packs(v_text)
    k_thought, v_thought = _last_contiguous(k_thought), _last_contiguous(v_thought)
    if sinks is not None:
        sinks = sinks.float().contiguous()
    batch, _, slots, columns, _ = q.shape
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    for row, piece in _pieces(batch, columns // k_text.shape[2]):
        text_out, text_lse = stock_forward(
            _slots_first(q, row, piece),
            k_text[row].expand(slots, -1, -1, -1),
            v_text[row].expand(slots, -1, -1, -1),
            scale,
        )
        at = (slice(row, row + 1), slice(None), slice(None), piece)
        diagonal_forward(
            q[at],
            k_thought[at],
            v_thought[at],
            _as_piece(_last_contiguous(text_out)),
            _as_piece(text_lse),
            sinks,
            out[at],
            lse[at],
            scale,
        )
    return out, lse


def _backward(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_thought: torch.Tensor,
    v_thought: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    q, k_text, v_text = _whole_packs(q), _whole_packs(k_text), _whole_packs(v_text)
    k_thought, v_thought = _last_contiguous(k_thought), _last_contiguous(v_thought)
    out, dout = _whole_packs(out), _whole_packs(dout)
    batch, _, slots, columns, _ = q.shape
    dq, dk_thought, dv_thought = (torch.empty_like(t) for t in (q, k_thought, v_thought))
    # Each slot and rationale has its own part; they are added up in fp32.
    dk_text, dv_text = (torch.zeros_like(t, dtype=torch.float32) for t in (k_text, v_text))
    delta = torch.empty_like(lse)
    for row, piece in _pieces(batch, columns // k_text.shape[2]):
        text_dq, dk, dv = stock_backward(
            _slots_first(dout, row, piece),
            _slots_first(q, row, piece),
            k_text[row].expand(slots, -1, -1, -1),
            v_text[row].expand(slots, -1, -1, -1),
            _slots_first(out, row, piece),
            _slots_first(lse, row, piece),
            scale,
        )
        dk_text[row] += dk.sum(0, dtype=torch.float32)
        dv_text[row] += dv.sum(0, dtype=torch.float32)
        at = (slice(row, row + 1), slice(None), slice(None), piece)
        diagonal_backward(
            q[at],
            k_thought[at],
            v_thought[at],
            out[at],
            lse[at],
            dout[at],
            _as_piece(_last_contiguous(text_dq)),
            dq[at],
            dk_thought[at],
            dv_thought[at],
            delta[at],
            scale,
        )
    return dq, dk_text.to(q.dtype), dv_text.to(q.dtype), dk_thought, dv_thought, delta


def _fake(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _backward_fake(*tensors: Any) -> tuple[torch.Tensor, ...]:
    gradients = (torch.empty_like(t) for t in tensors[:5])
    return (*gradients, torch.empty_like(tensors[6]))


_TENSORS = "(Tensor q, Tensor k_text, Tensor v_text, Tensor k_thought, Tensor v_thought, "
for _name, _schema, _implementation, _shapes in (
    (
        "thought_attention_composed",
        "Tensor text_start, Tensor text_stop, Tensor? sinks, float scale) -> (Tensor out, Tensor lse)",
        _forward,
        _fake,
    ),
    (
        "thought_attention_composed_backward",
        "Tensor out, Tensor lse, Tensor dout, float scale) -> (Tensor dq, Tensor dk_text, "
        "Tensor dv_text, Tensor dk_thought, Tensor dv_thought, Tensor delta)",
        _backward,
        _backward_fake,
    ),
):
    torch.library.define(f"quietstar::{_name}", _TENSORS + _schema)
    torch.library.impl(f"quietstar::{_name}", ("cpu", "cuda"), _implementation)
    torch.library.register_fake(f"quietstar::{_name}", _shapes)
