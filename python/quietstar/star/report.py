"""What a run shows: a row per iteration, the settings, a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quietstar.files import write_whole
from quietstar.recipes.star_section import StarSection
from quietstar.star.keeping import GENERATED, RATIONALIZED

if TYPE_CHECKING:
    from rich.console import Console

    from quietstar.star.keeping import Kept
    from quietstar.star.problems import Problem
    from quietstar.star.writing import Written

Row = dict[str, Any]
FIGURE, REPORT = "accuracy.png", "report.md"
HEAD = ("iteration", "steps", "accuracy", "solved", "rationalized", "kept", "wrong inside")


def accuracy_row(
    iteration: int, problems: Sequence[Problem], tested: Sequence[Sequence[Written]]
) -> Row:
    """How many held-out problems a model solves, of all and of each class."""
    of_kind: dict[str, list[bool]] = {}
    for problem, (written,) in zip(problems, tested, strict=True):
        of_kind.setdefault(problem.kind, []).append(written.right)
    return {
        "iteration": iteration,
        "accuracy": _share([right for kind in of_kind.values() for right in kind]),
        "accuracy_by_class": {kind: _share(right) for kind, right in of_kind.items()},
    }


def kept_row(problems: Sequence[Problem], kept: Sequence[Kept]) -> Row:
    """What an iteration kept: shares of the problems, of all and of each class; and of the rationales
    that can be checked, how many are wrong inside."""
    kinds = list(dict.fromkeys(problem.kind for problem in problems))
    row = _shares(problems, kept)
    if len(kinds) > 1:
        row["by_class"] = {
            kind: _shares([p for p in problems if p.kind == kind], [k for k in kept if k.kind == kind])
            for kind in kinds
        }
    return row


def _shares(problems: Sequence[Problem], kept: Sequence[Kept]) -> Row:
    row: Row = {"problems": len(problems), "kept": len(kept)}
    for source, name in ((GENERATED, "solved"), (RATIONALIZED, "rationalized")):
        of_source = [each for each in kept if each.source == source]
        checked = [each.wrong_inside for each in of_source if each.wrong_inside is not None]
        row[name] = len({each.problem for each in of_source}) / max(1, len(problems))
        row[f"wrong_inside_{source}"] = _share(checked)
    return row


def _share(of: Sequence[bool]) -> float | None:
    return sum(of) / len(of) if of else None


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table as text."""
    wrong = [row.get(f"wrong_inside_{source}") for source in (GENERATED, RATIONALIZED)]
    return [
        str(row["iteration"]),
        str(row.get("steps", "")),
        _percent(row["accuracy"]),
        _percent(row.get("solved")),
        _percent(row.get("rationalized")),
        str(row.get("kept", "")),
        "" if wrong == [None, None] else " / ".join(_percent(share) or "-" for share in wrong),
        *(_percent(share) for share in row["accuracy_by_class"].values()),
    ]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def head(row: Mapping[str, Any]) -> list[str]:
    """The table's columns."""
    kinds = list(row["accuracy_by_class"])
    return [*HEAD, *(kinds if len(kinds) > 1 else ())]


def print_row(console: Console, row: Mapping[str, Any]) -> None:
    """The newest row of the table, below the columns if it is the first."""
    names = head(row)
    widths = [max(len(name), 6) for name in names]
    if row["iteration"] == 0:
        line = "  ".join(name.rjust(width) for name, width in zip(names, widths, strict=True))
        console.print(f"\n{line}\n{'-' * len(line)}", markup=False)
    texts = cells(row)[: len(names)]
    console.print(
        "  ".join(text.rjust(width) for text, width in zip(texts, widths, strict=True)), markup=False
    )


def save_report(output: Path, star: StarSection, rows: Sequence[Row]) -> None:
    """``report.md`` with all settings and the table, and the figure ``accuracy.png``."""
    values = {key: value for key, value in asdict(star).items() if key != "shots"}
    # A line break as \\n.
    texts = {key: repr(v)[1:-1] if isinstance(v, str) else v for key, v in values.items()}
    settings = ", ".join(f"{key} {value}" for key, value in texts.items())
    shots = f"{len(star.shots)} shots" if star.shots else "no shots"
    names = head(rows[0])
    table = [f"| {' | '.join(names)} |", f"|{'--:|' * len(names)}"]
    table += [f"| {' | '.join(cells(row)[: len(names)])} |" for row in rows]
    lines = [
        "# STaR, iteration by iteration",
        "",
        "Percent. Accuracy is on held-out problems, greedily and without hints; iteration 0 is the"
        " original model. Solved and rationalized are shares of the iteration's problems; wrong inside"
        " are shares of what was kept of either that has a wrong line.",
        "",
        *table,
        "",
        f"Settings: {shots}, {settings}.",
        "",
        f"![accuracy by iteration]({FIGURE})",
    ]
    write_whole(output / REPORT, "\n".join(lines) + "\n")
    save_figure(output / FIGURE, {"": rows})


def save_figure(path: Path, runs: Mapping[str, Sequence[Row]]) -> None:
    """Accuracy by iteration: of each class where there is one run, of all problems for several."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="tight")
    axes = figure.subplots()
    for name, rows in runs.items():
        curves = {name: [row["accuracy"] for row in rows]}
        if len(runs) == 1:
            kinds = rows[0]["accuracy_by_class"]
            curves = {kind: [row["accuracy_by_class"][kind] for row in rows] for kind in kinds}
        for label, curve in curves.items():
            axes.plot([row["iteration"] for row in rows], curve, marker=".", label=label)
    axes.set(xlabel="iteration", ylabel="accuracy on held-out problems", ylim=(0, 1.02))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
