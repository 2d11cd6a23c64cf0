"""Seed faults, one at a time, into a copy of the sources, and show which tests catch each.

    python scripts/seeded_faults.py            # all, some minutes each
    python scripts/seeded_faults.py advantage  # those whose name contains a word
    python scripts/seeded_faults.py --list

A fault that no test catches is a hole in the tests: the exit code is then 1. The native module has to be
built in place (``python setup.py build_ext --inplace``); a fault in csrc/cuda is seeded into the sources
that the tests compile for the CPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("python", "quietstar_ext", "csrc")
COPIED = (*SOURCES, "tests", "scripts", "benchmarks", "docs", "pyproject.toml", "setup.py", "README.md")


@dataclass(frozen=True)
class Fault:
    """``before``, which occurs once in the file, becomes ``after``; ``tests`` are to notice."""

    name: str
    file: str
    before: str
    after: str
    tests: str


FAULTS: tuple[Fault, ...] = (
    Fault(
        "the advantage's sign",
        "python/quietstar/losses/rewards.py",
        "reward = reward - reward.mean(-1, keepdim=True)",
        "reward = reward.mean(-1, keepdim=True) - reward",
        "tests/losses/test_golden.py tests/losses/test_objective.py",
    ),
    Fault(
        "a reward measured at the wrong talk step",
        "python/quietstar/losses/rewards.py",
        "(anchors[None] + steps).clamp(max=last)",
        "(anchors[None] + 0 * steps).clamp(max=last)",
        "tests/losses/test_golden.py tests/losses/test_objective.py",
    ),
    Fault(
        "a window dropped on its way to the operator",
        "python/quietstar/thinking/attention.py",
        '        "sliding_window": window,',
        '        "sliding_window": None,',
        "tests/thinking/test_families.py tests/thinking/test_windows.py",
    ),
    Fault(
        "talk targets one token late",
        "python/quietstar/thinking/text_batch.py",
        "ahead = anchors[None] + 1 + torch.arange(talk_length",
        "ahead = anchors[None] + 2 + torch.arange(talk_length",
        "tests/losses/test_golden.py tests/losses/test_learn.py",
    ),
    Fault(
        "padding earns rewards",
        "python/quietstar/thinking/text_batch.py",
        "(ahead < length) & is_text & ~ranges",
        "(ahead < length) & ~ranges",
        "tests/losses/test_learn.py tests/training/test_batches.py",
    ),
    Fault(
        "a document predicts the next one",
        "python/quietstar/thinking/layout.py",
        "return ahead >= self.end.gather(1, anchors)",
        "return torch.zeros_like(ahead, dtype=torch.bool)",
        "tests/thinking/test_packed_documents.py tests/losses/test_learn.py",
    ),
    Fault(
        "all slots draw the same numbers",
        "python/quietstar/thinking/slots.py",
        "offset = (slot * run.shard.count + run.shard.index) * batch * columns",
        "offset = run.shard.index * batch * columns",
        "tests/thinking/test_thinking.py tests/thinking/test_graphs.py",
    ),
    Fault(
        "the mixing weight is the base prediction's",
        "python/quietstar/thinking/layers.py",
        "return base.lerp(thought, weight), weight",
        "return thought.lerp(base, weight), weight",
        "tests/thinking/test_wrapped_layers.py",
    ),
    Fault(
        "thoughts scored at another temperature",
        "python/quietstar/losses/policy.py",
        "loss, _ = td.thought_output(config.reinforce_temperature, slots.device)",
        "loss, _ = td.thought_output(1.0, slots.device)",
        "tests/losses/test_golden.py tests/losses/test_learn.py",
    ),
    Fault(
        "a resumed run draws other numbers",
        "python/quietstar/training/trainer.py",
        "            training_state.load_random_state(Path(checkpoint), self.args.process_index)",
        "            pass",
        "tests/training/test_trainer.py tests/training/test_killed.py",
    ),
    Fault(
        "the averaged copy begins anew at a resume",
        "python/quietstar/training/trainer.py",
        "            copy.load(checkpoint)\n",
        "",
        "tests/training/test_ema.py",
    ),
    Fault(
        "thoughts of padding are counted",
        "python/quietstar/thinking/text_batch.py",
        "        return rewarded, rewarded\n",
        "        return rewarded, torch.ones_like(rewarded)\n",
        "tests/losses/test_learn.py tests/losses/test_objective.py",
    ),
    Fault(
        "positions behind a cache are one too large",
        "python/quietstar/modeling/generation.py",
        "position_ids=positions[:, past + start : past + stop],",
        "position_ids=positions[:, past + start : past + stop] + (past + start > 0),",
        "tests/modeling/test_generation.py",
    ),
    Fault(
        "a barrier missing in a CUDA kernel",
        "csrc/cuda/linear_cross_entropy_row.cuh",
        "= p;\n  __syncthreads();\n  const bool there",
        "= p;\n  const bool there",
        "tests/operators/test_linear_cross_entropy_cuda_kernel.py",
    ),
)


def seed(copy: Path, fault: Fault) -> None:
    path = copy / fault.file
    text = path.read_text()
    if text.count(fault.before) != 1:
        raise SystemExit(
            f"{fault.name}: {fault.before!r} occurs {text.count(fault.before)} times in {fault.file}"
        )
    path.write_text(text.replace(fault.before, fault.after))


def caught_by(fault: Fault) -> list[str]:
    """The tests that fail with the fault."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, copy / name)
        seed(copy, fault)
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu"]
        done = subprocess.run(
            [*command, "--maxfail=3", *fault.tests.split()],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": f"{copy / 'python'}:{copy}"},
            capture_output=True,
            text=True,
        )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{fault.name}: pytest ended with {done.returncode}\n{done.stdout[-3000:]}")
    return re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.M)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="parts of names; default: all faults")
    parser.add_argument("--list", action="store_true", help="show the faults and stop")
    options = parser.parse_args()
    chosen = [f for f in FAULTS if not options.words or any(w in f.name for w in options.words)]
    missed = 0
    for fault in chosen:
        if options.list:
            print(f"{fault.name}: {fault.file}")
            continue
        tests = caught_by(fault)
        missed += not tests
        print(f"{fault.name}: {', '.join(tests) if tests else 'NOT CAUGHT'}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
