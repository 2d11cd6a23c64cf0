"""What is installed: what was compiled, what torch offers, which implementation runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import quietstar_ext


def compiled() -> dict[str, str]:
    """What is in the native module."""
    build_info = getattr(quietstar_ext, "build_info", None)
    if build_info is None:
        return {"native module": "not built; every operator runs as plain PyTorch"}
    try:
        facts = build_info()
    except (ImportError, OSError, RuntimeError) as error:
        return {"native module": f"cannot be loaded: {' '.join(str(error).split())}"}
    return {str(key).replace("_", " "): _words(value) for key, value in facts.items()}


def torch_offers() -> dict[str, str]:
    """Threads and devices."""
    offers = {
        "threads": str(torch.get_num_threads()),
        "cuda": torch.version.cuda or "CPU-only build",
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        offers[f"cuda:{index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    if torch.version.cuda and not torch.cuda.is_available():
        offers["devices"] = "no CUDA device found"
    return offers


def implementation(operator: str, device: str) -> str:
    """``fused``, or ``reference`` and why: found by asking for the kernel on a tiny input."""
    try:
        PROBES[operator](device)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split()).split("cannot be used here: ")[-1]
        return f"reference ({reason})"
    return "fused"


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value in (None, "") else str(value)


def _thought_attention(device: str) -> None:
    q = torch.zeros(1, 1, 1, 1, 16, device=device)
    text = torch.zeros(1, 1, 2, 16, device=device)
    start = torch.zeros(1, 1, dtype=torch.int32, device=device)
    quietstar_ext.thought_attention(q, text, text, q, q, start, start + 1, impl="fused")


def _sample_tokens(device: str) -> None:
    quietstar_ext.sample_tokens(torch.zeros(1, 8, device=device), seed=0, impl="fused")


def _linear_sample(device: str) -> None:
    x = torch.zeros(8, 8, device=device)
    quietstar_ext.linear_sample(x, x, seed=0, impl="fused")


def _linear_cross_entropy(device: str) -> None:
    x = torch.zeros(8, 8, device=device)
    targets = torch.zeros(8, dtype=torch.int64, device=device)
    quietstar_ext.linear_cross_entropy(x, x, targets, impl="fused")


def _mixing_head(device: str) -> None:
    d = 8
    x, bias = torch.zeros(2, d, device=device), torch.zeros(d, device=device)
    w1, w2 = torch.zeros(d, 2 * d, device=device), torch.zeros(d, d, device=device)
    w3 = torch.zeros(1, d, device=device)
    quietstar_ext.mixing_head(x, x, w1, bias, w2, bias, w3, "identity", impl="fused")


PROBES: dict[str, Callable[[str], None]] = {
    "thought_attention": _thought_attention,
    "sample_tokens": _sample_tokens,
    "linear_sample": _linear_sample,
    "linear_cross_entropy": _linear_cross_entropy,
    "mixing_head": _mixing_head,
}
