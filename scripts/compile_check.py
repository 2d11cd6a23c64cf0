#!/usr/bin/env python3
"""Compiles every csrc/cuda/*.cu and instance for sm_80, sm_90, sm_100 and sm_120 and reads what the
compiler says of each kernel: registers, spills, shared memory; and counts instructions of loops in the
machine code, where there is a disassembler. No GPU is needed.

    python scripts/compile_check.py [FILE.cu ...] [--archs sm_90,...]

What the package's own build reported a moment ago is not compiled again. Prints a table, a line per
kernel. Exit status 1: a kernel of ``NO_SPILLS`` spills, one of ``WIDE`` stores its 16 bytes in pieces,
one of ``LOOPS`` takes more instructions than it may, one of ``AHEAD`` loads too late, a pattern there
names no kernel any more, or a file does not compile. Without nvcc it says so and checks nothing.
``kernel_reports.py`` and ``machine_code.py`` read what the compiler and the disassembler write.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

from compile_limits import AHEAD, KNOWN_SPILLS, LOOPS, NO_SPILLS, WIDE
from kernel_reports import Kernel, accesses, parse, readable, table, taken_apart
from machine_code import find_cuobjdump, instructions, loads_ahead, round_of_loop

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = REPOSITORY / "csrc" / "cuda"
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")


def find_nvcc() -> str | None:
    """nvcc as csrc/cuda/cuda.cmake looks for it."""
    if cudacxx := os.environ.get("CUDACXX"):
        return cudacxx
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))


def all_files(folder: Path) -> list[Path]:
    """Every CUDA source; the instances are written into ``folder`` first."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=places)
    if cmake is None:
        raise RuntimeError("cmake was not found; it writes the kernels' instances")
    script = str(SOURCES / "instances.cmake")
    subprocess.run([cmake, f"-DINSTANCES={folder}", "-P", script], check=True)
    return sorted([*SOURCES.glob("*.cu"), *folder.glob("*.cu")])


def run_nvcc(nvcc: str, source: Path, options: Iterable[str]) -> str:
    """What nvcc says of a file; ``RuntimeError`` where it does not compile."""
    folders = [f"-I{REPOSITORY / 'csrc' / 'include'}", f"-I{SOURCES}"]
    command = [nvcc, "-std=c++17", "-O3", *options, *folders, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout + done.stderr


def compile_file(nvcc: str, source: Path, archs: Iterable[str]) -> str:
    """What the compiler reports of a file, its device half compiled once for all architectures."""
    with tempfile.TemporaryDirectory() as folder:
        # As cuda.cmake has it: architectures of a letter are compiled on their own.
        plain = [arch for arch in archs if arch[-1].isdigit()]
        lettered = [arch.removeprefix("sm_") for arch in archs if not arch[-1].isdigit()]
        targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in lettered]
        targets += [f"-gencode=arch=compute_80,code=[{','.join(plain)}]"] if plain else []
        out = Path(folder) / "out.fatbin"
        return run_nvcc(nvcc, source, ["-Xptxas", "-v", "-fatbin", *targets, "-o", str(out)])


def ptx_of(nvcc: str, source: Path) -> str:
    """The file's device half as PTX, from which the code of every architecture is assembled."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.ptx"
        run_nvcc(nvcc, source, ["-ptx", "-arch=compute_80", "-o", str(out)])
        return out.read_text()


def sass_of(nvcc: str, cuobjdump: str, source: Path) -> str:
    """The file's machine code for sm_90, from PTX for compute_80: the package's last build has it, or it
    is compiled."""
    with tempfile.TemporaryDirectory() as folder:
        code = built_objects(["sm_90"]).get(source.name)
        if code is None:
            code = Path(folder) / "out.cubin"
            run_nvcc(nvcc, source, ["-cubin", "-gencode=arch=compute_80,code=sm_90", "-o", str(code)])
        command = [cuobjdump, "-sass", "-arch", "sm_90", str(code)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout


def reports_of_build(archs: Iterable[str]) -> dict[str, str]:
    """The reports in the log of the package's last build, by file name: those for all ``archs``, if no
    source has changed since."""
    return {name: text for name, (_, text) in last_build(archs).items()}


def built_objects(archs: Iterable[str]) -> dict[str, Path]:
    """Its object files, by file name."""
    return {name: path for name, (path, _) in last_build(archs).items() if path.is_file()}


def last_build(archs: Iterable[str]) -> dict[str, tuple[Path, str]]:
    """The object files and reports of the package's last build, by file name, as above."""
    logs = sorted(REPOSITORY.glob("build/*/build.log"), key=lambda log: log.stat().st_mtime)
    headers = (REPOSITORY / "csrc" / "include").rglob("*.h")
    changed = max(path.stat().st_mtime for path in [*SOURCES.iterdir(), *headers])
    if not logs or logs[-1].stat().st_mtime < changed:
        return {}
    # ninja prints what a command says in one piece, after the line that names the command.
    pieces = re.split(r"^\[\d+/\d+\] (.*)$", logs[-1].read_text(), flags=re.MULTILINE)[1:]
    found = {}
    for title, text in zip(pieces[::2], pieces[1::2], strict=True):
        name = re.fullmatch(r"Building CUDA object (\S*/cuda(?:_instances)?/(\w+\.cu)\.o)", title)
        if name and all(f"' for '{arch}'" in text for arch in archs):
            found[name[2]] = logs[-1].parent / name[1], text
    return found


def faults(kernels: list[Kernel], patterns: Iterable[str]) -> list[str]:
    """A sentence for each spill in a named kernel, and for each pattern that names none."""
    found = []
    for pattern in patterns:
        named = [kernel for kernel in kernels if fnmatchcase(kernel.name, pattern)]
        if not named:
            found.append(f"no kernel is called {pattern}; NO_SPILLS should follow its new name")
        for kernel in named:
            if kernel.spills > known_spills(kernel):
                found.append(
                    f"{kernel.name} spills {kernel.spills} bytes on {kernel.arch} "
                    f"({kernel.registers} registers)"
                )
    return found


def known_spills(kernel: Kernel) -> int:
    """Bytes that a kernel may spill on its architecture."""
    matching = (
        most
        for (pattern, arch), most in KNOWN_SPILLS.items()
        if arch == kernel.arch and fnmatchcase(kernel.name, pattern)
    )
    return max(matching, default=0)


def narrow_faults(nvcc: str, files: Iterable[Path]) -> list[str]:
    """A sentence for each kernel of WIDE whose packs are taken apart, and for each pattern of it that
    names none."""
    files = [file for file in files if file.name in WIDE]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = list(pool.map(lambda file: ptx_of(nvcc, file), files))
    found = []
    for file, text in zip(files, texts, strict=True):
        by_kernel = accesses(text)
        names = readable(by_kernel)
        for pattern in WIDE[file.name]:
            named = [name for name in by_kernel if fnmatchcase(names[name], pattern)]
            if not named:
                found.append(
                    f"no kernel of {file.name} is called {pattern}; WIDE should follow its name"
                )
            for name in named:
                if narrow := taken_apart(by_kernel[name]):
                    first = narrow[0]
                    found.append(
                        f"{names[name]} takes packs apart: {len(narrow)} accesses like "
                        f"{first.what} of {first.width} bytes"
                    )
    return found


def loop_faults(nvcc: str, cuobjdump: str, files: Iterable[Path]) -> list[str]:
    """Prints the rounds of the LOOPS. A sentence for each that takes more than it may, or loads later
    than AHEAD wants, and for each pattern that names no loop."""
    files = [file for file in files if file.name in LOOPS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = list(pool.map(lambda file: sass_of(nvcc, cuobjdump, file), files))
    found = []
    for file, text in zip(files, texts, strict=True):
        code = instructions(text)
        names = readable(code)
        for pattern, (operation, most) in LOOPS[file.name].items():
            rounds = {
                names[name]: round_of_loop(code[name], operation)
                for name in code
                if fnmatchcase(names[name], pattern)
            }
            if not rounds:
                found.append(
                    f"no kernel of {file.name} is called {pattern}; LOOPS should follow its name"
                )
            for name, length in rounds.items():
                print(
                    f"{name}: a round of the {operation} loop is {length} instructions, at most {most}"
                )
                if length is None or length > most:
                    found.append(
                        f"{name} has a {operation} loop of {length} instructions; allowed: {most}"
                    )
        for pattern, (operation, load, least) in AHEAD.get(file.name, {}).items():
            matching = [name for name in code if fnmatchcase(names[name], pattern)]
            if not matching:
                found.append(
                    f"no kernel of {file.name} is called {pattern}; AHEAD should follow its name"
                )
            for name in matching:
                ahead = loads_ahead(code[name], operation, load)
                if ahead is None:
                    found.append(f"{names[name]} has no {operation} loop that loads by {load}")
                elif ahead < least:
                    found.append(
                        f"{names[name]} waits for a {load} {ahead} instructions after it; "
                        f"expected {least} or more"
                    )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: all of csrc/cuda")
    parser.add_argument("--archs", default=",".join(ARCHS))
    options = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("compile check skipped: nvcc was not found")
        return 0
    archs = options.archs.split(",")
    with tempfile.TemporaryDirectory() as folder:
        return judge(nvcc, options.files or all_files(Path(folder)), archs, bool(options.files))


def judge(nvcc: str, files: list[Path], archs: list[str], chosen: bool) -> int:
    """Compile and judge the files; ``chosen``: they are not all there are."""
    known = {} if chosen else reports_of_build(archs)
    rest = [file for file in files if file.name not in known]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = [*known.values(), *pool.map(lambda file: compile_file(nvcc, file, archs), rest)]
    raw = [kernel for report in reports for kernel in parse(report)]
    names = readable(kernel.name for kernel in raw)
    kernels = [Kernel(names[k.name], *list(vars(k).values())[1:]) for k in raw]
    print(table(kernels, archs))
    patterns = NO_SPILLS if not chosen else ("*",)
    spills, narrow = faults(kernels, patterns), narrow_faults(nvcc, files)
    print(f"{len(names)} kernels; {len(rest)} files compiled, {len(known)} read from the build's log")
    print("\n".join(spills) or "no spills where none may be")
    print("\n".join(narrow) or "no packs taken apart where none may be")
    cuobjdump = find_cuobjdump(nvcc)
    if cuobjdump is None:
        print("loops not counted: cuobjdump was not found")
        return 1 if spills or narrow else 0
    long = loop_faults(nvcc, cuobjdump, files)
    print("\n".join(long) or "no loops longer than they may be")
    return 1 if spills or narrow or long else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(str(error))
