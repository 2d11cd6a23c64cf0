"""transformers' Auto classes know Quiet-STaR models wherever ``quietstar`` was imported.

``quietstar.modeling.model`` registers the architecture in its last lines, but it needs torch and
transformers, which a process that only shows a help text should not load. So it is imported once
transformers is there: by :func:`install` if it is there already, otherwise right after its import.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL = "quietstar.modeling.model"


class _Finder(MetaPathFinder):
    """Lets others find transformers and this package's modules, and is told when they are loaded.

    transformers is often imported by a module of this package, in this thread or in another, which is
    then half there and so cannot be used by the model's module. Hence the last load to end registers.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loads = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers" and not fullname.startswith("quietstar."):
            return None
        others: list[Any] = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
        for finder in others:
            spec: ModuleSpec | None = finder.find_spec(fullname, path, target)
            if spec is not None:
                if (
                    spec.loader is not None and spec.loader is not finder
                ):  # not the old names in moved.py
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def load(self, execute: Callable[[], object]) -> None:
        """Execute a module, and register if no other is being loaded then."""
        self._count(+1)
        try:
            execute()
        finally:
            loads = self._count(-1)
        if loads == 0 and "transformers" in sys.modules and self in sys.meta_path:
            self._register()

    def _register(self) -> None:
        self._count(+1)  # what is loaded by this does not register, too
        try:
            importlib.import_module(MODEL)
        except (ImportError, RuntimeError):
            # Another thread has begun to load what this one needs, and waits for transformers: it will
            # register when it is done. (Python's own error for such a knot is a RuntimeError.)
            if self._loads == 1:
                raise
            return
        finally:
            self._count(-1)
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def _count(self, change: int) -> int:
        with self._lock:
            self._loads += change
            return self._loads


class _Loader(Loader):
    """A module's own loader, and word to the finder when it is done."""

    def __init__(self, loader: Any, finder: _Finder):
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._finder.load(lambda: self._loader.exec_module(module))


def install() -> None:
    """Register now if transformers is there, otherwise when it has been imported."""
    if "transformers" in sys.modules:
        importlib.import_module(MODEL)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
