"""Names of a package that are imported when they are asked for."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

# The first import of transformers fails where two threads begin it at once.
_LOCK = threading.RLock()


def lazy_attributes(
    package: str, places: Mapping[str, str], modules: Collection[str] = ()
) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package.

    Args:
        places: name to the module, below the package, that has it.
        modules: modules of the package that are attributes of it before anybody imports them.
    """

    def get(name: str) -> Any:
        place = name if name in modules else places.get(name)
        if place is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with _LOCK:
            module = importlib.import_module(f"{package}.{place}")
        return module if name in modules else getattr(module, name)

    return get
