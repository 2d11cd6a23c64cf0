#!/usr/bin/env python
"""Draws the figures of README and docs into docs/figures; ``--check`` says which of them are outdated.

Who sees what is asked of the attention operator, advantages of the function that training uses, and
curves and thoughts are those of benchmarks/results/demo. Only the four losses in "learn" are an example.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from quietstar.config import QuietStarConfig
from quietstar.losses.rewards import advantage_of
from quietstar_ext import thought_attention

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "figures"
DEMO = ROOT / "benchmarks" / "results" / "demo" / "lookup.json"
SEED = "4"

TEXT, THOUGHT, MIXED, INK, FAINT = "#1f7a8c", "#d9762b", "#6b5b95", "#2b2b2b", "#d8d8d2"
# The same bytes each time; letters stay letters, on white, so that a dark page can show them, too.
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quietstar",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
}
# Rooms of python/quietstar from the top, as tests/house/test_import_contract.py has them.
ROOMS = (
    ("cli",),
    ("demos",),
    ("inspect", "plan", "star"),
    ("recipes",),
    ("evaluation",),
    ("training",),
    ("checkpoints",),
    ("modeling",),
    ("losses",),
    ("thinking", "data"),
)


def empty(width: float, height: float) -> tuple[Figure, Any]:
    """A figure to draw on, in inches: one unit of its axes is an inch."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes: Any, x: float, y: float, text: str, colour: str, width: float = 0.52) -> None:
    """A token's box with its middle at a place."""
    height = 0.36
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.07"
    )
    shape.set(facecolor=colour + "26", edgecolor=colour, linewidth=1.2)
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center_baseline", color=INK)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """An arrow from one place to another."""
    shape = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.2)
    axes.add_patch(shape)


def demo() -> dict[str, Any]:
    """The demo's recorded run."""
    run: dict[str, Any] = json.loads(DEMO.read_text(encoding="utf-8"))["seeds"][SEED]
    return run


def draw_thought() -> Figure:
    """One thought: text, column of slots, mixing head, and the token that both predictions are of."""
    seen = demo()["thoughts"][0]
    words, thought, answer = seen["question"].split(), seen["thought"].split(), seen["answer"]
    weight = seen["mixing_weight"]
    figure, axes = empty(7.6, 1.65)
    step, base = 0.62, 1.3
    for at, word in enumerate(words):
        box(axes, 1.25 + step * at, base, word, TEXT)
    anchor = 1.25 + step * (len(words) - 1)
    axes.text(0.1, base, "text", color=TEXT, va="center_baseline", weight="bold")
    axes.text(0.1, base - 0.95, "thought,\nsampled", color=THOUGHT, va="center", weight="bold")
    slots = ["start", *thought, "end"]
    for slot, word in enumerate(slots):
        box(axes, 1.25 + step * slot, base - 0.95, word, THOUGHT, 0.56)
    arrow(axes, (anchor, base - 0.2), (1.25, base - 0.75), THOUGHT)
    axes.text(1.0, base - 0.42, "sees the text up to here", color=THOUGHT, size=8)
    last = 1.25 + step * (len(slots) - 1)
    head, y = 6.3, base - 0.5
    box(axes, head, y, "mixing head", MIXED, 1.15)
    arrow(axes, (anchor + 0.28, base), (head - 0.3, y + 0.2), TEXT)
    arrow(axes, (last + 0.3, base - 0.95), (head - 0.3, y - 0.2), THOUGHT)
    axes.text(5.45, base + 0.02, f"{1 - weight:.2f}", color=TEXT, size=9)
    axes.text(6.1, base - 1.05, f"{weight:.2f}", color=THOUGHT, size=9)
    arrow(axes, (head + 0.6, y), (head + 0.82, y), MIXED)
    box(axes, 7.3, y, answer, MIXED, 0.36)
    return figure


def who_sees_whom(text: int, slots: int) -> torch.Tensor:
    """Which keys each slot sees, [text · slots, text + text · slots] bool, by the operator itself.

    Values are unit vectors, one for every key, so that what comes out names the keys it was made of.
    """
    keys = text + text * slots
    units = torch.eye(keys, dtype=torch.float64)
    v_text = units[None, None, :text]
    v_thought = units[text:].view(1, 1, slots, text, keys)
    q, k_text, k_thought = (torch.zeros_like(v) for v in (v_thought, v_text, v_thought))
    stop = torch.arange(1, text + 1, dtype=torch.int32)[None]
    ranges = (torch.zeros_like(stop), stop)
    out = thought_attention(q, k_text, v_text, k_thought, v_thought, *ranges, impl="reference")
    return out[0, 0].flatten(0, 1) > 0


def draw_sees() -> Figure:
    """The packed pass: which keys every row of text and of slots sees."""
    text, slots = 6, 3
    keys = text + text * slots
    sees = torch.zeros(keys, keys)
    sees[:text, :text] = torch.ones(text, text).tril()
    sees[text:] = 2 * who_sees_whom(text, slots)
    sees[text:, text:] *= 1.5
    figure = Figure(figsize=(5.6, 5.4), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for kind, colour in ((0, "#f1f1ee"), (1, TEXT), (2, THOUGHT), (3, MIXED)):
        rows, columns = (sees == kind).nonzero().T + 0.5
        axes.scatter(columns, rows, s=76, marker="s", color=colour, linewidth=0)
    axes.set(xlim=(0, keys), ylim=(keys, 0), aspect="equal")
    ticks = [text / 2, *(text + text * (slot + 0.5) for slot in range(slots))]
    names = ["text", *(f"slot {slot + 1}" for slot in range(slots))]
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)
    axes.tick_params(length=0)
    axes.set(xlabel="keys", ylabel="rows")
    for edge in range(text, keys, text):
        axes.axhline(edge, color=INK, linewidth=0.8)
        axes.axvline(edge, color=INK, linewidth=0.8)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def draw_learn() -> Figure:
    """Four thoughts of one position: what each earned, and the three advantages made of that."""
    base, after = 1.8, torch.tensor([1.9, 1.7, 0.4, 1.6])
    reward = base - after
    figure = Figure(figsize=(7.6, 2.5), facecolor="white", layout="constrained")
    panels = figure.subplots(1, 4, sharex=True, sharey=True)
    drawn = {"reward: base loss - loss": reward}
    for name in ("mean", "leave-one-out", "normalized"):
        config = QuietStarConfig(advantage=name, clamp_advantage=False, num_rationales=len(after))
        drawn[f"advantage: {name}"] = advantage_of(config, reward)
    for axes, (title, values) in zip(panels, drawn.items(), strict=True):
        colours = [TEXT if value > 0 else THOUGHT for value in values]
        axes.bar(range(1, len(values) + 1), values.tolist(), color=colours, width=0.6)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_title(title, size=8)
        axes.set_xticks(range(1, len(values) + 1))
        axes.tick_params(labelsize=8)
    panels[0].set_ylabel("nats", size=8)
    figure.supxlabel("thought", size=8)
    return figure


def draw_demo() -> Figure:
    """The demo's recorded run: accuracy by step, and by the length of thoughts."""
    run = demo()
    figure = Figure(figsize=(7.6, 2.9), facecolor="white", layout="constrained")
    by_step, by_length = figure.subplots(1, 2, sharey=True)
    arms = {
        "full": ("full Quiet-STaR", TEXT),
        "no-reinforce": ("thoughts, no REINFORCE", MIXED),
        "pause": ("pause tokens in the slots", "#8a8a84"),
        "no-thoughts": ("no thoughts", THOUGHT),
    }
    for name, (label, colour) in arms.items():
        by_step.plot(*zip(*run["accuracy_by_step"][name], strict=True), label=label, color=colour)
    by_step.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.78))
    by_step.set(xlabel="training step", ylabel="accuracy on held-out problems", ylim=(0, 1.03))
    lengths = {int(length): arm["accuracy"] for length, arm in run["by_thought_length"].items()}
    names = [str(length) for length in lengths]
    by_length.bar(names, [each["mean"] for each in lengths.values()], color=TEXT, width=0.6)
    by_length.set(xlabel="tokens in a thought")
    for axes in (by_step, by_length):
        axes.axhline(1 / 6, color="#62625c", linestyle=":", linewidth=1)
    by_length.text(-0.4, 1 / 6 + 0.2, "dotted: chance", size=8, color="#62625c")
    return figure


def draw_rooms() -> Figure:
    """The rooms of the package: each imports rooms below it only."""
    height, gap = 0.5, 0.64
    total = gap * (len(ROOMS) + 2) + 0.2
    figure, axes = empty(7.6, total)
    folder = ROOT / "python" / "quietstar"
    rows = [[(room, first_words(folder / room / "__init__.py")) for room in row] for row in ROOMS]
    rows += [[("quietstar_ext", first_words(ROOT / "quietstar_ext" / "__init__.py"))]]
    rows += [[("csrc", "C++ and CUDA kernels, without torch")]]
    for level, row in enumerate(rows):
        y = total - 0.4 - gap * level
        width = (7.4 - 0.15 * (len(row) - 1)) / len(row)
        for at, (name, words) in enumerate(row):
            x = 0.1 + at * (width + 0.15)
            shape = FancyBboxPatch((x, y - height / 2), width, height, boxstyle="round,pad=0")
            colour = MIXED if level >= len(ROOMS) else TEXT
            shape.set(facecolor=colour + "1a", edgecolor=colour)
            axes.add_patch(shape)
            axes.text(x + 0.1, y + 0.12, name, va="center", weight="bold", size=9, color=INK)
            lines = textwrap.fill(words, int(18 * width))
            axes.text(x + 0.1, y + 0.02, lines, va="top", size=7, color=INK)
        if level:
            arrow(axes, (3.8, y + gap - height / 2), (3.8, y + height / 2), "#62625c")
    return figure


def first_words(path: Path) -> str:
    """The beginning of a package's docstring, up to its first semicolon, bracket or full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = " ".join(docstring.partition("\n\n")[0].replace("``", "").split())
    return re.split(r"[.;] |[.;]$| \(", line)[0]


FIGURES: dict[str, Callable[[], Figure]] = {
    "thought": draw_thought,
    "sees": draw_sees,
    "learn": draw_learn,
    "demo": draw_demo,
    "rooms": draw_rooms,
}


def render(draw: Callable[[], Figure]) -> str:
    """A figure as SVG, without the day on which it was made."""
    with rc_context(STYLE):
        file = io.StringIO()
        draw().savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def main(words: list[str] | None = None) -> int:
    """Draw all of them, or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the files, write nothing")
    args = parser.parse_args(words)
    FOLDER.mkdir(parents=True, exist_ok=True)
    outdated = []
    for name, draw in FIGURES.items():
        path, content = FOLDER / f"{name}.svg", render(draw)
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            outdated.append(path.name)
            if not args.check:
                path.write_text(content, encoding="utf-8")
    print(f"outdated: {', '.join(outdated)}" if args.check else f"written: {', '.join(outdated)}")
    return 1 if args.check and outdated else 0


if __name__ == "__main__":
    sys.exit(main())
