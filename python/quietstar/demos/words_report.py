"""What ``quietstar demo words`` shows: a table that fills, some thoughts, the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quietstar.demos.words import ARMS
from quietstar.demos.words_scores import judged_look, mean_scores, paired

if TYPE_CHECKING:
    from rich.console import Console

LINE = "{:44}  {:>5}  {:>8}  {:>12}  {:>8}"
# Half a sentence for each way in which an arm that thinks predicts, and one with asides in sight.
WAYS = {
    "own": "",
    "drawn": ", thoughts drawn",
    "other": ", thoughts of another problem",
    "gold": ", the right equation as thought",
    "none": ", thoughts off",
}
VISIBLE = {"none": "no aside", "own": "its own aside in sight", "gold": "the right aside in sight"}


def judged(looks: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    """The control at its best step, everything else at its last."""
    return judged_look(looks, "none", best=arm == "none")


def rows_of(metrics: dict[str, Any]) -> list[tuple[str, str, dict[str, float]]]:
    """The rows of the table: label, step, means over problems and seeds."""
    prepared = metrics["prepared"]["scores"]
    rows = [
        (f"prepared, {name}", "0", mean_scores(prepared[way]))
        for way, name in VISIBLE.items()
        if way in prepared
    ]
    for arm, seeds in metrics["arms"].items():
        looks = [judged(looks, arm) for looks in seeds.values()]
        label = ARMS[arm].label
        names = {way: f"{label}, {name}" for way, name in VISIBLE.items()}
        if arm != "visible":
            names = {way: label + name for way, name in WAYS.items()}
        if arm == "none":
            names = {"none": label}
        for way, name in names.items():
            if way not in looks[0]["scores"]:
                continue
            each = [mean_scores(look["scores"][way]) for look in looks]
            means = {key: sum(one[key] for one in each) / len(each) for key in each[0]}
            rows.append((name, ",".join(str(look["step"]) for look in looks), means))
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
    for thought in judged(looks, "full").get("thoughts", [])[:5]:
        console.print(f"  ({thought!r}", markup=False)
    console.print(f"\n[b]{verdict(metrics)}[/b]")


def differences(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was compared, and by probability, correct and nll the paired difference with its error."""
    seeds = metrics["arms"]["full"]
    scores = {
        arm: {seed: judged(looks, arm)["scores"] for seed, looks in arms.items()}
        for arm, arms in metrics["arms"].items()
    }
    found = {}
    for name, arm, way in (
        ("thoughts, less the same training without", "none", "none"),
        ("REINFORCE, less the same without it", "no-reinforce", "own"),
        ("own thoughts, less those of another problem", "full", "other"),
        ("own thoughts, less none in the same weights", "full", "none"),
    ):
        common = [seed for seed in seeds if seed in scores.get(arm, {})]
        if not common:
            continue
        ours = [scores["full"][seed]["own"] for seed in common]
        theirs = [scores[arm][seed][way] for seed in common]
        found[name] = {key: paired(ours, theirs, key) for key in ("probability", "correct", "nll")}
    return found


def gains_by_difficulty(metrics: dict[str, Any], parts: int = 10) -> list[dict[str, float]]:
    """Problems in equal parts by what their answers cost the control, means over seeds: that NLL, and
    both probabilities."""
    seeds = metrics["arms"]["full"]
    ours = [judged(looks, "full")["scores"]["own"] for looks in seeds.values()]
    theirs = [judged(metrics["arms"]["none"][seed], "none")["scores"]["none"] for seed in seeds]

    def mean(records: list[list[dict[str, Any]]], key: str) -> Tensor:
        return torch.tensor([[record[key] for record in one] for one in records]).double().mean(0)

    cost, before, after = mean(theirs, "nll"), mean(theirs, "probability"), mean(ours, "probability")
    return [
        {
            "control_nll": float(cost[chosen].mean()),
            "control_probability": float(before[chosen].mean()),
            "full_probability": float(after[chosen].mean()),
        }
        for chosen in cost.argsort().tensor_split(parts)
        if len(chosen)
    ]


def verdict(metrics: dict[str, Any]) -> str:
    """One sentence on what was measured, gain or no gain."""
    found = differences(metrics)["thoughts, less the same training without"]
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
