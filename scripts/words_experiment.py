#!/usr/bin/env python3
"""Word problems on a real language model, every arm and seed: the table of docs/results.md.

    python scripts/words_experiment.py --model SmolLM2-135M-Instruct.Q4_1.gguf --data svamp --seeds 1 2 3

Goes on where it stopped, also in the middle of an arm. Everything is in --output; several commands with
different --arms or --seeds may work in one folder, once the preparation is there. --summary FILE writes
what benchmarks/results keeps of it: means, differences with their errors, gains by difficulty.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from quietstar.demos.words import ARMS, FULL, Sizes, run_demo
from quietstar.demos.words_report import differences, gains_by_difficulty, rows_of
from quietstar.files import METRICS_FILE, read_json, write_json


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", help="the base model: a GGUF file, a folder, a name on the hub")
    add("--data", type=Path, help="a folder with SVAMP's train.jsonl and test.jsonl (default: the hub)")
    add("--output", type=Path, default=Path("words-experiment"))
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--arms", nargs="+", choices=list(ARMS), default=["full", "none", "no-reinforce"])
    add("--prepare", type=int, default=FULL.prepare, help="steps of the preparation")
    add("--steps", type=int, default=FULL.steps, help="steps of every arm")
    add("--every", type=int, default=FULL.every, help="steps between two looks at held-out problems")
    add("--problems", type=int, help="held-out problems (default: all)")
    add("--summary", type=Path, help="a JSON file for means and differences")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sizes = Sizes(args.prepare, args.steps, args.every, args.problems)
    run_demo(
        args.output,
        model=args.model,
        data=args.data,
        sizes=sizes,
        seeds=args.seeds,
        arms=args.arms,
    )
    if args.summary is not None:
        write_json(args.summary, summary(read_json(args.output / METRICS_FILE)))


def summary(metrics: dict[str, Any]) -> dict[str, Any]:
    """Of the metrics what is not one problem's."""
    return {
        **{key: metrics[key] for key in ("problems", "sizes", "versions")},
        "seeds": {arm: list(seeds) for arm, seeds in metrics["arms"].items()},
        "rows": [{"what": label, "steps": steps, **means} for label, steps, means in rows_of(metrics)],
        "differences": differences(metrics),
        "by_difficulty": gains_by_difficulty(metrics),
    }


if __name__ == "__main__":
    main()
