"""Figures as inline SVG: they scale, print and need nothing from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

HELPS, HURTS, INK, FAINT = "#1f7a8c", "#d9762b", "#2b2b2b", "#d8d8d2"
_LINES = (HELPS, HURTS, "#6b5b95")


def deciles_figure(gains: Sequence[Sequence[float]], difficulty: Sequence[tuple[float, float]]) -> str:
    """Boxes of the gains in each decile of difficulty, easiest first.

    Whiskers span the 5th to the 95th percentile, boxes the quartiles; the line is the median, the dot
    the mean.

    Args:
        gains: nats, one list per decile; difficulty: the span of base losses in each.
    """
    width, height, left, bottom, top = 640, 280, 52, 46, 14
    spans = [np.percentile(g, [5, 25, 50, 75, 95]) if len(g) else None for g in gains]
    means = [float(np.mean(g)) if len(g) else None for g in gains]
    extremes = [v for span in spans if span is not None for v in (span[0], span[-1])]
    ticks = nice_ticks(
        min([0.0, *extremes, *(m for m in means if m is not None)]),
        max([0.0, *extremes, *(m for m in means if m is not None)]),
    )
    low, high = ticks[0], ticks[-1]

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * (height - top - bottom)

    parts = [_open(width, height, "Gain from thinking by difficulty of the token")]
    for tick in ticks:
        parts.append(_grid(left, width - 8, y(tick), _number(tick), strong=tick == 0))
    step = (width - 8 - left) / 10
    for index, (span, mean) in enumerate(zip(spans, means, strict=True)):
        centre = left + step * (index + 0.5)
        parts.append(_label(centre, height - bottom + 16, str(index + 1)))
        if span is None or mean is None:
            continue
        p5, p25, p50, p75, p95 = (y(float(v)) for v in span)
        colour = HELPS if mean >= 0 else HURTS
        low_edge, high_edge = difficulty[index]
        told = (
            f"decile {index + 1}: NLL {low_edge:.2f} to {high_edge:.2f}, {len(gains[index])} tokens;"
            f" mean gain {mean:+.3f}, median {span[2]:+.3f}"
        )
        half = step * 0.28
        parts.append(
            f"<g><title>{escape(told)}</title>"
            f'<line x1="{centre:.1f}" x2="{centre:.1f}" y1="{p5:.1f}" y2="{p95:.1f}" stroke="{colour}"/>'
            f'<rect x="{centre - half:.1f}" y="{p75:.1f}" width="{2 * half:.1f}"'
            f' height="{max(p25 - p75, 1):.1f}" fill="{colour}" fill-opacity="0.25" stroke="{colour}"/>'
            f'<line x1="{centre - half:.1f}" x2="{centre + half:.1f}" y1="{p50:.1f}" y2="{p50:.1f}"'
            f' stroke="{colour}" stroke-width="2"/>'
            f'<circle cx="{centre:.1f}" cy="{y(mean):.1f}" r="3.2" fill="{INK}"/></g>'
        )
    parts.append(_label((left + width) / 2, height - 8, "difficulty decile of the token (easy to hard)"))
    parts.append(
        f'<text transform="translate(12 {(height - bottom + top) / 2:.0f}) rotate(-90)"'
        f' text-anchor="middle">gain (nats)</text></svg>'
    )
    return "".join(parts)


def curves_figure(title: str, curves: dict[str, list[tuple[float, float]]]) -> str:
    """A small line chart of (step, value) series that share their scale."""
    width, height, left, bottom, top = 300, 190, 48, 38, 26
    points = [p for curve in curves.values() for p in curve if all(math.isfinite(v) for v in p)]
    ticks = nice_ticks(min(v for _, v in points), max(v for _, v in points))
    first, last = min(s for s, _ in points), max(s for s, _ in points)

    def place(step: float, value: float) -> str:
        x = left + (step - first) / ((last - first) or 1) * (width - 10 - left)
        share = (ticks[-1] - value) / (ticks[-1] - ticks[0])
        return f"{x:.1f},{top + share * (height - top - bottom):.1f}"

    parts = [_open(width, height, title)]
    parts.append(f'<text x="{left}" y="14" class="title">{escape(title)}</text>')
    for tick in ticks:
        height_of = float(place(first, tick).split(",")[1])
        parts.append(_grid(left, width - 10, height_of, _number(tick), strong=tick == 0))
    for (_, curve), colour in zip(curves.items(), _LINES, strict=False):
        line = " ".join(place(s, v) for s, v in curve if math.isfinite(v))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
    if len(curves) > 1:
        x = width - 10.0
        for name, colour in reversed(list(zip(curves, _LINES, strict=False))):
            parts.append(
                f'<text x="{x:.0f}" y="14" text-anchor="end" fill="{colour}">{escape(name)}</text>'
            )
            x -= 6.2 * len(name) + 12
    parts.append(
        _label(left, height - 22, _number(first)) + _label(width - 16, height - 22, _number(last))
    )
    parts.append(_label((left + width) / 2, height - 8, "step") + "</svg>")
    return "".join(parts)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span ``low`` to ``high``, at least two of them."""
    if high - low < 1e-9:
        high = low + max(abs(low) * 0.1, 1e-3)
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _open(width: int, height: int, name: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
        f' aria-label="{escape(name)}">'
    )


def _grid(x1: float, x2: float, y: float, text: str, *, strong: bool) -> str:
    colour = "#8a8a84" if strong else FAINT
    return (
        f'<line x1="{x1}" x2="{x2}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-width="0.8"/>'
        f'<text x="{x1 - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>'
    )


def _label(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:.6g}".replace("-", "\u2212")
