"""What the demo shows: the table, some thoughts, the verdict, a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Six states: an answer by chance.
CHANCE = 1 / 6
WIDTHS = (36, 16, 16, 12)


def print_row(console: Console, metrics: dict[str, Any], shown: set[str]) -> None:
    """Print the rows of the table that are new, the header before the first."""
    if not shown:
        console.print(
            "\n"
            + _line("arm", "answer: NLL", "accuracy", "easy NLL")
            + "\n"
            + "-" * (sum(WIDTHS) + 2 * len(WIDTHS) - 2),
            markup=False,
        )
    for label, arm in metrics["arms"].items():
        if label in shown:
            continue
        shown.add(label)
        cells = (spread(arm["hard_nll"]), spread(arm["accuracy"]), f"{arm['easy_nll']['mean']:.3f}")
        console.print(_line(label, *cells), markup=False)


def spread(estimate: dict[str, Any]) -> str:
    """``mean ± standard error``."""
    error = estimate["standard_error"]
    return f"{estimate['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _line(*cells: str) -> str:
    first, *others = cells
    return first.ljust(WIDTHS[0]) + "".join(
        "  " + cell.rjust(width) for cell, width in zip(others, WIDTHS[1:], strict=True)
    )


def print_summary(console: Console, metrics: dict[str, Any]) -> None:
    """Thoughts at a few questions, the sweep if there is one, and the verdict."""
    console.print("\nWhat it thinks at some held-out questions:")
    for thought in metrics["thoughts"]:
        mark = "right" if thought["correct"] else "wrong"
        console.print(
            f"  {thought['question']}  thinks: {thought['thought']}  answer {thought['answer']} ({mark},"
            f" mixing weight {thought['mixing_weight']:.2f})",
            markup=False,
            soft_wrap=True,
        )
    if metrics["by_thought_length"]:
        console.print("\nAccuracy by thought length (four serial steps are in a problem):")
        for length, arm in metrics["by_thought_length"].items():
            console.print(f"  {length} tokens: {spread(arm['accuracy'])}")
    full = metrics["arms"]["full Quiet-STaR"]
    console.print(
        f"\nMixing weight {full['mixing_weight_at_question']:.2f} at questions,"
        f" {full['mixing_weight_elsewhere']:.2f} elsewhere;"
        f" {full['correct_chains']:.0%} of the thoughts at questions are the correct derivation."
    )
    console.print(f"\n[b]{verdict(metrics)}[/b]")


def verdict(metrics: dict[str, Any]) -> str:
    """One sentence on what was measured; it does not promise what did not come."""
    full = metrics["arms"]["full Quiet-STaR"]["accuracy"]["mean"]
    plain = metrics["arms"]["no thoughts"]["accuracy"]["mean"]
    numbers = f"accuracy on answers {full:.3f} with thoughts, {plain:.3f} without (chance {CHANCE:.3f})"
    if full > plain + 0.2:
        return (
            f"Thoughts helped: {numbers}. REINFORCE found when and how to use reasoning that the model"
            " already had."
        )
    return f"Thoughts did not help in this run: {numbers}."


def save_figure(metrics: dict[str, Any], output: Path) -> Path:
    """Accuracy by step, and by thought length if it was swept, as ``accuracy.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    swept = metrics["by_thought_length"]
    panels = 2 if swept else 1
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 3.6), squeeze=False)
    left = axes[0][0]
    for name, curve in metrics["accuracy_by_step"].items():
        if not name.startswith("length-"):
            left.plot(*zip(*curve, strict=True), label=name)
    left.set(xlabel="step", ylabel="accuracy on held-out answers", ylim=(0, 1))
    left.axhline(CHANCE, color="grey", linestyle=":", linewidth=1)
    left.legend(frameon=False)
    if swept:
        right = axes[0][1]
        lengths = [int(length) for length in swept]
        right.errorbar(
            lengths,
            [arm["accuracy"]["mean"] for arm in swept.values()],
            [arm["accuracy"]["standard_error"] or 0.0 for arm in swept.values()],
            marker="o",
            capsize=3,
        )
        right.axhline(CHANCE, color="grey", linestyle=":", linewidth=1)
        right.set(xlabel="thought length (tokens)", ylim=(0, 1.02))
    figure.tight_layout()
    path = output / "accuracy.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
