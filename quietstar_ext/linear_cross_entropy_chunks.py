"""The fused path of linear_cross_entropy: row chunks through the framework's GEMM.

A chunk of rows is multiplied with the vocabulary layer, the logits are turned in place into losses
or into gradients, and the gradients go through the GEMM again before the next chunk takes the same
memory. At most ``WORKSPACE_BYTES`` of logits are alive (one row at least). Rows that cannot
contribute are gathered away first, so they cost no product.

Counted for rows x vocabulary logits of width d: 2·rows·V·d operations a product; forward one
product, backward three (the logits again, and one for each gradient), forward_and_backward three.

The three are registered with ``torch.library``, opaque to ``torch.compile``, because how many rows
remain is known at run time only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quietstar_ext.precision import compute_dtype

WORKSPACE_BYTES = 64 * 2**20

_OPTIONS = "Tensor? banned, float temperature, int ignore_index, float? softcap, float logit_scale"
_INPUTS = "Tensor hidden, Tensor weight, Tensor targets"
_WANTED = "bool want_hidden, bool want_weight"

torch.library.define(
    "quietstar::linear_cross_entropy_forward", f"({_INPUTS}, {_OPTIONS}) -> Tensor"
)
torch.library.define(
    "quietstar::linear_cross_entropy_backward",
    f"(Tensor grad, {_INPUTS}, {_OPTIONS}, {_WANTED}) -> (Tensor, Tensor)",
)
torch.library.define(
    "quietstar::linear_cross_entropy_forward_and_backward",
    f"({_INPUTS}, Tensor row_weights, {_OPTIONS}, bool skip_zero_weight, {_WANTED})"
    " -> (Tensor, Tensor, Tensor)",
)


def softmax_cross_entropy_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    row_weights: torch.Tensor | None,
    banned: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a chunk, and in the same memory its gradient: the place of the kernel.

    Args:
        logits: [rows, V], raw products in hidden's dtype; overwritten.
        targets: [rows] int64, all in 0 .. V-1.
        row_weights: [rows] in the dtype of the result, or None if no gradient is wanted.
        banned: [n] int64, or None.

    Returns:
        nll [rows] in float32 (float64 for float64), and the gradient of Σ row_weights · nll with
        respect to the raw products [rows, V] in their dtype (undefined if row_weights is None).
    """
    x = logits.to(compute_dtype(logits.dtype)).mul_(logit_scale)
    slope = None
    if softcap is not None:
        x.div_(softcap).tanh_()
        if row_weights is not None:
            slope = x.square().neg_().add_(1)
        x.mul_(softcap)
    x.div_(temperature)
    if banned is not None:
        x.index_fill_(1, banned, -torch.inf)
    at_target = x.gather(1, targets[:, None])
    largest = x.amax(1, keepdim=True)
    x.sub_(largest).exp_()
    total = x.sum(1, keepdim=True)
    nll = (total.log() + (largest - at_target))[:, 0]
    if row_weights is None:
        return nll, logits
    x.div_(total)
    # A banned target is a constant (-inf): only the log-sum-exp has a gradient then.
    x.scatter_add_(1, targets[:, None], -(at_target != -torch.inf).to(x.dtype))
    if slope is not None:
        x.mul_(slope)
    x.mul_(row_weights[:, None] * (logit_scale / temperature))
    return nll, logits.copy_(x) if logits.dtype != x.dtype else x


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    banned: torch.Tensor | None,
    temperature: float,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> torch.Tensor:
    """nll [rows] in float32 or float64; no gradient is recorded."""
    nll: torch.Tensor = torch.ops.quietstar.linear_cross_entropy_forward(
        hidden, weight, targets, banned, temperature, ignore_index, softcap, logit_scale
    )
    return nll


def backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    banned: torch.Tensor | None,
    temperature: float,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of Σ grad · nll in the dtype of hidden; empty where it is not wanted."""
    gradients: tuple[torch.Tensor, torch.Tensor]
    gradients = torch.ops.quietstar.linear_cross_entropy_backward(
        grad,
        hidden,
        weight,
        targets,
        banned,
        temperature,
        ignore_index,
        softcap,
        logit_scale,
        want_hidden,
        want_weight,
    )
    return gradients


def forward_and_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    row_weights: torch.Tensor,
    banned: torch.Tensor | None,
    temperature: float,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    skip_zero_weight: bool,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """nll [rows], and the gradients of Σ row_weights · nll for hidden (its dtype) and weight
    (float32 or float64, so that a factor that comes later is applied before it is rounded)."""
    results: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    results = torch.ops.quietstar.linear_cross_entropy_forward_and_backward(
        hidden,
        weight,
        targets,
        row_weights,
        banned,
        temperature,
        ignore_index,
        softcap,
        logit_scale,
        skip_zero_weight,
        want_hidden,
        want_weight,
    )
    return results


@torch.library.impl("quietstar::linear_cross_entropy_forward", ("cpu", "cuda"))
def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    banned: torch.Tensor | None,
    temperature: float,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> torch.Tensor:
    nll, _, _ = _run(
        hidden,
        weight,
        targets,
        None,
        targets != ignore_index,
        banned,
        temperature,
        softcap,
        logit_scale,
        False,
        False,
    )
    return nll


@torch.library.impl("quietstar::linear_cross_entropy_backward", ("cpu", "cuda"))
def _backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    banned: torch.Tensor | None,
    temperature: float,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _, grad_hidden, grad_weight = _run(
        hidden,
        weight,
        targets,
        grad,
        (targets != ignore_index) & (grad != 0),
        banned,
        temperature,
        softcap,
        logit_scale,
        want_hidden,
        want_weight,
    )
    return grad_hidden, grad_weight.to(hidden.dtype)


@torch.library.impl("quietstar::linear_cross_entropy_forward_and_backward", ("cpu", "cuda"))
def _forward_and_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    row_weights: torch.Tensor,
    banned: torch.Tensor | None,
    temperature: float,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    skip_zero_weight: bool,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    live = targets != ignore_index
    if skip_zero_weight:
        live &= row_weights != 0
    return _run(
        hidden,
        weight,
        targets,
        row_weights,
        live,
        banned,
        temperature,
        softcap,
        logit_scale,
        want_hidden,
        want_weight,
    )


def _run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    row_weights: torch.Tensor | None,
    live: torch.Tensor,
    banned: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """nll [rows] and the gradients for hidden and weight (empty if not wanted) of the live rows."""
    wide = compute_dtype(hidden.dtype)
    if not (want_hidden or want_weight):
        row_weights = None
    nll = torch.zeros(hidden.shape[0], dtype=wide, device=hidden.device)
    grad_hidden = hidden.new_zeros(hidden.shape if want_hidden else (0,))
    # Summed in float32: hundreds of chunks added up in bfloat16 would lose the small ones.
    grad_weight = torch.zeros(
        weight.shape if want_weight else (0,), dtype=wide, device=weight.device
    )
    for rows in _row_chunks(live, weight.shape[0], hidden.dtype, softcap is not None):
        h, t = hidden[rows], targets[rows]
        logits = h @ weight.T
        scale = None if row_weights is None else row_weights[rows]
        nll[rows], gradient = softmax_cross_entropy_(
            logits, t, scale, banned, temperature, softcap, logit_scale
        )
        if want_hidden:
            grad_hidden[rows] = gradient @ weight
        if want_weight and gradient.dtype == wide:
            grad_weight.addmm_(gradient.T, h)
        elif want_weight:
            grad_weight.add_(gradient.T @ h)
        del logits, gradient  # before the next chunk asks for the same memory
    return nll, grad_hidden, grad_weight


def _row_chunks(
    live: torch.Tensor, vocabulary: int, dtype: torch.dtype, capped: bool
) -> Iterator[slice | torch.Tensor]:
    """Cut the live rows into chunks of equal size whose logits fit the workspace.

    Yields slices if every row is live, index tensors otherwise. Finding the live rows waits for the
    device once.
    """
    wide = compute_dtype(dtype)
    bytes_per_logit = wide.itemsize * (2 if capped else 1)
    if dtype != wide:
        bytes_per_logit += dtype.itemsize
    most = max(1, WORKSPACE_BYTES // (vocabulary * bytes_per_logit))
    index = live.nonzero()[:, 0]
    rows = index.numel()
    size = -(-rows // -(-rows // most)) if rows else 1
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        yield slice(start, stop) if rows == live.numel() else index[start:stop]


@torch.library.register_fake("quietstar::linear_cross_entropy_forward")
def _(hidden, weight, targets, banned, temperature, ignore_index, softcap, logit_scale):  # type: ignore[no-untyped-def]
    return hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden.dtype))


@torch.library.register_fake("quietstar::linear_cross_entropy_backward")
def _(grad, hidden, weight, *rest):  # type: ignore[no-untyped-def]
    want_hidden, want_weight = rest[-2:]
    return (
        hidden.new_empty(hidden.shape if want_hidden else (0,)),
        weight.new_empty(weight.shape if want_weight else (0,)),
    )


@torch.library.register_fake("quietstar::linear_cross_entropy_forward_and_backward")
def _(hidden, weight, *rest):  # type: ignore[no-untyped-def]
    want_hidden, want_weight = rest[-2:]
    wide = compute_dtype(hidden.dtype)
    return (
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape if want_hidden else (0,)),
        weight.new_empty(weight.shape if want_weight else (0,), dtype=wide),
    )
