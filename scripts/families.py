#!/usr/bin/env python3
"""Checks every causal model type of the installed transformers and writes docs/families.md.

    python scripts/families.py [--only NAME ...] [--workers N]
    python scripts/families.py --check

Each type gets a tiny random decoder with its features on (family_configs.py) and is compared with its
plain self (family_check.py), in a process of its own. The table is written if all types were checked.
Exit status 1: a type is wrong or crashes. With --check nothing is run: README has to quote the counts
of docs/families.md, which have to be those of its table.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import multiprocessing
import os
import re
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

# Workers are forked from a process that has imported everything, so it must not start threads.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from family_check import CRASH, EXACT, NOT_BUILT, REFUSED, WRONG, Verdict, check
from family_configs import CAUSAL_TYPES, WINDOW

REPOSITORY = Path(__file__).resolve().parents[1]
TABLE = REPOSITORY / "docs" / "families.md"
README = REPOSITORY / "README.md"
BEGIN, FINISH = "<!-- families -->", "<!-- /families -->"
KINDS = (EXACT, REFUSED, WRONG, CRASH, NOT_BUILT)

SECONDS, BYTES = 120, 4 << 30  # of one family; memory beyond what the imports take


def main() -> int:
    parser = argparse.ArgumentParser(description="Check every causal model type of transformers.")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=CAUSAL_TYPES, default=[])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--check", action="store_true", help="compare README with docs/families.md")
    options = parser.parse_args()
    if options.check:
        return _report(disagreements(TABLE.read_text("utf-8"), README.read_text("utf-8")))
    families = options.only or CAUSAL_TYPES
    verdicts = []
    for verdict in run_all(families, options.workers):
        verdicts.append(verdict)
        number = f"{verdict.difference:.1e} " if verdict.difference is not None else ""
        print(f"{len(verdicts)}/{len(families)} {verdict.family}: {verdict.kind} {number}{verdict.text}")
        sys.stdout.flush()
    counts = Counter(verdict.kind for verdict in verdicts)
    print(summary(counts))
    if not options.only:
        TABLE.write_text(document(verdicts), "utf-8")
    return int(bool(counts[WRONG] or counts[CRASH]))


def run_all(families: Sequence[str], workers: int) -> Iterator[Verdict]:
    """The verdicts as they come; one process for a family, ended when its time is over."""
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(families))
    running: dict[Connection, tuple[str, multiprocessing.Process, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            family = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(family, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (family, process, time.monotonic() + SECONDS)
        ready = wait(list(running), timeout=1)
        now = time.monotonic()
        for receiver in list(running):
            family, process, end = running[receiver]
            if receiver not in ready and now < end:
                continue
            if receiver in ready:
                try:
                    yield receiver.recv()
                except EOFError:
                    process.join()
                    yield Verdict(family, CRASH, text=f"its process ended with {process.exitcode}")
            else:
                process.kill()
                yield Verdict(family, CRASH, text=f"not done after {SECONDS} seconds")
            process.join()
            del running[receiver]


def _work(family: str, sender: Connection) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sender.send(check(family))


def summary(counts: Counter[str]) -> str:
    """The sentence that README quotes."""
    total = sum(counts.values())
    parts = [f"{counts[kind]} {kind}" for kind in KINDS if counts[kind] or kind in (WRONG, CRASH)]
    return f"{total} model types: {', '.join(parts)}"


def document(verdicts: Sequence[Verdict]) -> str:
    """docs/families.md: its own words, and the table between the two marks."""
    before, _, rest = TABLE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(FINISH)
    rows = [_row(verdict) for verdict in sorted(verdicts, key=lambda v: v.family)]
    counts = Counter(verdict.kind for verdict in verdicts)
    head = (
        f"**{summary(counts)}.** transformers {transformers.__version__}, torch {torch.__version__},"
        f" {datetime.date.today()}; windows are {WINDOW} tokens."
    )
    table = [
        "| model type | verdict | largest difference | what is on, or why not |",
        "|---|---|--:|---|",
    ]
    return f"{before}{BEGIN}\n{head}\n\n" + "\n".join(table + rows) + f"\n{FINISH}{after}"


def _row(verdict: Verdict) -> str:
    number = f"{verdict.difference:.1e}" if verdict.difference is not None else ""
    parts = [verdict.text if verdict.kind != EXACT else "", verdict.features]
    said = "; ".join(part for part in parts if part) if verdict.kind != REFUSED else verdict.text
    said = said.replace("|", "\\|").replace("<", "\\<")
    return f"| {verdict.family} | {verdict.kind} | {number} | {said} |"


def disagreements(table: str, readme: str) -> list[str]:
    """What does not fit: the counts above the table with its rows, and README with them."""
    _, _, generated = table.partition(BEGIN)
    generated, closed, _ = generated.partition(FINISH)
    kinds = re.findall(rf"^\| [^|]+ \| ({'|'.join(KINDS)}) \|", generated, flags=re.M)
    counted = summary(Counter(kinds))
    found = []
    if not closed or f"**{counted}.**" not in generated:
        found.append(f"docs/families.md does not say what its table shows: {counted}")
    if counted not in " ".join(readme.split()):
        found.append(f"README.md does not quote docs/families.md: {counted}")
    return found


def _report(problems: list[str]) -> int:
    for problem in problems:
        print(problem)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
