"""Reads what nvcc writes of kernels: ptxas' report of registers and spills, and accesses in the PTX."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of one kernel on one architecture; bytes where nothing else is said."""

    name: str
    arch: str
    registers: int  # per thread
    spills: int  # stores and loads
    stack: int
    shared: int  # static


@dataclass(frozen=True)
class Access:
    """A load or store in a kernel's PTX, of ``width`` bytes at the address ``base + offset``."""

    what: str  # st.global or ld.shared
    width: int
    base: str
    offset: int


def parse(report: str) -> list[Kernel]:
    """The kernels of a report of ``ptxas -v``, with mangled names."""
    kernels = []
    blocks = re.split(r"Compiling entry function '(\S+)' for '(\w+)'", report)[1:]
    for name, arch, text in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
        # Functions that were not inlined are reported before or after; the entry names itself.
        own = text.split(f"Function properties for {name}", 1)[-1]
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", own
        )
        registers = re.search(r"Used (\d+) registers(.*)", own)
        if frame is None or registers is None:
            raise RuntimeError(f"cannot read what ptxas says of {name} for {arch}:\n{text[:1000]}")
        stack, stores, loads = map(int, frame.groups())
        shared = re.search(r"(\d+) bytes smem", registers[2])
        used = int(registers[1])
        bytes_shared = int(shared[1]) if shared else 0
        kernels.append(Kernel(name, arch, used, stores + loads, stack, bytes_shared))
    return kernels


def accesses(ptx: str) -> dict[str, list[Access]]:
    """Stores to global and loads from shared memory, by the mangled name of their kernel."""
    found: dict[str, list[Access]] = {}
    pattern = re.compile(
        r"\s(?:@!?%\w+\s+)?(st\.global|ld\.shared)[\w.:]*?(?:\.v(\d))?\.[bufs](\d+)\s[^\[;]*"
        r"\[([%\w$]+)(?:\+(-?\d+))?\]"
    )
    blocks = re.split(r"\.entry (\S+?)\(", ptx)[1:]
    for name, text in zip(blocks[::2], blocks[1::2], strict=True):
        found[name] = [
            Access(what, int(count or 1) * int(bits) // 8, base, int(offset or 0))
            for what, count, bits, base, offset in pattern.findall(text)
        ]
    return found


def taken_apart(found: Iterable[Access]) -> list[Access]:
    """Stores of less than 16 bytes, and loads of less than 4, right behind which the next begins."""
    narrow = [a for a in found if a.width < (16 if a.what == "st.global" else 4)]
    begins = {(a.what, a.base, a.offset) for a in narrow}
    return [a for a in narrow if (a.what, a.base, a.offset + a.width) in begins]


def readable(names: Iterable[str]) -> dict[str, str]:
    """Mangled names to ``kernel<arguments>``, without namespaces, parameters and casts."""
    names = list(dict.fromkeys(names))
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return {n: short_name(full) for n, full in zip(names, done.stdout.splitlines(), strict=True)}


def short_name(full: str) -> str:
    """``void a::kernel<a::T, (a::Kind)1>(float*)`` as ``kernel<T, 1>``."""
    full = re.sub(r"\([\w: ]+\)(?=-?\d)", "", full.replace("(anonymous namespace)::", ""))
    depth, end = 0, len(full)
    for at, letter in enumerate(full):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            end = at
            break
    return re.sub(r"\w+::", "", full[:end].removeprefix("void "))


def table(kernels: list[Kernel], archs: Iterable[str]) -> str:
    """A line per kernel: registers and, where there are any, spilled bytes, per architecture."""
    archs = list(archs)
    by_name: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.arch] = kernel
    width = max((len(name) for name in by_name), default=6)
    lines = [f"{'kernel':{width}}  shared  " + "".join(f"{arch:>18}" for arch in archs)]
    for name in sorted(by_name):
        cells, most = [], max(k.shared for k in by_name[name].values())
        for arch in archs:
            kernel = by_name[name].get(arch)
            cell = "" if kernel is None else f"{kernel.registers}"
            if kernel is not None and kernel.spills:
                cell += f" spills {kernel.spills}"
            elif kernel is not None and kernel.stack:
                cell += f" stack {kernel.stack}"
            cells.append(f"{cell:>18}")
        lines.append(f"{name:{width}}  {most:6}  " + "".join(cells))
    return "\n".join(lines)
