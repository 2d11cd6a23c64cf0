"""Shapes, random inputs and two slow constructions that the tests of thought_attention share."""

from __future__ import annotations

import torch

from quietstar_ext.native import fields
from quietstar_ext.thought_attention.call import place

TENSORS = ["q", "k_text", "v_text", "k_thought", "v_thought"]

#            B  Hq Hkv Sq Sk  M  N  D   options
SHAPES = {
    "packed": (2, 4, 2, 3, 3, 5, 6, 8, {}),
    "rollout step": (2, 2, 2, 1, 4, 7, 5, 16, {}),
    "two new slots": (1, 4, 1, 2, 5, 3, 9, 5, {}),
    "generation": (3, 2, 1, 1, 2, 1, 11, 7, {}),
    "text rows": (2, 4, 2, 1, 0, 6, 6, 8, {}),
    "text rows in a window": (2, 2, 1, 1, 0, 9, 9, 4, {"sliding_window": 3}),
    "window": (2, 2, 2, 4, 4, 6, 8, 8, {"sliding_window": 4}),
    "window of one": (1, 2, 1, 3, 3, 4, 5, 4, {"sliding_window": 1}),
    "window past the start": (1, 2, 1, 2, 3, 4, 5, 4, {"sliding_window": 100}),
    "window within the slots": (2, 4, 2, 7, 7, 4, 5, 8, {"sliding_window": 3}),
    "step past its window": (1, 2, 1, 1, 9, 3, 5, 8, {"sliding_window": 4}),
    "two slots past their window": (
        *(2, 4, 2, 2, 7, 3, 6, 4),
        {"sliding_window": 3, "sinks": True, "softcap": 2.0},
    ),
    "softcap": (2, 4, 2, 2, 3, 4, 5, 8, {"softcap": 1.5}),
    "scale": (1, 2, 1, 2, 2, 3, 4, 6, {"scale": 0.9}),
    "sinks": (2, 4, 2, 2, 2, 3, 4, 8, {"sinks": True}),
    "everything": (2, 6, 2, 2, 4, 5, 7, 3, {"sinks": True, "softcap": 2.0, "sliding_window": 5}),
    "no text": (1, 2, 1, 3, 3, 4, 0, 4, {}),
    "one element": (1, 1, 1, 1, 1, 1, 1, 1, {}),
}


def sizes_alone(dtype, sizes, threads=1):
    """The kernels' struct for B, Hq, Hkv, Sq, Sk, M, N and D, with no memory behind its pointers."""
    tensors = [place(None)] * 6
    return fields(dtype, *sizes, *tensors, *[None] * 4, 1.0, 0, 0.0, threads, False, None)


def make(b, hq, hkv, sq, sk, m, n, d, options=None, dtype=torch.float64):
    """Random inputs: ranges of any place and length, empty ones among them, some shared."""
    tensors = [
        torch.randn(b, hq, sq, m, d),
        torch.randn(b, hkv, n, d),
        torch.randn(b, hkv, n, d),
        torch.randn(b, hkv, sk, m, d),
        torch.randn(b, hkv, sk, m, d),
    ]
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    stop = torch.randint(0, n + 1, (b, m), dtype=torch.int32)
    stop[:, -1:] = stop[:, :1]
    start = (torch.rand(b, m) * (stop + 1)).int()
    options = dict(options or {})
    if options.get("sinks"):
        options["sinks"] = torch.randn(hq, dtype=dtype, requires_grad=True)
    return tensors, start, stop, options


def every_position(
    b,
    hq,
    hkv,
    slots,
    key_slots,
    length,
    rationales,
    size,
    dtype,
    device,
    sinks=False,
    rationale_major=False,
):
    """Inputs with a column per position and rationale, as leaves, and their ranges."""
    columns = length * rationales
    tensors, _, _, options = make(
        b, hq, hkv, slots, key_slots, columns, length, size, {"sinks": sinks}, dtype=dtype
    )
    tensors = [t.detach().to(device).requires_grad_() for t in tensors]
    column = torch.arange(columns, dtype=torch.int32, device=device)
    stop = (column % length if rationale_major else column // rationales) + 1
    stop = stop.expand(b, -1).contiguous()
    sink = options["sinks"].detach().float().to(device).requires_grad_() if sinks else None
    return tensors, torch.zeros_like(stop), stop, sink


def made(place, *shape, dtype=None):
    """The same on a place's device, in its dtype."""
    tensors, start, stop, options = make(*shape, dtype=dtype or place.dtype)
    tensors = [t.detach().to(place.device).requires_grad_() for t in tensors]
    if isinstance(options.get("sinks"), torch.Tensor):
        options["sinks"] = options["sinks"].detach().to(place.device).requires_grad_()
    return tensors, start.to(place.device), stop.to(place.device), options


def draw(*values):
    return values[int(torch.randint(len(values), ()))]


def random_shape(slots, sizes, lengths, columns):
    """A shape and options as in ``SHAPES``, of so many key slots, head sizes, texts and columns."""
    hkv, groups, sk = draw(1, 2), draw(1, 2, 3, 4), draw(*slots)
    sq = draw(1, sk, max(1, sk - 2)) if sk else 1
    options = {"sinks": draw(True, False)}
    if draw(True, False):
        options["sliding_window"] = int(torch.randint(1, draw(12, 100), ()))
    if draw(True, False, False):
        options["softcap"] = 2.5
    batch, *rest = draw(1, 2), draw(*columns), draw(*lengths), draw(*sizes)
    shape = (batch, hkv * groups, hkv, sq, sk, *rest, options)
    print(shape)
    return shape


def seen_by(start, stop, s, query_slots, key_slots, length, window):
    """The rule, one row at a time: text positions and slots that query slot s may look at."""
    depth = s + 1 + key_slots - query_slots
    text = [
        j for j in range(length) if start <= j < stop and (window is None or j >= stop + depth - window)
    ]
    return text, list(range(0 if window is None else max(0, depth - window), depth))


def row_by_row(tensors, start, stop, scale=None, sliding_window=None, softcap=None, sinks=None):
    q, k_text, v_text, k_thought, v_thought = tensors
    b, hq, sq, m, d = q.shape
    group = hq // k_text.shape[1]
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=q.dtype, device=q.device)
    out, lse = out.clone(), lse.clone()
    for i in range(b):
        for h in range(hq):
            for s in range(sq):
                for c in range(m):
                    text, slots = seen_by(
                        int(start[i, c]),
                        int(stop[i, c]),
                        s,
                        sq,
                        k_thought.shape[2],
                        k_text.shape[2],
                        sliding_window,
                    )
                    g = h // group
                    keys = torch.cat([k_text[i, g, text], k_thought[i, g, slots, c]])
                    values = torch.cat([v_text[i, g, text], v_thought[i, g, slots, c]])
                    x = keys @ q[i, h, s, c] * (d**-0.5 if scale is None else scale)
                    if softcap is not None:
                        x = softcap * torch.tanh(x / softcap)
                    if sinks is not None:
                        x = torch.cat([x, sinks[h : h + 1]])
                        values = torch.cat([values, values.new_zeros(1, d)])
                    if len(x):
                        out[i, h, s, c] = torch.softmax(x, 0) @ values
                        lse[i, h, s, c] = torch.logsumexp(x, 0)
    return out, lse


def dense(tensors, start, stop, sliding_window=None):
    """One dense mask over [text, slots x columns] and PyTorch's own attention."""
    q, k_text, v_text, k_thought, v_thought = tensors
    b, _, sq, m, _ = q.shape
    sk, n = k_thought.shape[2], k_text.shape[2]
    text = torch.arange(n, device=q.device)
    depth = torch.arange(1, sq + 1, device=q.device)[:, None, None] + sk - sq
    mask = torch.zeros(b, sq, m, n + sk * m, dtype=torch.bool, device=q.device)
    for i in range(b):
        first, last = start[i][None, :, None], stop[i][None, :, None]
        seen = ((text >= first) & (text < last)).expand(sq, m, n)
        if sliding_window is not None:
            seen = seen & (last - 1 + depth - text < sliding_window)
        band = torch.ones(sq, sk, device=q.device).tril(sk - sq)
        if sliding_window is not None:
            band = band.triu(sk - sq - sliding_window + 1)
        diagonals = torch.einsum("st,mc->smtc", band, torch.eye(m, device=q.device))
        mask[i] = torch.cat([seen, diagonals.reshape(sq, m, sk * m).bool()], -1)
    k = torch.cat([k_text, k_thought.flatten(2, 3)], 2)
    v = torch.cat([v_text, v_thought.flatten(2, 3)], 2)
    group = q.shape[1] // k.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        q.flatten(2, 3),
        k.repeat_interleave(group, 1),
        v.repeat_interleave(group, 1),
        attn_mask=mask.flatten(1, 2)[:, None],
    )
    return out.reshape(q.shape)


def gradients(outputs, inputs):
    """Gradients of a fixed random combination of the outputs, finite entries only."""
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (o[o.isfinite()] * torch.randn(o.shape, generator=generator).to(o)[o.isfinite()]).sum()
        for o in outputs
    )
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
