"""``python -m benchmarks.demo_seeds 4 5 6``: the demo for several seeds, put together.

Writes ``results/demo/lookup.json`` with every seed's numbers and, per arm, the mean and standard error
over seeds; a run that failed to learn counts like the others. ``--text FOLDER`` takes over the metrics
of a ``quietstar demo text`` run, ``--words FOLDER`` those of ``scripts/words_experiment.py``, ``--eval``
the means that ``quietstar eval`` wrote, ``--trained FOLDER`` those of a model before and after training.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import machine, machine_facts

RESULTS = Path(__file__).parent / "results" / "demo"
COLUMNS = ("hard_nll", "accuracy", "easy_nll")


def over_seeds(runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error over seeds of every arm's means."""
    table: dict[str, Any] = {}
    for label in next(iter(runs.values()))["arms"]:
        table[label] = {}
        for column in COLUMNS:
            values = [run["arms"][label][column]["mean"] for run in runs.values()]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            table[label][column] = {"mean": statistics.mean(values), "standard_error": error}
    return table


def of_words(metrics: dict[str, Any]) -> dict[str, Any]:
    """What was measured on word problems, but for each single problem."""
    from quietstar.demos.words_report import differences, gains_by_difficulty, rows_of

    return {
        **{key: metrics[key] for key in ("problems", "sizes", "versions")},
        "seeds": {arm: list(seeds) for arm, seeds in metrics["arms"].items()},
        "rows": [{"what": label, **means} for label, means in rows_of(metrics)],
        "differences": differences(metrics),
        "by_difficulty": gains_by_difficulty(metrics),
    }


# What is in the folder of --trained, by label: each model's files of `quietstar eval`.
TRAINED = {
    "before": "before any training",
    "none": "trained without thoughts",
    "half": "trained with thoughts, weight 0.5 at first",
    "thoughts": "trained with thoughts, weight 0.05 at first",
}


def of_trained(folder: Path) -> dict[str, Any]:
    """The tasks of every model by its label, from files like ``thoughts-perplexity.json``."""
    return {
        "models": {
            label: {
                task: means
                for file in sorted(folder.glob(f"{name}-*.json"))
                for task, means in json.loads(file.read_text())["tasks"].items()
            }
            for name, label in TRAINED.items()
            if any(folder.glob(f"{name}-*.json"))
        }
    }


def main() -> None:
    """Run what is not done yet and write the results."""
    from quietstar.demos.lookup import run_arms

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", type=int, nargs="*")
    parser.add_argument("--folder", type=Path, default=Path("quietstar-demo-seeds"))
    parser.add_argument("--sweep", type=int, metavar="SEED", help="also try thought lengths with it")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="a finished `quietstar demo text`")
    parser.add_argument("--words", type=Path, metavar="FOLDER", help="a finished experiment on words")
    parser.add_argument("--eval", type=Path, nargs="+", metavar="FILE", help="what quietstar eval wrote")
    parser.add_argument("--trained", type=Path, metavar="FOLDER", help="before-*.json, thoughts-*.json")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if args.seeds:
        runs = {
            seed: run_arms(args.folder / str(seed), seed=seed, sweep=seed == args.sweep)
            for seed in args.seeds
        }
        content = {
            "date": date.today().isoformat(),
            "machine": machine(),
            "over_seeds": over_seeds(runs),
            "seeds": runs,
        }
        (RESULTS / "lookup.json").write_text(json.dumps(content, indent=1) + "\n")
    if args.eval:
        found = [json.loads(file.read_text()) for file in args.eval]
        tasks = {name: means for each in found for name, means in each["tasks"].items()}
        content = {"date": date.today().isoformat(), "machine": machine_facts(), "tasks": tasks}
        (RESULTS / "zero-shot.json").write_text(json.dumps(content, indent=1) + "\n")
    if args.trained:
        content = {"date": date.today().isoformat(), "machine": machine_facts()}
        content |= of_trained(args.trained)
        (RESULTS / "trained.json").write_text(json.dumps(content, indent=1) + "\n")
    for name, folder, what in (("text", args.text, dict), ("words", args.words, of_words)):
        if folder:
            metrics = what(json.loads((folder / "metrics.json").read_text()))
            content = {"date": date.today().isoformat(), "machine": machine_facts(), **metrics}
            (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
