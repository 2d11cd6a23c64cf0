"""Versions of what a run depends on, without importing any of it."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("quietstar", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")


def package_versions() -> dict[str, str]:
    """Python and package versions; ``not installed`` where there is none."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
