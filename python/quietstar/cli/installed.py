"""What is installed: what was compiled, what torch offers, which implementation runs."""

from __future__ import annotations

import platform
from typing import Any

import torch

import quietstar_ext
from quietstar.versions import package_versions


def report() -> dict[str, dict[str, Any]]:
    """All of it as JSON takes it: ``versions``, ``compiled``, ``torch`` and ``operators``, the last by
    device."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "versions": {
            **package_versions(),
            "torch": torch.__version__,  # which build, too
            "system": platform.platform(),
        },
        "compiled": compiled(),
        "torch": torch_offers(),
        "operators": {
            device: {name: implementation(name, device) for name in PROBES} for device in devices
        },
    }


def compiled() -> dict[str, Any]:
    """What is in the native module."""
    build_info = getattr(quietstar_ext, "build_info", None)
    if build_info is None:
        return {"native": False, "missing": "not built; every operator runs as plain PyTorch"}
    try:
        facts: dict[str, Any] = build_info()
    except (ImportError, OSError, RuntimeError) as error:
        return {"native": False, "missing": f"cannot be loaded: {' '.join(str(error).split())}"}
    if torch.cuda.is_available() and not facts.get("cuda_archs"):
        facts["cuda_kernels"] = "none in this build; QUIETSTAR_CUDA=on pip install . compiles them"
    return facts


def torch_offers() -> dict[str, Any]:
    """Threads and devices."""
    offers: dict[str, Any] = {
        "threads": torch.get_num_threads(),
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


def implementation(operator: str, device: str) -> dict[str, str]:
    """``implementation``: fused, or reference with a ``reason``, found by asking for the kernel on a
    tiny input."""
    try:
        inputs = [x.to(device) if isinstance(x, torch.Tensor) else x for x in PROBES[operator]]
        seed = {"seed": 0} if operator in ("sample_tokens", "linear_sample") else {}
        getattr(quietstar_ext, operator)(*inputs, **seed, impl="fused")
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split()).split("cannot be used here: ")[-1]
        return {"implementation": "reference", "reason": reason}
    return {"implementation": "fused"}


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


_Q, _TEXT, _START = _zeros(1, 1, 1, 1, 16), _zeros(1, 1, 2, 16), _zeros(1, 1, dtype=torch.int32)
_X, _BIAS = _zeros(8, 8), _zeros(8)
# A tiny input of each operator, to be moved to the device that is asked about.
PROBES: dict[str, tuple[Any, ...]] = {
    "thought_attention": (_Q, _TEXT, _TEXT, _Q, _Q, _START, _START + 1),
    "sample_tokens": (_X,),
    "linear_sample": (_X, _X),
    "linear_cross_entropy": (_X, _X, _zeros(8, dtype=torch.int64)),
    "mixing_head": (_X, _X, _zeros(8, 16), _BIAS, _X, _BIAS, _zeros(1, 8), "identity"),
}
