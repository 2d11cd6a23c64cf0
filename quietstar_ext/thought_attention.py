"""Attention of thought slots: over the text before their anchor and over their own column.

A *column* is one thought. It hangs from a text position (its anchor) and is a chain of *slots*. A
slot sees the text keys of a range given per column, and the slots of the same column up to itself.
Drawn as a mask the slot part is a stack of diagonals; no mask is ever built here.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch.autograd.function import once_differentiable

from quietstar_ext import checks
from quietstar_ext.dispatch import choose_impl
from quietstar_ext.native import DTYPE_CODES, native, why_not_native
from quietstar_ext.precision import autocast_inputs, without_autocast
from quietstar_ext.reference.thought_attention import thought_attention as _reference


@overload
def thought_attention(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_thought: torch.Tensor,
    v_thought: torch.Tensor,
    text_start: torch.Tensor,
    text_stop: torch.Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: Literal[False] = False,
    impl: str = "auto",
) -> torch.Tensor: ...


@overload
def thought_attention(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_thought: torch.Tensor,
    v_thought: torch.Tensor,
    text_start: torch.Tensor,
    text_stop: torch.Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: Literal[True],
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...


def thought_attention(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_thought: torch.Tensor,
    v_thought: torch.Tensor,
    text_start: torch.Tensor,
    text_stop: torch.Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of slot queries over ranged text keys and the keys of their own column.

    Query slot s of column m (s = 0 .. Sq-1) stands at depth ``s + 1 + Sk - Sq`` below its anchor,
    which is text position ``text_stop[m] - 1``. It sees

    - text key j where ``text_start[m] <= j < text_stop[m]`` and, with a window W,
      ``j >= text_stop[m] + depth - W``;
    - slot t of the same column where ``t <= s + Sk - Sq``; a window does not shorten this part.

    With x = q·k·scale, capped to c·tanh(x / c) where ``softcap`` = c, over the keys that are seen::

        lse = log( Σ exp(x) + exp(sink) )        out = Σ exp(x - lse) v

    ``Sq == Sk`` is the packed pass, ``Sq == 1`` a rollout step, and ``Sk == 0`` with ``Sq == 1``
    plain attention over a range (depth 0), which is what a text row is. Columns may come in any
    order and share anchors. A row that sees nothing gives out = 0, lse = -inf (the sink, if there
    is one) and no gradient.

    Args:
        q: [B, Hq, Sq, M, D], float32, bfloat16, float16 or float64 (reference only); any strides.
        k_text, v_text: [B, Hkv, N, D], dtype and device of q; Hq is a multiple of Hkv, and query
            head h reads key head ``h // (Hq // Hkv)``.
        k_thought, v_thought: [B, Hkv, Sk, M, D], dtype and device of q; strided views are fine.
        text_start, text_stop: [B, M] int32, the range of text keys of each column. Parts of a range
            outside 0 .. N hold no keys.
        scale: factor on the scores; None is ``D ** -0.5``.
        sliding_window: W >= 1 in tokens, or None.
        softcap: c > 0, or None.
        sinks: [Hq] float, one more logit in the softmax of every row of that head, which has no
            value and is neither scaled nor capped; or None.
        return_lse: also return the natural logarithm of the softmax denominator.
        impl: ``"auto"``, ``"fused"`` or ``"reference"``.

    Returns:
        out [B, Hq, Sq, M, D] in q's dtype, and with ``return_lse`` lse [B, Hq, Sq, M] in float32
        (float64 for float64 inputs). Sums are taken in float32 or wider. Both carry gradients to q,
        the four key and value tensors and the sinks. Under autocast the five tensors are cast
        first, as for a matrix product.

    Raises:
        TypeError: an argument that must be a tensor is none.
        ValueError: a shape, dtype, device or option does not fit; the message names the argument.
        RuntimeError: ``impl="fused"`` and there is no kernel for this call.

    Source: Zelikman et al. 2024 (arXiv 2403.09629), section 4.2, parallel generation.
    """
    q, k_text, v_text, k_thought, v_thought = autocast_inputs(q, k_text, v_text, k_thought, v_thought)
    _check(q, k_text, v_text, k_thought, v_thought, text_start, text_stop)
    _check_options(q, scale, sliding_window, softcap, sinks)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    softcap = None if softcap is None else float(softcap)

    if choose_impl("thought_attention", impl, why_not_native(q)) == "fused":
        out, lse = _fused(
            q,
            k_text,
            v_text,
            k_thought,
            v_thought,
            text_start,
            text_stop,
            sinks,
            scale,
            sliding_window or 0,
            float(softcap or 0),
        )
        return (out, lse) if return_lse else out
    with without_autocast(q):
        out, lse = _reference(
            q,
            k_text,
            v_text,
            k_thought,
            v_thought,
            text_start,
            text_stop,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=sinks,
        )
    return (out, lse) if return_lse else out


def _check(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_thought: torch.Tensor,
    v_thought: torch.Tensor,
    text_start: torch.Tensor,
    text_stop: torch.Tensor,
) -> None:
    checks.check_tensor("q", q, ["B", "Hq", "Sq", "M", "D"], checks.FLOAT_DTYPES)
    batch, q_heads, slots, columns, size = q.shape
    same = ([q.dtype], q.device)
    checks.check_tensor("k_text", k_text, [batch, "Hkv", "N", size], *same)
    heads, length = k_text.shape[1:3]
    checks.check_tensor("v_text", v_text, [batch, heads, length, size], *same)
    checks.check_tensor("k_thought", k_thought, [batch, heads, "Sk", columns, size], *same)
    key_slots = k_thought.shape[2]
    checks.check_tensor("v_thought", v_thought, [batch, heads, key_slots, columns, size], *same)
    checks.check_tensor("text_start", text_start, [batch, columns], [torch.int32], q.device)
    checks.check_tensor("text_stop", text_stop, [batch, columns], [torch.int32], q.device)
    if size == 0:
        raise ValueError("q has a head size of 0; expected at least 1")
    if heads == 0 or q_heads % heads:
        raise ValueError(
            f"q has {q_heads} heads and k_text {heads}; expected q's to be a multiple of k_text's"
        )
    if key_slots < slots and not (key_slots == 0 and slots == 1):
        raise ValueError(
            f"k_thought has {key_slots} slots and q has {slots}; "
            "expected at least as many, or none with one query slot"
        )


def _check_options(
    q: torch.Tensor,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    if scale is not None:
        checks.check_number("scale", scale)
    if sliding_window is not None:
        checks.check_whole("sliding_window", sliding_window, 1)
    if softcap is not None:
        checks.check_positive("softcap", softcap)
    if sinks is not None:
        checks.check_tensor("sinks", sinks, [q.shape[1]], checks.FLOAT_DTYPES, q.device)


# ---- the kernel: raw operators, and the autograd Function around them

_INPUTS = (
    "Tensor q, Tensor k_text, Tensor v_text, Tensor k_thought, Tensor v_thought, "
    "Tensor text_start, Tensor text_stop, Tensor? sinks, "
)
_OPTIONS = "float scale, int window, float softcap"
_SCHEMA = f"({_INPUTS}{_OPTIONS}) -> (Tensor out, Tensor lse)"
_BACKWARD_SCHEMA = (
    f"({_INPUTS}Tensor out, Tensor lse, Tensor dout, Tensor? dlse, {_OPTIONS}) -> (Tensor dq, "
    "Tensor dk_text, Tensor dv_text, Tensor dk_thought, Tensor dv_thought, Tensor delta)"
)


def _fused(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if torch.is_grad_enabled() and any(
        t.requires_grad for t in (q, *rest) if isinstance(t, torch.Tensor)
    ):
        return _ThoughtAttention.apply(q, *rest)
    return torch.ops.quietstar.thought_attention(q, *rest)


class _ThoughtAttention(torch.autograd.Function):
    """out and lse with gradients to the five tensors and to the sinks."""

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
        window: int,
        softcap: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = (q, k_text, v_text, k_thought, v_thought, text_start, text_stop, sinks)
        out, lse = torch.ops.quietstar.thought_attention(*inputs, scale, window, softcap)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.options = (scale, window, softcap)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        *gradients, delta = torch.ops.quietstar.thought_attention_backward(
            *inputs, out, lse, dout, dlse, *ctx.options
        )
        dsinks = None
        sinks = inputs[7]
        if sinks is not None and ctx.needs_input_grad[7]:
            # A sink is a logit with the value 0, so its share of the gradient is p (0 - delta).
            p = torch.exp(sinks.float()[:, None, None] - lse)
            p = p.masked_fill(lse == -torch.inf, 0)
            dsinks = -(p * delta).sum((0, 2, 3)).to(sinks.dtype)
        return (*gradients, None, None, dsinks, None, None, None)


def _last_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied only where the elements of a row do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _place(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()


def _arguments(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_thought: torch.Tensor,
    v_thought: torch.Tensor,
    text_start: torch.Tensor,
    text_stop: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    backward: bool,
) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """The kernels' arguments up to the thread count, and the tensors that must outlive the call."""
    q, k_text, v_text, k_thought, v_thought = (
        _last_contiguous(t) for t in (q, k_text, v_text, k_thought, v_thought)
    )
    text_start, text_stop = text_start.contiguous(), text_stop.contiguous()
    if sinks is not None:
        sinks = sinks.float().contiguous()
    batch, q_heads, slots, columns, size = q.shape
    heads, length = k_text.shape[1:3]
    sizes = (batch, q_heads, heads, slots, k_thought.shape[2], columns, length, size)
    threads = torch.get_num_threads()
    workspace = torch.empty(
        native().thought_attention_workspace(sizes, backward, threads), dtype=torch.uint8
    )
    arguments = (
        DTYPE_CODES[q.dtype],
        sizes,
        _place(q),
        _place(k_text),
        _place(v_text),
        _place(k_thought),
        _place(v_thought),
        _place(out),
        lse.data_ptr(),
        text_start.data_ptr(),
        text_stop.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        scale,
        window,
        softcap,
        workspace.data_ptr(),
        threads,
    )
    alive = [q, k_text, v_text, k_thought, v_thought, text_start, text_stop, workspace]
    return arguments, alive if sinks is None else [*alive, sinks]


def _empty_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Uninitialised, in the memory order of tensor, with the elements of a row side by side."""
    return torch.empty_like(_last_contiguous(tensor))


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
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = _empty_rows(q)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    arguments, alive = _arguments(
        q,
        k_text,
        v_text,
        k_thought,
        v_thought,
        text_start,
        text_stop,
        sinks,
        out,
        lse,
        scale,
        window,
        softcap,
        backward=False,
    )
    native().thought_attention(*arguments)
    del alive
    return out, lse


def _backward(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_thought: torch.Tensor,
    v_thought: torch.Tensor,
    text_start: torch.Tensor,
    text_stop: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, ...]:
    out, lse, dout = _last_contiguous(out), lse.contiguous(), _last_contiguous(dout)
    if dlse is not None:
        dlse = dlse.contiguous()
    gradients = [_empty_rows(t) for t in (q, k_text, v_text, k_thought, v_thought)]
    delta = torch.empty_like(lse)
    arguments, alive = _arguments(
        q,
        k_text,
        v_text,
        k_thought,
        v_thought,
        text_start,
        text_stop,
        sinks,
        out,
        lse,
        scale,
        window,
        softcap,
        backward=True,
    )
    native().thought_attention_backward(
        *arguments,
        _place(dout),
        0 if dlse is None else dlse.data_ptr(),
        *(_place(gradient) for gradient in gradients),
        delta.data_ptr(),
    )
    del alive
    return (*gradients, delta)


def _fake(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_rows(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _backward_fake(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_thought: torch.Tensor,
    v_thought: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, ...]:
    gradients = (_empty_rows(t) for t in (q, k_text, v_text, k_thought, v_thought))
    return (*gradients, q.new_empty(q.shape[:-1], dtype=torch.float32))


torch.library.define("quietstar::thought_attention", _SCHEMA)
torch.library.impl("quietstar::thought_attention", "cpu", _forward)
torch.library.register_fake("quietstar::thought_attention", _fake)
torch.library.define("quietstar::thought_attention_backward", _BACKWARD_SCHEMA)
torch.library.impl("quietstar::thought_attention_backward", "cpu", _backward)
torch.library.register_fake("quietstar::thought_attention_backward", _backward_fake)
