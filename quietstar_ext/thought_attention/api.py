"""Attention of thought slots: over the text before their anchor and over their own column.

A *column* is one thought. It hangs from a text position (its anchor) and is a chain of *slots*. A
slot sees the text keys of a range given per column, and the slots of the same column up to itself,
both within the sliding window if there is one. Drawn as a mask the slot part is a stack of diagonals;
no mask is ever built here.
"""

from __future__ import annotations

from typing import Any

import torch

from quietstar_ext import checks
from quietstar_ext.derivatives import derivatives_unsupported_reason
from quietstar_ext.dispatch import choose_impl
from quietstar_ext.precision import autocast_inputs, without_autocast
from quietstar_ext.thought_attention.call import ThoughtAttention
from quietstar_ext.thought_attention.composed import path_of
from quietstar_ext.thought_attention.fused import attend, fused_unsupported_reason
from quietstar_ext.thought_attention.reference import reference


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
    every_position: bool = False,
    rationale_major: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Softmax attention of slot queries over ranged text keys and the keys of their own column.

    Query slot s of column m (s = 0 .. Sq-1) stands at depth ``s + 1 + Sk - Sq`` below its anchor,
    which is text position ``text_stop[m] - 1``. It sees

    - text key j where ``text_start[m] <= j < text_stop[m]`` and, with a window W,
      ``j >= text_stop[m] + depth - W``;
    - slot t of the same column where ``t <= s + Sk - Sq`` and, with a window W, ``t >= depth - W``.

    So with a window a row sees the last W tokens of the chain that ends with itself, text and slots
    counted alike, as a decoder does in an ordinary sequence; a slot always sees itself.

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
        sliding_window: W >= 1 in tokens, the row's own among them, or None.
        softcap: c > 0, or None.
        sinks: [Hq] float, one more logit in the softmax of every row of that head, which has no
            value and is neither scaled nor capped; or None.
        return_lse: return out and lse, as :func:`thought_attention_with_lse` does.
        every_position: Promise (unchecked) that every position thinks and sees the whole text before it:
            M is R·N, text_start 0, and text_stop of column m is ``m // R + 1``. It is not checked (that
            would wait for the device) and changes no result, but allows ``"composed"``.
        rationale_major: With ``every_position``, promise (unchecked, too) of the other order of columns:
            text_stop of column m is ``m % N + 1``, one rationale of all positions behind the other.
            ``"composed"`` then makes one call of the stock kernel a row instead of R, and where q and
            out's gradient lie in memory as [B, Sq, R, N, Hq, D] it copies neither of them, nor out.
        impl: ``"auto"``, ``"fused"`` (one kernel), ``"composed"`` (stock attention on the text and
            a kernel for the slots, merged; CUDA only) or ``"reference"``. ``"auto"`` chooses between the
            two by :func:`quietstar_ext.thought_attention.composed.takes_composed`.

    Returns:
        out [B, Hq, Sq, M, D] in q's dtype, with gradients to q, the four key and value tensors and the
        sinks. Sums are taken in float32 or wider. Under autocast the five tensors are cast first, as for
        a matrix product.

    Raises:
        TypeError: an argument that must be a tensor is not one.
        ValueError: a shape, dtype, device or option does not fit, or ``rationale_major`` without
            ``every_position``; the message names the argument.
        RuntimeError: ``impl`` is ``"fused"`` or ``"composed"`` and there is no kernel for this call,
            or a second derivative is taken through a kernel (the reference has them).

    Source: Zelikman et al. 2024 (arXiv 2403.09629), section 4.2, parallel generation.
    """
    tensors = autocast_inputs(q, k_text, v_text, k_thought, v_thought)
    call = ThoughtAttention._make((*tensors, text_start, text_stop, sinks, 1.0, 0, 0.0))
    _check(call)
    q = call.q
    if scale is not None:
        checks.check_number("scale", scale)
    if sliding_window is not None:
        checks.check_whole("sliding_window", sliding_window, 1)
    if softcap is not None:
        checks.check_positive("softcap", softcap)
    if rationale_major:
        _check_rationale_major(call, every_position)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    call = call._replace(scale=scale, window=sliding_window or 0, softcap=float(softcap or 0.0))

    asked = "fused" if impl == "composed" else impl
    reason = fused_unsupported_reason(q) or derivatives_unsupported_reason(*call[:5], sinks)
    chosen = choose_impl(
        "thought_attention", asked, reason, call, kernel=lambda: path_of(impl, call, every_position)
    )
    if chosen == "reference":
        with without_autocast(q):
            out, lse = reference(call)
    else:
        out, lse = attend(call, chosen == "composed", bool(rationale_major))
    return (out, lse) if return_lse else out  # type: ignore[return-value]


def thought_attention_with_lse(
    *tensors: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The out of :func:`thought_attention`, of which it takes the arguments, and lse.

    lse [B, Hq, Sq, M], the natural logarithm of the softmax denominator, is float32 (float64 for float64
    inputs) and carries gradients as out does.
    """
    return thought_attention(*tensors, **options, return_lse=True)  # type: ignore[return-value]


def _check_rationale_major(call: ThoughtAttention, every_position: bool) -> None:
    columns, length = call.q.shape[3], call.k_text.shape[2]
    if not every_position:
        raise ValueError(
            "rationale_major is True and every_position False; expected every_position=True, of whose"
            " columns it is the order"
        )
    if columns % length if length else columns:
        raise ValueError(
            f"rationale_major is True, q has {columns} columns and k_text {length} tokens; expected the"
            " columns to be a multiple of the tokens"
        )


def _check(call: ThoughtAttention) -> None:
    q, k_text, v_text, k_thought, v_thought, text_start, text_stop, sinks, *_ = call
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
    if sinks is not None:
        checks.check_tensor("sinks", sinks, [q_heads], checks.FLOAT_DTYPES, q.device)
