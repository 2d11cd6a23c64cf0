"""scripts/build_backend.py: what a build compiles, and where its nvcc comes from."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cuda_sources
import pybind11
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
VARIABLES = ("QUIETSTAR_CUDA", "QUIETSTAR_CUDA_ARCHS", "QUIETSTAR_CUDA_TOOLKIT", "CUDACXX")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The backend, in an environment that says nothing, on a machine without GPU."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location(
        "build_backend", REPOSITORY / "scripts" / "build_backend.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "build_backend", module)  # dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "visible_gpus", lambda: ())
    return module


def nvcc(folder: Path, release: str) -> Path:
    """A program that says its release as nvcc does."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "nvcc"
    program.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    program.chmod(0o755)
    return program


class TestPlan:
    def test_without_nvcc(self, backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backend, "installed_nvcc", lambda: None)
        assert backend.plan() == backend.CudaBuild(None, reason="nvcc was not found")
        monkeypatch.setattr(backend, "visible_gpus", lambda: ("sm_90",))
        reason = "nvcc was not found; QUIETSTAR_CUDA=on compiles the CUDA kernels all the same"
        assert backend.plan().reason == reason

    def test_auto_compiles_for_the_gpus_that_are_there(
        self, backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        compiler = nvcc(tmp_path, "13.0")
        monkeypatch.setenv("CUDACXX", str(compiler))
        assert backend.plan().nvcc is None
        assert backend.plan().reason.startswith("no GPU is visible; QUIETSTAR_CUDA=on compiles")
        monkeypatch.setattr(backend, "visible_gpus", lambda: ("sm_86", "sm_90"))
        assert backend.plan() == backend.CudaBuild(compiler, ("sm_86", "sm_90"))

    @pytest.mark.parametrize(
        ("release", "archs"),
        [
            ("13.0", ("sm_80", "sm_90", "sm_100", "sm_120")),
            ("12.8", ("sm_80", "sm_90", "sm_100", "sm_120")),
            ("12.6", ("sm_80", "sm_90")),  # knows no Blackwell
        ],
    )
    def test_on_compiles_for_what_the_compiler_knows(
        self,
        backend: ModuleType,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        release: str,
        archs: tuple[str, ...],
    ) -> None:
        monkeypatch.setenv("CUDACXX", str(nvcc(tmp_path, release)))
        monkeypatch.setenv("QUIETSTAR_CUDA", "on")
        assert backend.plan().archs == archs
        assert ("does not know sm_100, sm_120" in backend.plan().reason) == (len(archs) == 2)
        assert backend.toolkit_requirements() == []

    @pytest.mark.parametrize(
        ("release", "gpus", "asked", "archs", "others"),
        [
            ("12.6", ("sm_120",), "", ("sm_80",), "sm_120"),  # an RTX 5090, and Ubuntu's toolkit
            ("12.6", ("sm_89", "sm_120"), "", ("sm_89",), "sm_120"),
            ("12.6", ("sm_90",), "", ("sm_90",), ""),
            ("12.6", (), "sm_90a,sm_100f", ("sm_80", "sm_90a"), "sm_100f"),
            ("12.8", ("sm_121",), "", ("sm_80",), "sm_121"),  # a DGX Spark
            ("12.8", ("sm_103", "sm_120"), "", ("sm_120",), "sm_103"),  # a B300
            ("12.9", ("sm_121",), "", ("sm_121",), ""),
            ("12.9", ("sm_110",), "", ("sm_80",), "sm_110"),
            ("13.0", ("sm_110",), "", ("sm_110",), ""),
            ("13.0", ("sm_150",), "", ("sm_80",), "sm_150"),  # of which nobody has heard yet
        ],
    )
    def test_gpus_that_are_newer_than_nvcc_get_ptx(
        self,
        backend: ModuleType,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        release: str,
        gpus: tuple[str, ...],
        asked: str,
        archs: tuple[str, ...],
        others: str,
    ) -> None:
        """An option that nvcc does not know would be a failed installation."""
        monkeypatch.setattr(backend, "visible_gpus", lambda: gpus)
        monkeypatch.setenv("QUIETSTAR_CUDA_ARCHS", asked)
        monkeypatch.setenv("CUDACXX", str(nvcc(tmp_path, release)))
        made = backend.plan()
        assert made.archs == archs and made.nvcc is not None
        expected = f"nvcc {release} does not know {others}, which needs a newer one; " if others else ""
        assert made.reason.startswith(expected) and bool(made.reason) == bool(others)
        if others != "sm_150":
            monkeypatch.setenv("CUDACXX", str(nvcc(tmp_path, "13.0")))
            assert backend.plan().reason == "" and set(others.split()) <= set(backend.plan().archs)

    def test_an_old_toolkit_is_a_line_or_is_replaced(
        self, backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("CUDACXX", str(nvcc(tmp_path, "12.4")))
        monkeypatch.setattr(backend, "visible_gpus", lambda: ("sm_90",))
        assert backend.plan().nvcc is None
        assert "nvcc is older than CUDA 12.5" in backend.plan().reason
        monkeypatch.setenv("QUIETSTAR_CUDA", "on")
        assert backend.toolkit_requirements() == backend.PIP_TOOLKIT
        with pytest.raises(SystemExit, match="no nvcc of CUDA 12.5 or newer was found: install"):
            backend.plan()
        fresh = nvcc(tmp_path / "packages" / "nvidia" / "cu13" / "bin", "13.0")
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))
        assert backend.plan() == backend.CudaBuild(fresh, ("sm_90",))

    def test_a_toolkit_from_pip_can_be_asked_for(
        self, backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("CUDACXX", str(nvcc(tmp_path, "13.0")))
        monkeypatch.setenv("QUIETSTAR_CUDA_TOOLKIT", "pip")  # which means on
        for kind in ("wheel", "editable"):
            # setuptools' own would leave an egg-info beside the sources.
            name = f"get_requires_for_build_{kind}"
            monkeypatch.setattr(backend.build_meta, name, lambda settings: ["wheel"])
            assert getattr(backend, name)() == ["wheel", *backend.PIP_TOOLKIT]
        monkeypatch.setenv("QUIETSTAR_CUDA", "off")
        assert backend.toolkit_requirements() == []
        assert backend.plan().reason == "QUIETSTAR_CUDA=off"

    @pytest.mark.parametrize(
        ("asked", "archs"),
        [
            ("90", ("sm_90",)),
            ("sm_100;sm_80, sm_90a", ("sm_80", "sm_90a", "sm_100")),
            ("native", ("sm_89",)),
            ("native,sm_80", ("sm_80", "sm_89")),
        ],
    )
    def test_architectures_that_are_asked_for(
        self, backend: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str, archs: tuple[str, ...]
    ) -> None:
        monkeypatch.setenv("QUIETSTAR_CUDA_ARCHS", asked)
        assert backend.wanted_archs(("sm_89",)) == archs

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("QUIETSTAR_CUDA", "yes", "QUIETSTAR_CUDA is 'yes'; expected auto, on or off"),
            ("QUIETSTAR_CUDA_ARCHS", "hopper", "has 'hopper'; expected names like sm_90, or native"),
            ("QUIETSTAR_CUDA_ARCHS", "native", "is 'native', but no GPU is visible"),
            ("QUIETSTAR_CUDA_TOOLKIT", "conda", "is 'conda'; expected pip, or nothing"),
        ],
    )
    def test_what_cannot_be_is_one_sentence(
        self,
        backend: ModuleType,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        name: str,
        value: str,
        message: str,
    ) -> None:
        monkeypatch.setenv("CUDACXX", str(nvcc(tmp_path, "13.0")))
        monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match=message):
            backend.plan()


@pytest.mark.slow
def test_kernels_compile_with_nothing_but_pip(backend: ModuleType, tmp_path: Path) -> None:
    """nvcc from PyPI configures the build, says where it is, and compiles and links a kernel."""
    packages = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(packages)]
    done = subprocess.run([*pip, *backend.PIP_TOOLKIT], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"nvcc cannot be had from the package index: {done.stderr.strip()[-200:]}")
    (compiler,) = packages.glob("nvidia/cu*/bin/nvcc")
    assert backend.usable_version(compiler) == (13, 0)
    build = tmp_path / "build"
    configure = [
        *(cuda_sources.tool("cmake"), "-G", "Ninja", "-S", str(REPOSITORY), "-B", str(build)),
        f"-DCMAKE_MAKE_PROGRAM={cuda_sources.tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *("-DQUIETSTAR_CUDA=on", f"-DQUIETSTAR_NVCC={compiler}", "-DQUIETSTAR_CUDA_ARCHS=sm_90"),
    ]
    # As on a machine without a toolkit.
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "CUDACXX")}
    said = subprocess.run(configure, env=env, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-3000:]
    assert f"quietstar: CPU and CUDA build ({compiler} 13.0" in said.stdout
    kernel = "CMakeFiles/kernels_cuda.dir/csrc/cuda/mixing_head.cu.o"
    made = subprocess.run(
        [cuda_sources.tool("ninja"), "-C", str(build), kernel], env=env, capture_output=True, text=True
    )
    assert made.returncode == 0, (made.stdout + made.stderr)[-3000:]
    assert (build / kernel).stat().st_size > 10_000
