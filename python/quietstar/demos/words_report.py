"""What ``quietstar demo words`` shows: a table that fills, some thoughts, the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quietstar.demos.words import LABELS
from quietstar.demos.words_scores import best_look, mean_scores, paired

if TYPE_CHECKING:
    from rich.console import Console

LINE = "{:44}  {:>5}  {:>8}  {:>12}  {:>8}"
# Half a sentence for each way in which an arm that thinks predicts.
WAYS = {
    "own": "",
    "drawn": ", thoughts drawn",
    "other": ", thoughts of another problem",
    "none": ", thoughts off",
}


def rows_of(metrics: dict[str, Any]) -> list[tuple[str, str, dict[str, float]]]:
    """The rows of the table: label, step, means over problems and seeds."""
    names = {"prepared": "prepared model", "gold aside": "the right aside in sight"}
    names["own aside"] = "its own aside in sight (chain of thought)"
    rows = [(names[key], "0", means) for key, means in metrics["bounds"].items()]
    for arm, seeds in metrics["arms"].items():
        judged = "none" if arm == "none" else "own"
        for way in (judged,) if arm == "none" else WAYS:
            looks = [best_look(looks, judged) for looks in seeds.values()]
            if way not in looks[0]["scores"]:
                continue
            each = [mean_scores(look["scores"][way]) for look in looks]
            means = {key: sum(one[key] for one in each) / len(each) for key in each[0]}
            steps = ",".join(str(look["step"]) for look in looks)
            rows.append((LABELS[arm] + ("" if arm == "none" else WAYS[way]), steps, means))
    return rows


def print_table(console: Console, metrics: dict[str, Any]) -> None:
    """The table of all arms so far."""
    head = LINE.format("held-out problems", "step", "p(right)", "greedy right", "NLL")
    console.print(f"\n{head}\n{'-' * len(head)}", markup=False)
    for label, step, means in rows_of(metrics):
        cells = (f"{means['probability']:.3f}", f"{means['correct']:.3f}", f"{means['nll']:.2f}")
        console.print(LINE.format(label, step, *cells), markup=False)


def print_summary(console: Console, metrics: dict[str, Any]) -> None:
    """Thoughts at held-out problems, and the verdict."""
    looks = next(iter(metrics["arms"]["full"].values()))
    console.print("\nWhat it thinks before some answers:")
    for thought in best_look(looks, "own").get("thoughts", [])[:5]:
        console.print(f"  ({thought!r}", markup=False)
    console.print(f"\n[b]{verdict(metrics)}[/b]")


def verdict(metrics: dict[str, Any]) -> str:
    """One sentence on what was measured, gain or no gain."""
    found = {key: paired(metrics, key) for key in ("probability", "correct", "nll")}
    gain = found["probability"]
    error = gain["standard_error"] or 0.0
    numbers = ", ".join(
        f"{name} {found[key]['mean']:+.3f} ± {found[key]['standard_error'] or 0.0:.3f}"
        for key, name in (
            ("probability", "mean probability"),
            ("correct", "greedy accuracy"),
            ("nll", "NLL"),
        )
    )
    text = f"{numbers} against the same training without thoughts ({metrics['problems']} problems)."
    if gain["mean"] > 3 * error:
        return f"Thoughts helped: {text}"
    if gain["mean"] > 0:
        return f"Thoughts helped by less than three standard errors: {text}"
    return f"Thoughts did not help: {text}"
