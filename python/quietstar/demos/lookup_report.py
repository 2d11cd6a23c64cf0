"""What the demo shows: the table, some thoughts, the verdict, a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quietstar.evaluation.perplexity import spread

if TYPE_CHECKING:
    from rich.console import Console

# Six states: an answer by chance.
CHANCE = 1 / 6
LINE = "{:36}  {:>16}  {:>16}  {:>12}"


def print_row(console: Console, metrics: dict[str, Any]) -> None:
    """Print the newest row of the table; before the first row, the header."""
    label, arm = list(metrics["arms"].items())[-1]
    if len(metrics["arms"]) == 1:
        head = LINE.format("arm", "answer: NLL", "accuracy", "easy NLL")
        console.print(f"\n{head}\n{'-' * len(head)}", markup=False)
    cells = spread(arm["hard_nll"]), spread(arm["accuracy"]), f"{arm['easy_nll']['mean']:.3f}"
    console.print(LINE.format(label, *cells), markup=False)


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
    """One sentence on what was measured, gain or no gain."""
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
    from matplotlib.figure import Figure

    swept = metrics["by_thought_length"]
    panels = 2 if swept else 1
    figure = Figure(figsize=(5.2 * panels, 3.6), layout="tight")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for name, curve in metrics["accuracy_by_step"].items():
        if not name.startswith("length-"):
            axes[0].plot(*zip(*curve, strict=True), label=name)
    axes[0].set(xlabel="step", ylabel="accuracy on held-out answers", ylim=(0, 1))
    axes[0].legend(frameon=False)
    if swept:
        accuracy = [arm["accuracy"] for arm in swept.values()]
        means, errors = ([each[key] or 0.0 for each in accuracy] for key in ("mean", "standard_error"))
        axes[1].errorbar([int(length) for length in swept], means, errors, marker="o", capsize=3)
        axes[1].set(xlabel="thought length (tokens)", ylim=(0, 1.02))
    for panel in axes:
        panel.axhline(CHANCE, color="grey", linestyle=":", linewidth=1)
    path = output / "accuracy.png"
    figure.savefig(path, dpi=120)
    return path
