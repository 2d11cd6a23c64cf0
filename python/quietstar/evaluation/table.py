"""The results of ``quietstar eval`` as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLUMNS = {
    "base": "no thought",
    "mixed": "with thoughts",
    "gain": "difference",
    "thought": "thought alone",
    "shuffled": "shuffled",
    "pause": "pause tokens",
}


def render(results: dict[str, dict[str, Any]]) -> str:
    """All tasks' tables, one below the other."""
    parts = []
    for name, result in results.items():
        if "nll_by_decile" in result:
            parts.append(_perplexity(name, result))
        elif "probability" in result:
            parts.append(_answers(name, result))
        elif "majority" in result:
            parts.append(_chains(name, result))
        else:
            parts.append(_plain(name, result))
    return "\n\n".join(parts)


def _interval(found: dict[str, float]) -> str:
    return f"{found['mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


def _answers(name: str, result: dict[str, Any]) -> str:
    keys = [key for key in ("probability", "accuracy", "exact_match") if key in result]
    names = list(result["probability"])
    rows = [[key.replace("_", " "), *(_interval(result[key][n]) for n in names)] for key in keys]
    title = f"{name}: {result['items']} items, zero-shot, mean [95% interval]"
    if result["cut"]:
        title += f"; {result['cut']} were cut at the front to fit"
    return _grid(title, ["", *(COLUMNS[n] for n in names)], rows)


def _chains(name: str, result: dict[str, Any]) -> str:
    title = f"{name}: {result['items']} items, thinking {result['thinking']}, mean [95% interval]"
    rows = [
        [f"maj@{result['votes']}", _interval(result["majority"])],
        ["one chain", _interval(result["single_chain"])],
        ["chains without a number", f"{result['without_number']:.4f}"],
    ]
    return _grid(title, ["", "share that is right"], rows)


def _perplexity(name: str, result: dict[str, Any]) -> str:
    names = list(result["nll"])

    def with_error(found: dict[str, float | None]) -> str:
        error = found["standard_error"]
        return f"{found['mean']:.4f}" + ("" if error is None else f" ± {error:.4f}")

    rows = [["all tokens", *(with_error(result["nll"][n]) for n in names)]]
    if result["gain"]:
        gains = [with_error(result["gain"][n]) for n in names[1:]]
        rows.append(["gain over no thought", "", *gains])
    for number, decile in enumerate(result["nll_by_decile"], start=1):
        rows.append([f"decile {number}", *(f"{decile[n]['mean']:.4f}" for n in names)])
    title = (
        f"{name}: {result['tokens']} tokens in {result['blocks']} blocks; nats per token ± standard"
        " error, by decile of the loss without thought (1 easiest)"
    )
    return _grid(title, ["", *(COLUMNS[n] for n in names)], rows)


def _plain(name: str, result: dict[str, float]) -> str:
    rows = []
    for key, value in result.items():
        metric, _, kind = key.partition(",")
        if metric != "sample_len" and not metric.endswith("_stderr"):
            error = result.get(f"{metric}_stderr,{kind}")
            rows.append([metric, f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")])
    return _grid(f"{name} (lm-evaluation-harness)", ["", "value ± standard error"], rows)


def _grid(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        ).rstrip()
        for line in [head, *rows]
    ]
    return "\n".join([title, *lines])
