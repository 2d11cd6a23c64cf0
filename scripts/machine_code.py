"""Reads the machine code of kernels as cuobjdump prints it: how many instructions a loop takes."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

# Packages of PyPI that bring the disassembler, and where they keep it.
_PACKAGES = {"nvidia": "cu*/bin", "triton": "backends/nvidia/bin"}


def find_cuobjdump(nvcc: str) -> str | None:
    """The disassembler: on the PATH, beside nvcc, or in a package. It calls nvdisasm, which has to be
    there, too."""
    folders = [Path(folder) for folder in os.get_exec_path()]
    folders += [Path(shutil.which(nvcc) or nvcc).resolve().parent]
    for package, below in _PACKAGES.items():
        spec = find_spec(package)
        for home in (spec.submodule_search_locations or []) if spec else []:
            folders += sorted(Path(home).glob(below))
    for folder in map(str, folders):
        if all(shutil.which(tool, path=folder) for tool in ("cuobjdump", "nvdisasm")):
            return shutil.which("cuobjdump", path=folder)
    return None


def instructions(sass: str) -> dict[str, list[str]]:
    """The instructions of each kernel, by its mangled name."""
    pieces = re.split(r"^\s*Function : (\S+)$", sass, flags=re.MULTILINE)[1:]
    found = {}
    for name, text in zip(pieces[::2], pieces[1::2], strict=True):
        found[name] = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text, flags=re.MULTILINE)
    return found


def _successors(code: list[str]) -> list[list[int]]:
    """Where control may go from each instruction."""
    width = 16  # bytes of an instruction; branches name the first
    after = []
    for at, line in enumerate(code):
        guard, name, rest = re.fullmatch(r"(@!?U?P\w+\s+)?(\S+)\s*(.*)", line).groups()  # type: ignore[union-attr]
        kind = name.partition(".")[0]
        jumps = re.findall(r"0x([0-9a-f]+)$", rest) if kind == "BRA" else []
        # A branch with an operand before its target, as BRA.DIV has one, may go on as well.
        ends = kind in ("BRA", "EXIT", "RET", "JMP", "BRX") and not guard and "," not in rest
        after.append([int(jump, 16) // width for jump in jumps] + ([] if ends else [at + 1]))
    return after


def _round(code: list[str], operation: str) -> list[int]:
    """Where the instructions of a round stand, see :func:`round_of_loop`; empty: there is no loop."""
    after = _successors(code)
    begins = {0, *(n for at, to in enumerate(after) if to != [at + 1] for n in [*to, at + 1])}
    counts: Counter[int] = Counter()
    begin = 0
    for at, line in enumerate(code):
        begin = at if at in begins else begin
        counts[begin] += operation in line.split()
    if not code or max(counts.values()) == 0:
        return []
    goal = counts.most_common(1)[0][0]
    before: dict[int, int] = {}
    front = [goal]
    while front:
        reached = []
        for at in front:
            for n in after[at]:
                if n == goal:
                    way = [at]
                    while way[-1] != goal:
                        way.append(before[way[-1]])
                    return way[::-1]
                if n < len(code) and n not in before:
                    before[n] = at
                    reached.append(n)
        front = reached
    return []


def round_of_loop(code: list[str], operation: str) -> int | None:
    """Instructions of the shortest way from the stretch of ``code`` that has the most of an operation
    back to it: what a round of its loop takes where nothing unusual happens. None: there is no loop."""
    return len(_round(code, operation)) or None


def loads_ahead(code: list[str], operation: str, load: str) -> int | None:
    """Instructions of such a round from a load to the first one that waits for it, at the load that has
    the fewest. None: the round has no such load, or nothing waits for one."""
    way = [code[at] for at in _round(code, operation)]
    found = []
    for at, line in enumerate(way):
        if load not in line.split():
            continue
        first = int(re.search(r"\bR(\d+)", line)[1])  # type: ignore[index]
        width = 4 if ".128" in load else 2 if ".64" in load else 1
        loaded = re.compile("|".join(rf"\bR{first + i}\b" for i in range(width)))
        later = [*way[at + 1 :], *way[: at + 1]]
        waits = (n for n, text in enumerate(later) if loaded.search(text.partition(",")[2]))
        found.append(next(waits, None))
    known = [n for n in found if n is not None]
    return min(known) if known and len(known) == len(found) else None
