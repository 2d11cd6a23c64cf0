"""The native module: it is loaded, from the package under test, with one OpenMP runtime."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import quietstar_ext
from quietstar_ext import native

PACKAGE = Path(quietstar_ext.__file__).resolve().parent
REPOSITORY = Path(__file__).resolve().parents[2]


def installed_folder() -> Path | None:
    """Where pip put the package; None for a development install, which runs from the repository, and
    where a build has left nothing but an egg-info there."""
    try:
        distribution = importlib.metadata.distribution("quietstar")
    except importlib.metadata.PackageNotFoundError:
        return None
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return None
    folder = Path(str(distribution.locate_file("quietstar_ext"))).resolve()
    return folder if folder.is_dir() and folder != REPOSITORY / "quietstar_ext" else None


def test_the_installed_package_is_tested() -> None:
    assert (installed_folder() or REPOSITORY / "quietstar_ext") == PACKAGE


def test_native_module_is_loaded_from_the_package() -> None:
    info = quietstar_ext.build_info()
    assert info["native"], info
    assert Path(info["path"]).resolve().parent == PACKAGE


def test_build_info() -> None:
    info = quietstar_ext.build_info()
    assert info["simd_compiled"][0] == "generic"
    assert set(info["simd_supported"]) <= set(info["simd_compiled"])
    assert info["simd"] in info["simd_supported"]
    assert isinstance(info["cuda_archs"], str)
    if installed_folder():
        assert info["version"] == importlib.metadata.version("quietstar")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime() -> None:
    assert quietstar_ext.build_info()["openmp"]
    # In a process of its own: other packages of the tests may bring a runtime for themselves.
    code = """
import torch, quietstar_ext
# Both have entered a parallel region by the end of these two lines.
torch.rand(512, 512) @ torch.rand(512, 512)
quietstar_ext.sample_tokens(torch.rand(64, 5000), seed=0, impl="fused")
print(open("/proc/self/maps").read())
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = {line.split(maxsplit=5)[-1] for line in done.stdout.splitlines() if line}
    runtimes = {f for f in files if Path(f).name.startswith(("libgomp", "libomp", "libiomp"))}
    assert len(runtimes) == 1, runtimes


def test_environment_variable_chooses_the_instruction_set() -> None:
    def run(level: str) -> subprocess.CompletedProcess[str]:
        code = "import quietstar_ext; print(quietstar_ext.build_info()['simd'])"
        env = {**os.environ, "QUIETSTAR_SIMD": level}
        # From another folder, so that the repository's sources cannot shadow the package.
        return subprocess.run(
            [sys.executable, "-P", "-c", code], env=env, cwd="/", capture_output=True, text=True
        )

    assert run("generic").stdout.strip() == "generic"
    refused = run("sse9")
    assert refused.returncode != 0
    assert "environment variable QUIETSTAR_SIMD: simd is 'sse9'; expected one of auto" in (
        refused.stderr
    )


def test_unknown_instruction_set_is_refused() -> None:
    before = quietstar_ext.build_info()["simd"]
    with (
        pytest.raises(ValueError, match="simd is 'mmx'; expected one of auto, generic"),
        quietstar_ext.use_simd("mmx"),
    ):
        pass
    assert quietstar_ext.build_info()["simd"] == before


def test_a_missing_native_module_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_module", None)
    monkeypatch.setattr(native, "_missing", "the native module is missing; pip install .")
    assert quietstar_ext.build_info() == {
        "native": False,
        "missing": "the native module is missing; pip install .",
    }
    with pytest.raises(RuntimeError, match="impl='fused' cannot be used here: the native module"):
        quietstar_ext.sample_tokens(torch.zeros(1, 4), seed=0, impl="fused")
    tokens, _ = quietstar_ext.sample_tokens(torch.zeros(1, 4), seed=0)
    assert 0 <= int(tokens) < 4


def test_a_source_folder_that_hides_the_installed_package_is_named(tmp_path: Path) -> None:
    source, installed = tmp_path / "clone" / "quietstar_ext", tmp_path / "site" / "quietstar_ext"
    source.mkdir(parents=True)
    installed.mkdir(parents=True)
    search = [str(source.parent), str(installed.parent)]
    assert native._hidden_package(source, search) is None  # an installation without a native module
    module = f"_native{EXTENSION_SUFFIXES[0]}"
    (source / module).touch()
    assert native._hidden_package(source, search) is None  # itself hides nothing
    (installed / module).touch()
    assert native._hidden_package(source, search) == installed
