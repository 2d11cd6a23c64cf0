"""The mixing head: how much of a prediction comes from the thought."""

from __future__ import annotations

import torch

from quietstar_ext import checks
from quietstar_ext.derivatives import derivatives_unsupported_reason
from quietstar_ext.dispatch import choose_impl
from quietstar_ext.mixing_head.call import MixingHead
from quietstar_ext.mixing_head.fused import fused, fused_unsupported_reason
from quietstar_ext.mixing_head.reference import reference
from quietstar_ext.precision import autocast_inputs, without_autocast

ACTIVATIONS = ("identity", "sigmoid")


def mixing_head(
    base: torch.Tensor,
    thought: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    w3: torch.Tensor,
    activation: str = "identity",
    *,
    base_index: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend each thought row with the base row that it speaks for.

    With b = base[base_index[r]] and z = thought[r]::

        h1 = relu(w1 [b ; z] + b1)     h2 = relu(w2 h1 + b2)     w = act(w3 h2)
        mixed = (1 - w) b + w z

    ``[b ; z]`` is never built: w1 splits into a base half and a thought half, and the base half is
    applied once to each of the P base rows, however many thought rows refer to it.

    Args:
        base: [P, d] hidden states without a thought; float32, bfloat16, float16 or float64
            (reference only).
        thought: [rows, d] hidden states after a thought, dtype and device of base.
        w1: [d, 2d], columns of the base first.
        b1: [d].
        w2: [d, d].
        b2: [d].
        w3: [1, d], no bias. All parameters have base's dtype and device.
        activation: ``"identity"`` (w is unbounded) or ``"sigmoid"``.
        base_index: [rows] int64 in 0 .. P-1, the base row of each thought row; None is row for row
            and needs P == rows. Checked on the CPU; out of range it is a device-side assertion on
            CUDA, as for PyTorch's own indexing.
        impl: ``"auto"``, ``"fused"`` or ``"reference"``.

    Returns:
        mixed [rows, d] and w [rows, 1], both in base's dtype and both with gradients for base,
        thought and the five parameters. The blend uses w before it is rounded to that dtype. Under
        autocast all seven tensors are cast first, as for a matrix product.

    Raises:
        TypeError: an argument that must be a tensor is not one.
        ValueError: a shape, dtype, device, index or option does not fit; the message names the argument.
        RuntimeError: ``impl="fused"`` and there is no kernel for this call, or a second derivative is
            taken through a kernel (the reference has them).

    Source: Zelikman et al. 2024 (arXiv 2403.09629), section 4.3. Mixing hidden states is mixing
    logits as long as the vocabulary layer is linear.
    """
    base, thought, w1, b1, w2, b2, w3 = autocast_inputs(base, thought, w1, b1, w2, b2, w3)
    call = MixingHead(base, thought, w1, b1, w2, b2, w3, base_index, activation == "sigmoid")
    _check(call, activation)

    reason = fused_unsupported_reason(thought) or derivatives_unsupported_reason(*call[:7])
    chosen = choose_impl("mixing_head", impl, reason, call)
    with without_autocast(thought):
        return reference(call) if chosen == "reference" else fused(call)


def _check(call: MixingHead, activation: str) -> None:
    base, thought, w1, b1, w2, b2, w3, base_index, _ = call
    checks.check_tensor("base", base, ["P", "d"], checks.FLOAT_DTYPES)
    positions, size = base.shape
    same = ([base.dtype], base.device)
    checks.check_tensor("thought", thought, ["rows", size], *same)
    checks.check_tensor("w1", w1, [size, 2 * size], *same)
    checks.check_tensor("b1", b1, [size], *same)
    checks.check_tensor("w2", w2, [size, size], *same)
    checks.check_tensor("b2", b2, [size], *same)
    checks.check_tensor("w3", w3, [1, size], *same)
    checks.check_option("activation", activation, ACTIVATIONS)
    rows = thought.shape[0]
    if base_index is not None:
        checks.check_tensor("base_index", base_index, [rows], [torch.int64], base.device)
        checks.check_index_range("base_index", base_index, positions)
    elif rows != positions:
        raise ValueError(
            f"base has {positions} rows and thought {rows}; expected the same number, or a base_index"
        )
