"""Reads the machine code of kernels as cuobjdump prints it: how many instructions a loop takes."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path


def find_cuobjdump(nvcc: str) -> str | None:
    """The disassembler: beside nvcc, or the one that triton brings."""
    triton = find_spec("triton")
    homes = [Path(place) for place in (triton.submodule_search_locations or [])] if triton else []
    folders = [Path(shutil.which(nvcc) or nvcc).resolve().parent]
    folders += [home / "backends" / "nvidia" / "bin" for home in homes]
    return shutil.which("cuobjdump") or shutil.which(
        "cuobjdump", path=os.pathsep.join(map(str, folders))
    )


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


def round_of_loop(code: list[str], operation: str) -> int | None:
    """Instructions of the shortest way from the stretch of ``code`` that has the most of an operation
    back to it: what a round of its loop takes where nothing unusual happens. None: there is no loop."""
    after = _successors(code)
    begins = {0, *(n for at, to in enumerate(after) if to != [at + 1] for n in [*to, at + 1])}
    counts: Counter[int] = Counter()
    begin = 0
    for at, line in enumerate(code):
        begin = at if at in begins else begin
        counts[begin] += operation in line.split()
    if not code or max(counts.values()) == 0:
        return None
    goal = counts.most_common(1)[0][0]
    seen, front, steps = {goal}, {goal}, 0
    while front:
        steps += 1
        front = {n for at in front for n in after[at] if n < len(code)}
        if goal in front:
            return steps
        front -= seen
        seen |= front
    return None
