#!/usr/bin/env python3
"""Word problems on a real language model, every arm and seed: the table of docs/results.md.

    python scripts/words_experiment.py --model SmolLM2-135M-Instruct.Q4_1.gguf --data svamp --seeds 1 2 3

Goes on where it stopped, also in the middle of an arm. Everything is in --output; several commands with
different --arms or --seeds may work in one folder, once the preparation is there. `python -m
benchmarks.demo_seeds --words FOLDER` then puts its means and differences among the results.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from quietstar.demos.words import ARMS, FULL, Sizes, run_demo
from quietstar.errors import UserError


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
    add("--every", type=int, default=FULL.every, help="steps between two looks of the control")
    add("--problems", type=int, help="held-out problems (default: all)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        sizes = Sizes(args.prepare, args.steps, args.every, args.problems)
        run_demo(
            args.output,
            model=args.model,
            data=args.data,
            sizes=sizes,
            seeds=args.seeds,
            arms=args.arms,
        )
    except UserError as error:
        raise SystemExit(f"words_experiment: error: {error}") from None


if __name__ == "__main__":
    main()
