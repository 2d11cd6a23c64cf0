"""``python -m build``: what is in the source distribution and the wheel, and the wheel at work."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PACKAGES = {"quietstar": ROOT / "python" / "quietstar", "quietstar_ext": ROOT / "quietstar_ext"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(*words: object, cwd: Path, **variables: str) -> str:
    """What a command says, which ends well. No source folder is on its path."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")} | variables
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both, the wheel made of the source distribution and not of the repository."""
    folder = tmp_path_factory.mktemp("dist")
    sources = folder / "sources"
    skipped = ("ls-files", "--cached", "--others", "--exclude-standard", "-z")
    files = subprocess.run(["git", *skipped], cwd=ROOT, capture_output=True)
    if files.returncode == 0:  # without what other builds have left in the working tree
        for name in files.stdout.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (sources / name).parent.mkdir(parents=True, exist_ok=True)
                (sources / name).write_bytes((ROOT / name).read_bytes())
    else:
        sources = ROOT
    # What it needs is part of the test extra: no index is asked. CUDA is tested elsewhere.
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, sources)
    run(*command, cwd=folder, QUIETSTAR_CUDA="off")
    return folder


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel; dependencies are those of this one, behind its own."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    (wheel,) = built.glob("*.whl")
    run(folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return folder


def sources(name: str) -> Iterator[str]:
    """Files that a package has to have, as their names in it."""
    for path in PACKAGES[name].rglob("*"):
        kept = path.suffix in (".py", ".yaml", ".json", ".html", ".txt") or path.name == "py.typed"
        if kept and path.is_file() and "__pycache__" not in path.parts:
            yield f"{name}/{path.relative_to(PACKAGES[name]).as_posix()}"


def test_the_wheel_has_the_packages_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name.startswith(f"quietstar-{VERSION}-cp3")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"quietstar_command.py", *sources("quietstar"), *sources("quietstar_ext")}
    information = f"quietstar-{VERSION}.dist-info/"
    (native,) = (name for name in names if name.startswith("quietstar_ext/_native"))
    assert names - {native} - {n for n in names if n.startswith(information)} == expected
    assert f"{information}licenses/LICENSE" in names


def test_the_source_distribution_can_be_built_and_read(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.removeprefix(f"quietstar-{VERSION}/") for name in tar.getnames()}
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CMakeLists.txt"):
        assert name in names
    csrc = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert {name for name in csrc if "__pycache__" not in name} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_installed_wheel_works(environment: Path, tmp_path: Path) -> None:
    """Versions, kernels and package data come from the new environment."""
    quietstar = environment / "bin" / "quietstar"
    assert run(quietstar, "--version", cwd=tmp_path) == f"quietstar {VERSION}\n"
    facts = json.loads(run(quietstar, "info", "--json", cwd=tmp_path))
    assert facts["versions"]["quietstar"] == facts["compiled"]["version"] == VERSION
    assert Path(facts["compiled"]["path"]).is_relative_to(environment)
    for operator, chosen in facts["operators"]["cpu"].items():
        assert chosen == {"implementation": "fused"}, operator
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    changes = ["max_steps=2", "eval_blocks=0", "model.config.num_hidden_layers=1", "use_cpu=true"]
    data = ["data.name=", f"data.files=['{text}']", "block_size=32"]
    run(quietstar, "train", "tiny", *data, *changes, "--quiet", "--output", "run", cwd=tmp_path)
    run(quietstar, "inspect", "run", text, "--tokens", "40", "--output", "page.html", cwd=tmp_path)
    assert "<html" in (tmp_path / "page.html").read_text()
