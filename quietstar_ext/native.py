"""The compiled kernels: loading them, what they were built with, and how a tensor reaches them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

# torch first: its wheel brings libgomp, and _native must resolve the same name to the same library.
import torch

from quietstar_ext.checks import dtype_name

# The numbers of quietstar::DType in csrc/include/quietstar/types.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_HOW_TO_BUILD = (
    "install the package with 'pip install .', or build in place with "
    "'python setup.py build_ext --inplace'"
)


def _hidden_package(here: Path, search: list[str]) -> Path | None:
    """The first folder of this name on the path, other than ``here``, that has a native module.

    Python started in a clone finds the clone's source folder before the package that was installed.
    """
    for entry in search:
        other = Path(entry or ".").resolve() / here.name
        if other != here.resolve() and any(
            (other / f"_native{suffix}").is_file() for suffix in EXTENSION_SUFFIXES
        ):
            return other
    return None


def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("quietstar_ext._native")
    except ImportError as error:
        here = Path(__file__).parent
        hidden = _hidden_package(here, sys.path)
        remedy = (
            f"the source folder {here} hides the package installed in {hidden}; start Python in another "
            "folder, or with 'python -P'"
            if hidden
            else _HOW_TO_BUILD
        )
        return None, f"the native module is missing ({error}); {remedy}"
    level = os.environ.get("QUIETSTAR_SIMD")
    if level:
        try:
            module.set_simd(level)
        except ValueError as error:
            raise ValueError(f"environment variable QUIETSTAR_SIMD: {error}") from None
    return module, ""


_module, _missing = _load()


def native() -> ModuleType:
    """Return the native module; ``RuntimeError`` says how to build it where it is missing."""
    if _module is None:
        raise RuntimeError(_missing)
    return _module


def native_unsupported_reason(tensor: torch.Tensor) -> str | None:
    """Half a sentence on why no kernel can read this tensor, or None where one can."""
    if _module is None:
        return _missing
    if tensor.device.type == "cuda":
        reason = _cuda_unsupported_reason(tensor.device)
        if reason is not None:
            return reason
    elif tensor.device.type != "cpu":
        return f"this build has no kernel for the device type {tensor.device.type}"
    if tensor.dtype not in DTYPE_CODES:
        return f"the kernel takes float32, bfloat16 and float16, not {dtype_name(tensor.dtype)}"
    return None


@torch.compiler.assume_constant_result
def _cuda_unsupported_reason(device: torch.device) -> str | None:
    return _device_unsupported_reason(device)


@functools.cache
def _device_unsupported_reason(device: torch.device) -> str | None:
    assert _module is not None
    archs = _module.build_info()["cuda_archs"]
    if not archs:
        return (
            "this build has no CUDA kernels, as there was no GPU or no nvcc where it was built, or they "
            "were not wanted; reinstall with QUIETSTAR_CUDA=on, which needs a C++ compiler only"
        )
    capability = torch.cuda.get_device_capability(device)
    driver, runtime = _module.cuda_versions()
    return capability_unsupported_reason(archs, capability, driver, runtime, str(device))


def capability_unsupported_reason(
    archs: str, capability: tuple[int, int], driver: int, runtime: int, device: str
) -> str | None:
    """Half a sentence on why kernels cannot run on a device, or None where they can.

    Args:
        archs: what they were built for, such as ``"sm_80, sm_90, compute_80"``: machine code for two
            architectures, and PTX for the driver to compile.
        driver: the newest CUDA that the driver supports, as CUDA numbers it (12040 is 12.4).
        runtime: the CUDA that they were built with.
    """
    major, minor = capability
    if major < 8:
        return f"the CUDA kernels need compute capability 8.0 or more, and {device} has {major}.{minor}"
    if driver // 1000 < runtime // 1000:
        return (
            f"the CUDA kernels were built with CUDA {_version(runtime)}, and the driver supports CUDA "
            f"{_version(driver)} at most; update the driver, or reinstall with the nvcc of CUDA "
            f"{driver // 1000} on the PATH"
        )
    names = [name.strip() for name in archs.split(",")]
    if any(_runs_on(name, major, minor) for name in names if name.startswith("sm_")):
        return None
    ptx = [name.removeprefix("compute_") for name in names if name.startswith("compute_")]
    if any(divmod(int(number), 10) <= capability for number in ptx):
        if driver >= runtime:
            return None
        return (
            f"{device} has compute capability {major}.{minor}, for which a driver for CUDA "
            f"{_version(runtime)} or newer has to compile the CUDA kernels, and this one is for CUDA "
            f"{_version(driver)}; update the driver, or reinstall with "
            f"QUIETSTAR_CUDA_ARCHS=sm_{major}{minor}"
        )
    return (
        f"the CUDA kernels were built for {archs}, and {device} has compute capability {major}.{minor}; "
        f"reinstall with QUIETSTAR_CUDA_ARCHS=sm_{major}{minor}"
    )


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether machine code for ``"sm_80"``, or ``"sm_90a"``, runs on a device."""
    built = divmod(int(arch.removeprefix("sm_").rstrip("af")), 10)
    if arch.endswith("a"):
        return built == (major, minor)
    return built[0] == major and built[1] <= minor


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


# The module whose CUDA functions take CPU tensors, while a test runs them there.
_cuda_module: ModuleType | None = None


def fields(*values: Any) -> tuple[Any, ...]:
    """The fields of a call's struct in csrc/include, in its order: a tensor as its address, a dtype as
    its number, None as 0."""
    return tuple(map(_field, values))


_PLAIN = (int, float, tuple)  # a union would be built again for every field


def _field(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if value is None:
        return 0
    return DTYPE_CODES[value] if isinstance(value, torch.dtype) else value.data_ptr()


@contextlib.contextmanager
def cuda_on_cpu(module: ModuleType) -> Iterator[None]:
    """For tests: CPU tensors take the CUDA path inside the block, with the functions of ``module``,
    which is ``csrc/cuda`` compiled for the CPU (``csrc/testing``)."""
    global _cuda_module
    previous, _cuda_module = _cuda_module, module
    try:
        yield
    finally:
        _cuda_module = previous


def takes_cuda_path(tensor: torch.Tensor) -> bool:
    """Whether the kernels for this tensor are the CUDA ones."""
    return tensor.device.type == "cuda" or _cuda_module is not None


def cuda_kernels() -> ModuleType:
    """The module with the CUDA functions, whose last argument is a :func:`cuda_device`."""
    return native() if _cuda_module is None else _cuda_module


def cuda_device(tensor: torch.Tensor) -> tuple[int, int]:
    """Number of the tensor's device, and the current stream of that device as an address."""
    if tensor.device.type != "cuda":
        return 0, 0
    index = tensor.device.index
    return index, torch.cuda.current_stream(index).cuda_stream


def build_info() -> dict[str, Any]:
    """What the native module is and was built with.

    ``native`` (is it there), and then ``path``, ``version``, ``simd`` (in use), ``simd_compiled``,
    ``simd_supported`` (by this machine), ``cuda_archs`` (empty in a CPU build), ``openmp``; where it
    is not there, ``missing`` says why.
    """
    if _module is None:
        return {"native": False, "missing": _missing}
    return {"native": True, "path": _module.__file__, **_module.build_info()}


@contextlib.contextmanager
def use_simd(level: str) -> Iterator[None]:
    """Force the CPU kernels to ``"avx512"``, ``"avx2"`` or ``"generic"`` inside the block.

    It holds for the whole process, other threads included. ``ValueError`` where this machine does
    not support the level. The environment variable ``QUIETSTAR_SIMD`` does it for good.
    """
    previous = native().build_info()["simd"]
    native().set_simd(level)
    try:
        yield
    finally:
        native().set_simd(previous)
