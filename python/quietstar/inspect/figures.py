"""Figures as inline SVG: they scale, print and load nothing."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

HELPS, HURTS, INK, FAINT = "#1f7a8c", "#d9762b", "#2b2b2b", "#d8d8d2"
_LINES = (HELPS, HURTS, "#6b5b95")
# At 72 dots per inch a point is a pixel; text stays text, in the page's font.
_STYLE: Any = {
    "figure.dpi": 72,
    "svg.fonttype": "none",
    "svg.hashsalt": "quietstar",
    "font.size": 11,
    "text.parse_math": False,
    **{"axes.titleweight": "bold", "axes.titlesize": 11, "axes.titlelocation": "left"},
    **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
    **{"axes.edgecolor": "#8a8a84", "grid.color": FAINT, "axes.axisbelow": True},
    **{"xtick.color": "#62625c", "ytick.color": "#62625c", "ytick.left": False},
}


def deciles_figure(gains: Sequence[Sequence[float]], difficulty: Sequence[tuple[float, float]]) -> str:
    """Boxes of the gains in each decile of difficulty, easiest first.

    Whiskers span the 5th to the 95th percentile, boxes the quartiles; the line is the median, the dot
    the mean.

    Args:
        gains: nats, one list per decile; difficulty: the span of base losses in each.
    """
    boxes, titles = [], {}
    for number, (gain, (low, high)) in enumerate(zip(gains, difficulty, strict=True), start=1):
        if len(gain):
            names = ("whislo", "q1", "med", "q3", "whishi")
            box = dict(zip(names, np.percentile(gain, [5, 25, 50, 75, 95]), strict=True))
            box["mean"] = np.mean(gain)
            boxes.append((number, box))
            titles[f"decile-{number}"] = (
                f"decile {number}: NLL {low:.2f} to {high:.2f}, {len(gain)} tokens;"
                f" mean gain {box['mean']:+.3f}, median {box['med']:+.3f}"
            )
    with rc_context(_STYLE):
        figure = Figure(figsize=(640 / 72, 280 / 72), layout="constrained")
        axes = figure.subplots()
        drawn = axes.bxp(
            [box for _, box in boxes],
            positions=[number for number, _ in boxes],
            widths=0.56,
            showfliers=False,
            showcaps=False,
            showmeans=True,
            patch_artist=True,
            meanprops={"marker": "o", "markersize": 6, "markerfacecolor": INK, "markeredgecolor": INK},
        )
        for at, (number, box) in enumerate(boxes):
            colour = HELPS if box["mean"] >= 0 else HURTS
            drawn["boxes"][at].set(facecolor=colour + "40", edgecolor=colour, gid=f"decile-{number}")
            for line in (drawn["medians"][at], *drawn["whiskers"][2 * at : 2 * at + 2]):
                line.set_color(colour)
        ends = [value for _, box in boxes for value in box.values()]
        _set_ticks(axes, min([0.0, *ends]), max([0.0, *ends]))
        axes.axhline(0, color="#8a8a84", linewidth=0.8, zorder=0)
        axes.set(xlim=(0.5, 10.5), xticks=range(1, 11), xticklabels=range(1, 11))
        axes.set(xlabel="difficulty decile of the token (easy to hard)", ylabel="gain (nats)")
        return _svg(figure, "Gain from thinking by difficulty of the token", titles)


def curves_figure(title: str, curves: dict[str, list[tuple[float, float]]]) -> str:
    """A small line chart of (step, value) series that share their scale."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(300 / 72, 190 / 72), layout="constrained")
        axes = figure.subplots()
        for number, ((name, curve), colour) in enumerate(zip(curves.items(), _LINES, strict=False)):
            axes.plot(*zip(*curve, strict=True), color=colour, label=name, gid=f"curve-{number}")
        values = [value for curve in curves.values() for _, value in curve]
        _set_ticks(axes, np.nanmin(values), np.nanmax(values))
        axes.set(title=title, xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if len(curves) > 1:
            axes.legend(frameon=False, labelcolor="linecolor", handlelength=1)
        return _svg(figure, title)


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers that span ``low`` to ``high``, at least two of them."""
    if high - low < 1e-9:
        high = low + max(abs(low) * 0.1, 1e-3)
    locator = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
    return [round(float(tick), 12) for tick in locator.tick_values(low, high)]


def _set_ticks(axes: Any, low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    axes.set(ylim=(ticks[0], ticks[-1]), yticks=ticks)
    axes.grid(axis="y")


def _svg(figure: Figure, name: str, titles: Mapping[str, str] | None = None) -> str:
    """The figure as an element of a page; ``titles``: tooltips by the id of their group."""
    for artist in figure.findobj():
        artist.set_clip_on(False)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    # Inside a page name spaces are known, and nothing in it shall be an address.
    unwanted = r'<metadata>.*?</metadata>| xmlns(:\w+)?="[^"]*"'
    text = re.sub(unwanted, "", file.getvalue(), flags=re.DOTALL)
    for group, told in (titles or {}).items():
        text = text.replace(f'<g id="{group}">', f'<g id="{group}"><title>{escape(told)}</title>')
    # A page holds several figures, and an id counts in all of it.
    own = f"f{zlib.crc32(name.encode()):08x}-"
    text = re.sub(r'( id="|href="#|url\(#)', rf"\1{own}", text)
    body = text.partition("<svg ")[2].replace('pt"', '"')  # points are pixels here
    return f'<svg role="img" aria-label="{escape(name)}" {body}'
