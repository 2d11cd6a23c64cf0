"""STaR on sums, for several seeds and arms: what rationalization carries, and where it ends.

    python scripts/star_experiment.py FOLDER [--seeds 0 1 2] [--arms with without ...] [--iterations 16]

Every arm is the recipe ``star-sums`` with a few keys changed, from the base that `quietstar demo star`
trains for that seed; one of them alone leaves hints in prompts. Each is an ordinary run in a folder of
its own: this may be killed at any time, and the same command goes on. After every arm it writes
benchmarks/results/star-sums.json and the table in docs/star.md from what is done so far (``--report``:
nothing else).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "star-sums.json"
PAGE = ROOT / "docs" / "star.md"
BEGIN, END = "<!-- sums -->", "<!-- /sums -->"
SEEDS = (0, 1, 2)
# Which base an arm starts from ("pool": with the small pool of solved sums in its corpus), and what it
# changes in the section star.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "with": ("pool", {}),
    "without": ("pool", {"rationalize": False}),
    "answers": ("pool", {"learn_from": "answers"}),
    "answers-long": (
        "pool",
        {"learn_from": "answers", "restart": False, "first_steps": 480, "steps_added": 60},
    ),
    "hints": ("pool", {"hints_left_in": 0.3}),
    "older": ("pool", {"older_rationales": True}),
    "with, no pool": ("no-pool", {}),
    "without, no pool": ("no-pool", {"rationalize": False}),
}
LABELS = {
    "with": "with rationalization",
    "without": "without",
    "answers": "true answers only, the same schedule",
    "answers-long": "true answers only, continued, three times the steps",
    "hints": "with, hints left in 30 % of the prompts that had one",
    "older": "with, rationales of earlier iterations learnt from, too",
    "with, no pool": "with, no pool in the corpus",
    "without, no pool": "without, no pool in the corpus",
}


def run_arm(folder: Path, arm: str, seed: int, iterations: int) -> None:
    """Train the base if it is not there, and run what is not done of an arm."""
    from quietstar.data.sums import CorpusMix
    from quietstar.demos.star import CORPUS, arm_recipe, base_recipe, write_corpus
    from quietstar.recipes.run import run_recipe
    from quietstar.star.loop import run_star

    base, star = ARMS[arm]
    home = folder / f"seed-{seed}-{base}"
    write_corpus(home / CORPUS, seed, CorpusMix() if base == "pool" else CorpusMix(pool=0.0))
    run_recipe(base_recipe(home, seed), home / "base", progress=False)
    recipe = arm_recipe(home, seed, iterations=iterations, **star)
    output, spent, started = home / arm, home / f"{arm}.seconds", time.process_time()
    try:
        run_star(
            recipe, output, progress=False, show=lambda row: print(seed, arm, _line(row), flush=True)
        )
    finally:
        before = float(spent.read_text()) if spent.is_file() else 0.0
        spent.write_text(f"{before + time.process_time() - started:.1f}")


def _line(row: dict[str, Any]) -> str:
    shares = {name: round(row[name], 3) for name in ("solved", "rationalized") if name in row}
    classes = [round(100 * share) for share in row["accuracy_by_class"].values()]
    return f"{row['iteration']:2} {100 * row['accuracy']:.1f} {classes} {shares}"


def collected(folder: Path) -> dict[str, Any]:
    """What there is of every arm and seed, finished or not."""
    found: dict[str, Any] = {}
    for arm, (base, star) in ARMS.items():
        seeds = {}
        for home in sorted(folder.glob(f"seed-*-{base}")):
            files = sorted((home / arm).glob("iteration-*/row.json"))
            rows = [json.loads(file.read_text()) for file in files]
            if rows:
                spent = home / f"{arm}.seconds"
                seeds[home.name.split("-")[1]] = {
                    "done": (home / arm / "metrics.json").is_file(),
                    "cpu_seconds": float(spent.read_text()) if spent.is_file() else None,
                    "rows": rows,
                }
        if seeds:
            found[arm] = {"star": star, "corpus": base, "seeds": seeds}
    return found


def table(arms: dict[str, Any]) -> str:
    """Accuracy at 3, 4 and 5 digits, before the first iteration and after the last that every finished
    run has; behind it how far the longer ones came."""
    seeds = sorted({seed for arm in arms.values() for seed in arm["seeds"]})
    kinds = ("3 digits", "4 digits", "5 digits")
    runs = [run for arm in arms.values() for run in arm["seeds"].values()]
    number = min((len(run["rows"]) for run in runs if run["done"]), default=1) - 1

    def cell(row: dict[str, Any]) -> str:
        return "/".join(f"{100 * row['accuracy_by_class'][kind]:.0f}" for kind in kinds)

    def last(run: dict[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = run["rows"][: number + 1][-1]
        return row

    lines = [f"| arm | {' | '.join(f'seed {seed}' for seed in seeds)} |", f"|---|{'---|' * len(seeds)}"]
    for base in ("pool", "no-pool"):
        first = {
            seed: cell(arm["seeds"][seed]["rows"][0])
            for arm in arms.values()
            if arm["corpus"] == base and "learn_from" not in arm["star"]
            for seed in arm["seeds"]
        }
        if first:
            label = "base" if base == "pool" else "base, no pool in the corpus"
            lines.append(f"| {label} | {' | '.join(first.get(seed, '-') for seed in seeds)} |")
    means, longer = [], []
    for arm, content in arms.items():
        cells = []
        for seed in seeds:
            run = content["seeds"].get(seed)
            short = run is not None and len(run["rows"]) <= number
            note = f" ({len(run['rows']) - 1} iterations)" if run and short else ""
            cells.append(f"{cell(last(run))}{note}" if run else "-")
            if run and len(run["rows"]) > number + 1:
                row = run["rows"][-1]
                longer.append(
                    f"{LABELS[arm]}, seed {seed}, after {row['iteration']} iterations: {cell(row)}"
                    f" ({_percent([run], -1)} over all classes; {_percent([run], number)} after"
                    f" {number})"
                )
        lines.append(f"| {LABELS[arm]} | {' | '.join(cells)} |")
        some = "" if len(content["seeds"]) == len(seeds) else f" (seed {', '.join(content['seeds'])})"
        means.append(f"{LABELS[arm]}{some} {_percent(list(content['seeds'].values()), number)}")
    said = f"After {number} iterations. Mean accuracy over all classes and seeds: {'; '.join(means)}."
    return "\n".join(
        [*lines, "", " ".join([said, *(f"{each[0].upper()}{each[1:]}." for each in longer)])]
    )


def _percent(runs: list[dict[str, Any]], number: int) -> str:
    """Mean accuracy of runs after an iteration, or after their last."""
    rows = [run["rows"][number if number < len(run["rows"]) else -1] for run in runs]
    return f"{100 * statistics.mean(row['accuracy'] for row in rows):.1f}"


def report(folder: Path) -> None:
    """Write the results, and the table in the docs."""
    from quietstar.versions import package_versions

    arms = collected(folder)
    if not arms:
        return
    content = {"date": date.today().isoformat(), "versions": package_versions(), "arms": arms}
    # A row of a run on each line.
    text = json.dumps(content).replace('{"iteration"', '\n{"iteration"')
    RESULTS.write_text(text + "\n")
    head, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{BEGIN}\n{table(arms)}\n{END}{tail}")


def main() -> None:
    """Run what is not done yet, arm after arm, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--report", action="store_true", help="only put together what is there")
    args = parser.parse_args()
    for arm in () if args.report else args.arms:
        for seed in args.seeds:
            run_arm(args.folder, arm, seed, args.iterations)
            report(args.folder)
    report(args.folder)


if __name__ == "__main__":
    main()
