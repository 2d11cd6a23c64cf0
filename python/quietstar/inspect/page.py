"""One page that shows what a model thinks in a text and what that is worth.

The page needs no network and no other file. The heat map, the tables and the figures are plain HTML and
SVG; a script shows the thoughts at the token that is clicked or focused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quietstar.files import last_checkpoint, read_json
from quietstar.inspect.data import SeenToken, look
from quietstar.inspect.figures import curves_figure, deciles_figure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quietstar.modeling.model import QuietStarForCausalLM

# Title, and the entries of the training log that are drawn together by their names in the legend.
CURVES = (
    ("NLL (nats)", {"without": "base_loss", "with": "talk_loss_0"}),
    ("Gain on training text (nats)", {"gain": "gain"}),
    ("Mixing weight", {"hard tokens": "mixing_weight_hard", "easy": "mixing_weight_easy"}),
    ("Entropy of thoughts (nats per token)", {"entropy": "thought_entropy"}),
)


@dataclass(frozen=True)
class About:
    """What a page says beside what was seen.

    Attributes:
        title, source: of the page, and where the text came from.
        run_folder: where to look for training curves (the Trainer's ``trainer_state.json``).
    """

    title: str = "What thinking gained"
    source: str = ""
    run_folder: str | Path | None = None


ABOUT_NOTHING = About()


def write_page(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    path: str | Path,
    *,
    about: About = ABOUT_NOTHING,
    samples: int = 3,
    seed: int = 0,
    overlap: bool = False,
) -> Path:
    """Look at ``rows`` and write the page.

    Args:
        rows: token ids, each row a text of at least ``talk_length + 2`` tokens.
        path: of the page; an existing file is replaced.
        samples: thoughts sampled per token, beside the most likely one.
        overlap: each row begins with the last token of the one before, which is shown once.

    Raises:
        UserError: for a model without thoughts, or a row that is too short.
    """
    seen = look(model, tokenizer, rows, samples=samples, seed=seed)
    if overlap:
        seen = [t for i, t in enumerate(seen) if t.base is not None or i == 0]
    config = model.config
    decoder: Any = config.text_config
    subtitle = (
        f"{about.source + '; ' if about.source else ''}thoughts of {config.thought_length} tokens"
        f"{' (pause tokens)' if config.thought_kind == 'pause' else ''}, {decoder.model_type}"
    )
    page = render_page(
        seen, title=about.title, subtitle=subtitle, curves=read_curves(about.run_folder), joined=overlap
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def render_page(
    seen: Sequence[SeenToken],
    *,
    title: str,
    subtitle: str,
    curves: Sequence[tuple[str, dict[str, list[tuple[float, float]]]]] = (),
    joined: bool = False,
) -> str:
    """The page as a string. ``joined``: all rows are one text, not texts of their own."""
    base = np.array([t.base for t in seen if t.base is not None])
    gain = np.array([t.gain for t in seen if t.gain is not None])
    scale = max(0.1, float(np.percentile(np.abs(gain), 98)))
    order = sorted(
        (i for i, t in enumerate(seen) if t.gain is not None), key=lambda i: seen[i].gain or 0
    )
    drawn = [curves_figure(name, series) for name, series in curves]
    fields = {
        "title": escape(title),
        "subtitle": escape(subtitle),
        "facts": _facts(base, gain),
        "scale": f"{scale:.2f}",
        "minus_scale": f"\u2212{scale:.2f}",
        "text": _heat_map(seen, scale, joined),
        "extremes": _extremes("helped", order[::-1], seen, joined)
        + _extremes("hurt", order, seen, joined),
        "deciles": _deciles(base, gain),
        "curves": f'<h2>Training</h2><div class="curves">{"".join(drawn)}</div>' if drawn else "",
        "data": _json_in_html({i: _plain(t) for i, t in enumerate(seen) if t.base is not None}),
        "notable": f"{scale / 4:.4f}",
        "first": str(order[-1]),
    }
    template = files("quietstar").joinpath("inspect/templates/inspect.html").read_text(encoding="utf-8")
    # One pass, so that nothing that was put in is looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match.group(1)], template)


def read_curves(run_folder: str | Path | None) -> list[tuple[str, dict[str, list[tuple[float, float]]]]]:
    """The training log of a run's folder or of one of its checkpoints; empty if there is none."""
    if run_folder is None or not Path(run_folder).is_dir():
        return []
    folder = Path(run_folder)
    if not (folder / "trainer_state.json").is_file():
        checkpoint = last_checkpoint(folder)
        if checkpoint is None:
            return []
        folder = checkpoint
    log = read_json(folder / "trainer_state.json").get("log_history", [])
    found = []
    for title, names in CURVES:
        series = {
            label: [(float(e["step"]), float(e[key])) for e in log if key in e and "step" in e]
            for label, key in names.items()
        }
        series = {n: [p for p in c if math.isfinite(p[1])] for n, c in series.items()}
        series = {label: curve for label, curve in series.items() if len(curve) > 1}
        if series:
            found.append((title, series))
    return found


# ---- parts of the page --------------------------------------------------------------------------


def _facts(base: Any, gain: Any) -> str:
    entries = [
        ("NLL without thinking", f"{base.mean():.3f}", "nats per token"),
        ("NLL with thinking", f"{(base - gain).mean():.3f}", ""),
        ("gain", _signed(gain.mean(), 3), ""),
        ("tokens that it helped", f"{(gain > 0).mean():.0%}", f"of {len(gain)}"),
    ]
    return "".join(
        f"<div><dt>{name}</dt><dd>{value} <small>{unit}</small></dd></div>"
        for name, value, unit in entries
    )


def _heat_map(seen: Sequence[SeenToken], scale: float, joined: bool) -> str:
    parts, row = ['<p class="text">'], 0
    for index, token in enumerate(seen):
        if token.row != row and not joined:
            parts.append('</p><p class="text">')
        row = token.row
        shown = escape(token.text).replace("\n", '<span class="nl">\u21b5</span>\n')
        if token.gain is None:
            parts.append(f"<span>{shown}</span>")
            continue
        told = f"gain {token.gain:+.3f} nats"
        parts.append(
            f'<span class="t" role="button" tabindex="-1" data-i="{index}" title="{told}"'
            f' style="background:{colour(token.gain, scale)}">{shown}</span>'
        )
    parts.append("</p>")
    return "".join(parts)


def colour(gain: float, scale: float) -> str:
    """Teal where thinking helped, orange where it hurt; full at ``scale`` nats."""
    strength = min(abs(gain) / scale, 1.0) * 0.7
    red, green, blue = (31, 122, 140) if gain >= 0 else (217, 118, 43)
    return f"rgb({red} {green} {blue} / {strength:.2f})"


def _extremes(
    word: str, order: Sequence[int], seen: Sequence[SeenToken], joined: bool, count: int = 8
) -> str:
    """The tokens with the largest or smallest gains, each in its context, with its thought."""
    lines = []
    tone = "plus" if word == "helped" else "minus"
    for index in order[:count]:
        token = seen[index]
        gain = token.gain if word == "helped" else -(token.gain or 0.0)
        if not gain or gain < 0:
            break
        near = [t.text for t in seen[max(0, index - 12) : index] if joined or t.row == token.row]
        before = "".join(near)[-28:]
        thought = token.thoughts[0].text if token.thoughts else "\u2013"
        lines.append(
            f'<tr><td class="w"><button type="button" class="go" data-i="{index}">'
            f"{escape(_visible(before))}<b>{escape(_visible(token.text, alone=True))}</b></button></td>"
            f'<td class="w">{escape(_visible(thought))}</td>'
            f'<td class="n">{_signed(token.weight or 0.0, 2)}</td>'
            f'<td class="n {tone}">{_signed(token.gain or 0.0, 3)}</td></tr>'
        )
    if not lines:
        lines.append('<tr><td colspan="4">nowhere</td></tr>')
    return (
        f"<div><h3>It {word} most</h3><table><thead><tr><th>token in its context</th><th>thought</th>"
        f'<th class="n">weight</th><th class="n">gain</th></tr></thead><tbody>{"".join(lines)}</tbody>'
        "</table></div>"
    )


def _deciles(base: Any, gain: Any) -> str:
    from quietstar.evaluation.perplexity import deciles

    decile = deciles(base[None], np.ones((1, len(base)), dtype=bool))[0]
    groups = [gain[decile == d].tolist() for d in range(10)]
    spans = [
        (float(base[decile == d].min()), float(base[decile == d].max()))
        if (decile == d).any()
        else (0, 0)
        for d in range(10)
    ]
    return deciles_figure(groups, spans)


def _plain(token: SeenToken) -> dict[str, Any]:
    def short(value: float | None) -> float | None:
        return None if value is None else round(value, 4)

    return {
        "text": token.text,
        "base": short(token.base),
        "mixed": short(token.mixed),
        "weight": short(token.weight),
        "top_base": [[word, short(chance), true] for word, chance, true in token.top_base],
        "top_mixed": [[word, short(chance), true] for word, chance, true in token.top_mixed],
        "thoughts": [
            {
                "text": t.text,
                "kind": t.kind,
                "gain": short(t.gain),
                "weight": short(t.weight),
                "reward": short(t.reward),
            }
            for t in token.thoughts
        ],
    }


def _json_in_html(content: Any) -> str:
    """JSON that a script element can hold whatever the text says, ``</script>`` included."""
    plain = json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def _visible(text: str, *, alone: bool = False) -> str:
    """Line ends and tabs as signs; spaces too where nothing else would be seen (``alone``)."""
    shown = text.replace("\n", "\u21b5").replace("\t", "\u21e5")
    return shown.replace(" ", "\u2423") if alone and not text.strip() else shown
