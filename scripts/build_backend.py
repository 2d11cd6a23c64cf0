"""The build backend: setuptools', with nvcc from PyPI where CUDA is wanted and no toolkit is installed.

It also decides what is compiled, by these environment variables:

- ``QUIETSTAR_CUDA``: ``auto`` (default) compiles the kernels for the GPUs of this machine where nvcc is
  found; ``on`` compiles them in any case; ``off`` leaves them out.
- ``QUIETSTAR_CUDA_ARCHS``: such as ``sm_80,sm_90``, or ``native``; default: the GPUs of this machine,
  and where there is none every architecture that the compiler knows of ``ARCHS``.
- ``QUIETSTAR_CUDA_TOOLKIT=pip``: nvcc from PyPI even where a toolkit is installed; means ``on``.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that are not replaced below)

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
OLDEST_NVCC, BLACKWELL_NVCC = (12, 5), (12, 8)
# Since which release nvcc knows an architecture, from its release notes; before these it knows all.
KNOWN_SINCE = {100: (12, 8), 101: (12, 8), 120: (12, 8), 103: (12, 9), 121: (12, 9), 110: (13, 0)}
# 125 MB. The compiler's parts carry one version: ptxas rejects the PTX of a newer front end.
PIP_TOOLKIT = [f"nvidia-{part}==13.0.*" for part in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime")]


@dataclass(frozen=True)
class CudaBuild:
    """What to compile: nothing for CUDA where ``nvcc`` is None, and then ``reason`` says why; else
    ``reason`` says what is left out, if anything is."""

    nvcc: Path | None
    archs: tuple[str, ...] = ()
    reason: str = ""


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """setuptools' requirements, and the compiler's where it has to come from PyPI."""
    return build_meta.get_requires_for_build_wheel(config_settings) + toolkit_requirements()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """The same for ``pip install -e``."""
    return build_meta.get_requires_for_build_editable(config_settings) + toolkit_requirements()


def toolkit_requirements() -> list[str]:
    """The packages of nvcc, or none where CUDA is not insisted on or a toolkit is installed."""
    if wanted() != "on" or not (from_pip() or usable_version(installed_nvcc()) is None):
        return []
    return PIP_TOOLKIT


def plan() -> CudaBuild:
    """Decide what is compiled; ``SystemExit`` with one sentence where that cannot be."""
    mode = wanted()
    if mode == "off":
        return CudaBuild(None, reason="QUIETSTAR_CUDA=off")
    nvcc = None if from_pip() else installed_nvcc()
    version = usable_version(nvcc)
    if version is None and mode == "on":
        nvcc = pip_nvcc()
        version = usable_version(nvcc)
        if version is None:
            raise SystemExit(
                f"QUIETSTAR_CUDA=on, but no nvcc of CUDA {_dotted(OLDEST_NVCC)} or newer was found: "
                "install the CUDA toolkit or set CUDA_HOME; without --no-build-isolation pip brings one"
            )
    gpus = visible_gpus()
    if version is None:
        found = f"{nvcc} is older than CUDA {_dotted(OLDEST_NVCC)}" if nvcc else "nvcc was not found"
        return CudaBuild(None, reason=f"{found}; {HOW}" if gpus else found)
    archs = wanted_archs(gpus)
    if not archs and mode == "auto":
        return CudaBuild(None, reason=f"no GPU is visible; {HOW}")
    return CudaBuild(nvcc, *known_archs(archs or ARCHS, version))


def known_archs(archs: tuple[str, ...], version: tuple[int, int]) -> tuple[tuple[str, ...], str]:
    """Those that a release of nvcc can compile for, and a sentence on the others; never none."""
    known = tuple(arch for arch in archs if _knows(version, _number(arch)))
    if known == archs:
        return archs, ""
    others = ", ".join(arch for arch in archs if arch not in known)
    if not any(arch[-1].isdigit() for arch in known):  # with which a build has PTX, too
        known = (ARCHS[0], *known)
    return known, (
        f"nvcc {_dotted(version)} does not know {others}, which needs a newer one; there the driver "
        "compiles the kernels when they are first used"
    )


HOW = "QUIETSTAR_CUDA=on compiles the CUDA kernels all the same"


def wanted() -> str:
    """``QUIETSTAR_CUDA``, checked."""
    mode = os.environ.get("QUIETSTAR_CUDA", "auto").lower() or "auto"
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"QUIETSTAR_CUDA is {mode!r}; expected auto, on or off")
    return "on" if mode == "auto" and from_pip() else mode


def from_pip() -> bool:
    """Whether ``QUIETSTAR_CUDA_TOOLKIT`` asks for nvcc from PyPI."""
    source = os.environ.get("QUIETSTAR_CUDA_TOOLKIT", "")
    if source not in ("", "pip"):
        raise SystemExit(f"QUIETSTAR_CUDA_TOOLKIT is {source!r}; expected pip, or nothing")
    return source == "pip"


def wanted_archs(gpus: tuple[str, ...]) -> tuple[str, ...]:
    """The architectures asked for, or else those of the GPUs; empty where neither says one."""
    asked = re.split(r"[ ,;]+", os.environ.get("QUIETSTAR_CUDA_ARCHS", "").strip())
    if asked == [""]:
        return gpus
    if "native" in asked:
        if not gpus:
            raise SystemExit("QUIETSTAR_CUDA_ARCHS is 'native', but no GPU is visible")
        asked = [name for name in asked if name != "native"] + list(gpus)
    for name in asked:
        if not re.fullmatch(r"(sm_)?\d+[af]?", name):
            raise SystemExit(f"QUIETSTAR_CUDA_ARCHS has {name!r}; expected names like sm_90, or native")
    names = {"sm_" + name.removeprefix("sm_") for name in asked}
    return tuple(sorted(names, key=lambda name: (_number(name), name)))


def installed_nvcc() -> Path | None:
    """nvcc of an installed toolkit: by CUDACXX, CUDA_HOME, CUDA_PATH, the PATH or its usual place."""
    if compiler := os.environ.get("CUDACXX"):
        return Path(compiler)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    before = os.pathsep.join(str(Path(home) / "bin") for home in homes if home)
    for places in (before, None, "/usr/local/cuda/bin"):
        if found := shutil.which("nvcc", path=places):
            return Path(found)
    return None


def pip_nvcc() -> Path | None:
    """nvcc as the packages of ``PIP_TOOLKIT`` install it into a build environment."""
    for folder in map(Path, sys.path):
        for nvcc in sorted(folder.glob("nvidia/cu*/bin/nvcc")):
            return nvcc
    return None


def usable_version(nvcc: Path | None) -> tuple[int, int] | None:
    """The release of nvcc; None where there is none, or one that is too old."""
    if nvcc is None:
        return None
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", said)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    return version if version >= OLDEST_NVCC else None


def visible_gpus() -> tuple[str, ...]:
    """The architectures of this machine's GPUs from compute capability 8.0 on, as the driver says."""
    try:
        driver = ctypes.CDLL("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")
    except OSError:
        return ()
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found = set()
    major_attribute, minor_attribute = 75, 76  # of the driver API's CUdevice_attribute
    for index in range(count.value):
        driver.cuDeviceGetAttribute(ctypes.byref(major), major_attribute, index)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), minor_attribute, index)
        if major.value >= 8:
            found.add((major.value, minor.value))
    return tuple(f"sm_{a}{b}" for a, b in sorted(found))


def _knows(version: tuple[int, int], number: int) -> bool:
    if number <= max(KNOWN_SINCE):
        return version >= KNOWN_SINCE.get(number, OLDEST_NVCC)
    return False  # an architecture of which this file has not heard


def _number(arch: str) -> int:
    """90 of sm_90a."""
    return int(re.sub(r"\D", "", arch))


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
