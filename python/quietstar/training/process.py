"""How a process of the commands uses threads and memory: what libraries leave to whoever starts one."""

from __future__ import annotations

import ctypes
import os

# Of glibc's mallopt: from what size on a piece of memory is asked of the system by itself, and from how
# much free memory at the end of the heap on it is given back.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_PIECE, _KEPT = 32 << 20, 1 << 30
# Any of them in the environment is the user's decision.
_MEMORY_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def let_threads_sleep() -> None:
    """Have threads that wait for each other sleep soon, where the environment says nothing about it.

    To be called before torch is imported, which reads it then. They spin for milliseconds otherwise;
    what that costs is in docs/troubleshooting.md.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory, where the environment says nothing about it.

    A training step frees what the next one needs again. Given back to the system in between, every page
    is fetched, and filled with zeros, anew. Pieces of more than 32 MiB are given back all the same, and
    so is what is free at the end of the heap beyond 1 GiB.

    Returns:
        Whether it was done; only glibc has such settings.
    """
    said = any(name in os.environ for name in _MEMORY_SETTINGS)
    if said or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or none that can be asked
        return False
    # With one of them set, the other no longer grows by itself.
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_PIECE) and mallopt(_TRIM_THRESHOLD, _KEPT))
