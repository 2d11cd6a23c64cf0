"""What ``quietstar demo words`` shows: a table that fills, some thoughts, the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quietstar.demos.words import ARMS
from quietstar.demos.words_scores import OPENS, SEVERAL, best_scores, mean_scores, paired

if TYPE_CHECKING:
    from rich.console import Console

LINE = "{:56}  {:>8}  {:>12}  {:>8}"
MEASURES = ("probability", "correct", "nll")
# Half a sentence for each way in which an arm that thinks predicts, and one with asides in sight.
WAYS = {
    "own": "",
    "drawn": ", thoughts drawn",
    "several": f", the mean over {SEVERAL} thoughts drawn",
    "other": ", thoughts of another problem",
    "gold": ", the right equation as thought",
    "none": ", thoughts off",
}
VISIBLE = {"none": "no aside", "own": "its own aside in sight", "gold": "the right aside in sight"}


def rows_of(metrics: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """The rows of the table: label, means over problems and seeds."""
    prepared = metrics["prepared"]["scores"]
    rows = [
        (f"prepared, {name}", mean_scores(prepared[way]))
        for way, name in VISIBLE.items()
        if way in prepared
    ]
    for arm, seeds in metrics["arms"].items():
        label = ARMS[arm].label
        if arm == "none":
            control = [_control(metrics, seed) for seed in seeds]
            means = [{key: mean_scores(each[key])[key] for key in MEASURES} for each in control]
            rows.append((f"{label}, at its best", _mean(means)))
            continue
        last = [looks[-1]["scores"] for looks in seeds.values()]
        names = {way: f"{label}, {name}" for way, name in VISIBLE.items()}
        if arm != "visible":
            names = {way: label + name for way, name in WAYS.items()}
        for way, name in names.items():
            if way in last[0]:
                count = len(last[0][way])
                some = f" ({count} that fit)" if count < metrics["problems"] else ""
                rows.append((name + some, _mean([mean_scores(scores[way]) for scores in last])))
    return rows


def _mean(each: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(one[key] for one in each) / len(each) for key in MEASURES}


def _control(metrics: dict[str, Any], seed: str) -> dict[str, list[dict[str, Any]]]:
    """The control's records by measure, each at its best step by it, the prepared model's among them."""
    looks = [metrics["prepared"], *metrics["arms"]["none"][seed]]
    return {key: best_scores(looks, key) for key in MEASURES}


def print_table(console: Console, metrics: dict[str, Any]) -> None:
    """The table of all arms so far."""
    head = LINE.format("held-out problems", "p(right)", "greedy right", "NLL")
    console.print(f"\n{head}\n{'-' * len(head)}", markup=False)
    for label, means in rows_of(metrics):
        cells = (f"{means['probability']:.3f}", f"{means['correct']:.3f}", f"{means['nll']:.2f}")
        console.print(LINE.format(label, *cells), markup=False)


def print_summary(console: Console, metrics: dict[str, Any]) -> None:
    """Thoughts at held-out problems, and the verdict."""
    looks = next(iter(metrics["arms"]["full"].values()))
    console.print("\nWhat it thinks before some answers:")
    for thought in looks[-1].get("thoughts", [])[:5]:
        console.print(f"  {OPENS}{thought!r}", markup=False)
    console.print(f"\n[b]{verdict(metrics)}[/b]")


def differences(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was compared, and by measure the paired difference with its error, over common seeds."""
    arms = metrics["arms"]
    last = {
        arm: {seed: looks[-1]["scores"] for seed, looks in seeds.items()} for arm, seeds in arms.items()
    }
    found = {}
    for name, our_way, arm, way in (
        ("thoughts, less the same training without", "own", "none", None),
        (f"{SEVERAL} thoughts, less the same training without", "several", "none", None),
        ("REINFORCE, less the same without it", "own", "no-reinforce", "own"),
        (
            f"REINFORCE, less the same without it, {SEVERAL} thoughts",
            "several",
            "no-reinforce",
            "several",
        ),
        ("own thoughts, less those of another problem", "own", "full", "other"),
        ("own thoughts, less none in the same weights", "own", "full", "none"),
    ):
        seeds = [seed for seed in arms["full"] if seed in arms.get(arm, {})]
        if not seeds or our_way not in last["full"][seeds[0]]:
            continue
        ours = [last["full"][seed][our_way] for seed in seeds]
        found[name] = {
            key: paired(
                ours,
                [last[arm][seed][way] if way else _control(metrics, seed)[key] for seed in seeds],
                key,
            )
            for key in MEASURES
        }
    return found


def gains_by_difficulty(metrics: dict[str, Any], parts: int = 10) -> list[dict[str, float]]:
    """Problems in equal parts by what their answers cost the prepared model, which neither arm has had a
    hand in; means over common seeds: that NLL, and both arms' probabilities."""
    arms = metrics["arms"]
    seeds = [seed for seed in arms["full"] if seed in arms["none"]]

    def mean(records: list[list[dict[str, Any]]], key: str) -> Tensor:
        return torch.tensor([[record[key] for record in one] for one in records]).double().mean(0)

    cost = mean([metrics["prepared"]["scores"]["none"]], "nll")
    before = mean([_control(metrics, seed)["probability"] for seed in seeds], "probability")
    after = mean([arms["full"][seed][-1]["scores"]["own"] for seed in seeds], "probability")
    return [
        {
            "prepared_nll": float(cost[chosen].mean()),
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
