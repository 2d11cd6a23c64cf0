"""``quietstar demo star``: STaR on sums, with rationalization and without, side by side.

1. ``corpus.jsonl``: sums of one and two digits worked out, of up to three explained (the answer is in
   the prompt), and a small pool of solved ones of up to five (:func:`quietstar.data.sums.corpus`);
2. ``base``: a small Llama that is trained on it;
3. ``with`` and ``without``: the recipe ``star-sums`` from that base, each in a process with one thread.

Everything is an ordinary run in a folder of its own, so that a second call continues where one stopped.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quietstar.data.sums import CorpusMix, corpus
from quietstar.demos.side_by_side import side_by_side
from quietstar.files import METRICS_FILE, read_json, write_json, write_whole
from quietstar.recipes.recipe import Recipe, load_recipe
from quietstar.star.loop import ROW_FILE
from quietstar.star.report import FIGURE, Row, save_figure
from quietstar.star.writing import write_lines
from quietstar.versions import package_versions

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger("quietstar")

ARMS: dict[str, dict[str, Any]] = {"with": {}, "without": {"rationalize": False}}
CORPUS, PAIRS = "corpus.jsonl", 60_000
QUICK: dict[str, Any] = {"base_steps": 600, "iterations": 3}
LINE = "{:>9}  {:>9}  {:>28}  {:>28}"


def write_corpus(path: Path, seed: int, mix: CorpusMix | None = None) -> None:
    """The corpus of a seed, unless it is there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, [pair._asdict() for pair in corpus(PAIRS, mix or CorpusMix(), seed)])


def base_recipe(output: Path, seed: int, *, quick: bool = False) -> Recipe:
    """The base's training on the corpus in a folder."""
    steps = {"max_steps": QUICK["base_steps"]} if quick else {}
    return load_recipe("sums-base").changed(
        data={"files": [str(output / CORPUS)]}, training={"seed": seed, **steps}
    )


def arm_recipe(output: Path, seed: int, *, quick: bool = False, **star: Any) -> Recipe:
    """An arm from the base in a folder; ``star``: what is changed in that section."""
    shorter = {"iterations": QUICK["iterations"]} if quick else {}
    return load_recipe("star-sums").changed(
        model={"name": str(output / "base")},
        star={"replay_files": [str(output / CORPUS)], **shorter, **star},
        training={"seed": seed},
    )


def run_arms(
    output: Path,
    *,
    seed: int = 0,
    quick: bool = False,
    fresh: bool = False,
    progress: bool = True,
    show: Callable[[dict[str, Row]], None] | None = None,
) -> dict[str, Any]:
    """Run what is not done yet; returns the content of ``metrics.json``.

    Args:
        show: called with the rows of all arms when an iteration is there.
    """
    from quietstar.recipes.run import run_recipe

    if fresh and (output / METRICS_FILE).is_file():
        (output / METRICS_FILE).unlink()
    if fresh:  # it may be of another seed
        (output / CORPUS).unlink(missing_ok=True)
    write_corpus(output / CORPUS, seed)
    base = base_recipe(output, seed, quick=quick)
    logger.info("base: %d steps at most", base.training["max_steps"])
    replaced = fresh and (output / "base").is_dir()
    run_recipe(base, output / "base", overwrite=replaced, progress=progress, log_lines=False)
    recipes = {name: arm_recipe(output, seed, quick=quick, **star) for name, star in ARMS.items()}
    for name in ARMS if fresh else ():
        shutil.rmtree(output / name, ignore_errors=True)
    for name, recipe in recipes.items():
        write_whole(output / f"{name}.yaml", recipe.to_yaml())
    rows: dict[str, list[Row]] = {name: [] for name in ARMS}
    iterations = recipes["with"].star.iterations + 1
    # The iterations go into the table: no bar.
    with side_by_side(
        train_arm, dict.fromkeys(ARMS, iterations), str(output), logs=output, progress=False
    ) as wait_for:
        for iteration in range(iterations):
            files = [output / name / f"iteration-{iteration:02d}" / ROW_FILE for name in ARMS]
            for name, file in zip(ARMS, files, strict=True):
                wait_for(name, file.is_file)
            found = {name: read_json(file) for name, file in zip(ARMS, files, strict=True)}
            for name, row in found.items():
                rows[name].append(row)
            if show is not None:
                show(found)
        for name in ARMS:
            wait_for(name)
    metrics = {"seed": seed, "arms": rows, "versions": package_versions()}
    write_json(output / METRICS_FILE, metrics)
    return metrics


def train_arm(name: str, output: str, report: Callable[[int], None] | None = None) -> None:
    """Run the arm whose recipe is in a folder; ``report`` is told how many rows there are."""
    from quietstar.star.loop import run_star

    def told(row: Row) -> None:
        if report is not None:
            report(row["iteration"] + 1)

    recipe = load_recipe(str(Path(output) / f"{name}.yaml"))
    run_star(recipe, Path(output) / name, progress=report is None, show=told)


def print_rows(console: Console, rows: dict[str, Row]) -> None:
    """An iteration of both arms; before the first the header."""
    first = rows["with"]
    kinds = [kind for kind in first["accuracy_by_class"] if kind.partition(" ")[0] > "2"]
    if first["iteration"] == 0:
        digits = " / ".join(kind.partition(" ")[0] for kind in kinds)
        console.print(
            f"\nAccuracy on held-out sums of {digits} digits, in percent; in brackets the share"
        )
        console.print("of the iteration's problems that was solved, and that was rationalized:\n")
        head = LINE.format("iteration", "steps", "with rationalization", "without")
        console.print(f"{head}\n{'-' * len(head)}", markup=False)
    cells = []
    for row in rows.values():
        accuracy = " / ".join(f"{100 * row['accuracy_by_class'][kind]:.0f}" for kind in kinds)
        shares = f" ({row['solved']:.0%}, {row['rationalized']:.0%})" if "solved" in row else ""
        cells.append(accuracy + shares)
    console.print(LINE.format(first["iteration"], first.get("steps", ""), *cells), markup=False)


def verdict(metrics: dict[str, Any]) -> str:
    """One sentence on what was measured, gain or no gain."""
    before = metrics["arms"]["with"][0]["accuracy"]
    ours, plain = (metrics["arms"][name][-1]["accuracy"] for name in ARMS)
    numbers = f"accuracy {ours:.3f} with it, {plain:.3f} without, {before:.3f} before"
    if ours > plain + 0.02:
        return f"Rationalization helped: {numbers}."
    if ours > before + 0.02:
        return f"STaR helped, rationalization did not: {numbers}."
    return f"STaR did not help in this run: {numbers}."


def run_demo(output: Path, *, seed: int = 0, quick: bool = False, fresh: bool = False) -> None:
    """Run the demo, print the table as it fills, then the outcome."""
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # its bars for loading files; the Trainer's stays
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        "A small model learns to add. It has seen sums of up to two digits worked out line by line, and"
        " of three explained,\nwith the answer given. The rest it learns from what it writes itself:"
        " what reaches the right answer is kept."
    )
    metrics = run_arms(
        output, seed=seed, quick=quick, fresh=fresh, show=functools.partial(print_rows, console)
    )
    save_figure(output / FIGURE, metrics["arms"])
    console.print(f"\n[b]{verdict(metrics)}[/b]")
    console.print(
        f"\nmetrics: {output / METRICS_FILE}\nfigure:  {output / FIGURE}\nreports: {output / 'with'},"
        f" {output / 'without'}"
    )
