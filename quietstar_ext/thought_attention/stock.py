"""Torch's own causal attention kernels, with the log-sum-exp: the text half of the composed path.

Queries [S, Hq, N, D] over keys [S, Hkv, N, D], as many queries as keys, forward and backward. The
backward takes any ``out`` and ``lse``, also those of a softmax over more keys than these (see
``composed.py``). Rows have to begin at multiples of 16 bytes.

What is copied (``in_order``), and why nothing else:

- The flash kernels take any strides of q, k and v, among them 0, and leave out in the memory order of q.
  Backward they want out and its gradient contiguous as [S, N, Hq, D], and would copy them themselves.
- cuDNN's kernel is compiled for the strides of q, k and v, which torch hands on as they are
  (``run_cudnn_SDP_fprop`` and ``_bprop`` in its aten/src/ATen/native/cudnn/MHA.cpp): heads behind
  positions, or cut out of one product for all three, are what every model gives it. It wants a last
  stride of 1. Keys of stride 0 are no everyday input, and their gradients have other strides: a copy.
- Out is to lie as cuDNN's forward leaves it, dense and in the memory order of q, and its gradient, too.
  cuDNN since 9.5.1 takes other strides of the gradient, but torch keeps what it compiled by the strides
  of q, k and v alone (pytorch pull request 191576): it would read another gradient at the wrong places.

This file holds all private operators of torch that the package uses; ``SCHEMAS`` is what it relies on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from quietstar_ext.dispatch import Setting
from quietstar_ext.thought_attention.call import rows_at_packs

#: The private operators and how torch 2.11 and 2.13 declare them, returns apart (their names have
#: changed before). Where the torch that runs declares one otherwise, its kernel is not used.
SCHEMAS = {
    "_scaled_dot_product_flash_attention": (
        "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, "
        "bool return_debug_mask=False, *, float? scale=None)"
    ),
    "_scaled_dot_product_flash_attention_backward": (
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
        "Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
        "bool is_causal, Tensor philox_seed, Tensor philox_offset, *, float? scale=None)"
    ),
    "_scaled_dot_product_cudnn_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp, "
        "float dropout_p=0., bool is_causal=False, bool return_debug_mask=False, *, float? scale=None)"
    ),
    "_scaled_dot_product_cudnn_attention_backward": (
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
        "Tensor philox_seed, Tensor philox_offset, Tensor attn_bias, Tensor cum_seq_q, "
        "Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, *, "
        "float? scale=None)"
    ),
    "_scaled_dot_product_flash_attention_for_cpu": (
        "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, *, "
        "Tensor? attn_mask=None, float? scale=None)"
    ),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
        "float dropout_p, bool is_causal, *, Tensor? attn_mask=None, float? scale=None)"
    ),
}

KERNELS = ("flash", "cudnn")
# ``auto`` is what the caller prefers. cuDNN's is the faster kernel for long texts on sm_90 (Shah et al.
# 2024, arXiv 2407.08608), but is given copies of the keys for every slot.
_kernel = Setting("QUIETSTAR_STOCK_ATTENTION", ("auto", *KERNELS))


def use_stock(kernel: str) -> contextlib.AbstractContextManager[None]:
    """Inside the block, let the composed path use ``"flash"`` or ``"cudnn"`` on a GPU.

    ``"auto"`` takes what was measured as the faster one.

    The environment variable ``QUIETSTAR_STOCK_ATTENTION`` sets the same for a process.
    """
    return _kernel.use(kernel)


def declared_otherwise(kernel: str) -> str | None:
    """Half a sentence if this torch declares an operator of a kernel in a way not known here."""
    for name, expected in SCHEMAS.items():
        if f"_{kernel}_attention" not in name:
            continue
        operator = getattr(torch.ops.aten, name, None)
        if not str(operator and operator.default._schema).startswith(f"aten::{name}{expected} ->"):
            return f"torch {torch.__version__} declares aten::{name} in another way"
    return None


_OTHERWISE = {kernel: declared_otherwise(kernel) for kernel in KERNELS}


def kernel_for(q: torch.Tensor, preferred: str) -> str:
    """The kernel that takes queries like these: by the setting, or the preferred one if it can."""
    chosen = _kernel.get()
    if chosen != "auto":
        return chosen
    return preferred if _unsupported_reason(q, preferred) is None else "flash"


def stock_unsupported_reason(q: torch.Tensor) -> str | None:
    """Half a sentence on why the stock kernel cannot take queries like these, or None where it can."""
    return _unsupported_reason(q, kernel_for(q, "flash"))


def _unsupported_reason(q: torch.Tensor, kernel: str) -> str | None:
    if q.device.type != "cuda":
        return _OTHERWISE["flash"]
    if _OTHERWISE[kernel] is not None:
        return _OTHERWISE[kernel]
    if q.dtype not in (torch.bfloat16, torch.float16):
        return "the stock kernel takes bfloat16 and float16"
    if q.shape[-1] % 8:
        return f"the stock kernel takes heads of a multiple of 8, not {q.shape[-1]}"
    if kernel == "cudnn" and q.shape[-1] > 128:
        return f"cuDNN's kernel takes heads of at most 128 in both directions, not {q.shape[-1]}"
    return None


def in_order(tensor: torch.Tensor) -> torch.Tensor:
    """A 16-bit tensor, contiguous. Copied, where it has to be, 16 bytes at a time.

    Torch's own copy from other strides takes an element at a time, which leaves bandwidth unused.
    Rows must begin at multiples of 16 bytes in memory wherever strides and offset allow it.
    """
    pack = 16 // tensor.itemsize
    steps = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    if tensor.is_contiguous() or tensor.stride(-1) != 1 or any(step % pack for step in steps):
        return tensor.contiguous()
    return tensor.view(torch.complex128).contiguous().view(tensor.dtype)


def _in_order_of(tensor: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """The tensor, dense in memory with its dimensions in this order, outermost first."""
    return in_order(tensor.permute(*dims)).permute(*(dims.index(d) for d in range(tensor.dim())))


def _memory_order(tensor: torch.Tensor) -> list[int]:
    """The dimensions by their strides, outermost first."""
    return sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)


def _read_by_cudnn(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous where its strides are none that cuDNN's kernel is given every day."""
    repeated = any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    fine = not repeated and rows_at_packs(tensor, int(tensor.storage_offset()) * tensor.itemsize)
    return tensor if fine else in_order(tensor)


def stock_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, preferred: str = "flash"
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [S, Hq, N, D] and lse [S, Hq, N] fp32, any strides."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        op = aten._scaled_dot_product_flash_attention_for_cpu
        return op(q, k, v, 0.0, True, scale=scale)
    if kernel_for(q, preferred) == "cudnn":
        q, k, v = map(_read_by_cudnn, (q, k, v))
        op = aten._scaled_dot_product_cudnn_attention
        out, lse, *_ = op(q, k, v, None, True, 0.0, True, False, scale=scale)
        return out, lse.reshape(q.shape[:-1])
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    return out, lse


def stock_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    preferred: str = "flash",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, of the share of the softmax that ``lse`` leaves to these keys."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        # This one reads lse in the order in which its forward leaves it: heads fastest.
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
        op = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return op(dout, q, k, v, out, lse, 0.0, True, scale=scale)
    length = q.shape[2]
    no_numbers = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is not
    if kernel_for(q, preferred) == "cudnn":
        # It takes out to lie as its forward would have left it, and the statistics with a last 1.
        q, k, v = map(_read_by_cudnn, (q, k, v))
        dout, out = (_in_order_of(t, _memory_order(q)) for t in (dout, out))
        return aten._scaled_dot_product_cudnn_attention_backward(
            *(dout, q, k, v, out, lse.contiguous()[..., None], no_numbers, no_numbers),
            *(None, None, None, length, length, 0.0, True),
            scale=scale,
        )
    # It wants these two contiguous with the heads behind the positions, and would copy them itself.
    dout, out = (_in_order_of(t, (0, 2, 1, 3)) for t in (dout, out))
    return aten._scaled_dot_product_flash_attention_backward(
        *(dout, q, k, v, out, lse.contiguous(), None, None, length, length, 0.0, True),
        *(no_numbers, no_numbers),
        scale=scale,
    )
