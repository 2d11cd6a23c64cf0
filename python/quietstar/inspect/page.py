"""One page that shows what a model thinks in a text and what that gains.

The page needs no network and no other file. The heat map, the tables and the figures are plain HTML and
SVG; a script shows the thoughts at the token that is clicked or focused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from quietstar.evaluation.perplexity import deciles
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


def write_run_page(
    folder: Path,
    rows: Sequence[Sequence[int]],
    *,
    title: str,
    source: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """:func:`write_page` for the model in a run's folder, as ``thoughts.html`` beside the folder.

    Args:
        tokenizer: default: the folder's own.
    """
    from transformers import AutoTokenizer

    from quietstar.modeling.model import QuietStarForCausalLM

    model = QuietStarForCausalLM.from_pretrained(folder)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
    about = About(title, source, run_folder=folder)
    return write_page(model, tokenizer, rows, folder.parent / "thoughts.html", about=about)


def render_page(
    seen: Sequence[SeenToken],
    *,
    title: str,
    subtitle: str,
    curves: Sequence[tuple[str, dict[str, list[tuple[float, float]]]]] = (),
    joined: bool = False,
) -> str:
    """The page as a string. ``joined``: all rows are one text; otherwise each is a text of its own."""
    predicted = [(i, t) for i, t in enumerate(seen) if t.gain is not None]
    base, gain = np.array([(t.base, t.gain) for _, t in predicted]).T
    order = sorted(predicted, key=lambda pair: pair[1].gain or 0)
    hurt = [pair for pair in order if (pair[1].gain or 0) < 0]
    helped = [pair for pair in order[::-1] if (pair[1].gain or 0) > 0]
    facts = (
        ("NLL without thinking", f"{base.mean():.3f}", "nats per token"),
        ("NLL with thinking", f"{(base - gain).mean():.3f}", ""),
        ("gain", signed(gain.mean(), 3), ""),
        ("tokens that it helped", f"{(gain > 0).mean():.0%}", f"of {len(gain)}"),
    )
    rows = groupby(enumerate(seen), key=lambda pair: 0 if joined else pair[1].row)
    return _ENVIRONMENT.get_template("inspect.html").render(
        title=title,
        subtitle=subtitle,
        facts=facts,
        scale=_scale(gain),
        rows=[list(row) for _, row in rows],
        extremes=(
            ("helped", "plus", _in_context(helped, seen, joined)),
            ("hurt", "minus", _in_context(hurt, seen, joined)),
        ),
        deciles=gain_by_difficulty(base, gain),
        curves=[curves_figure(name, series) for name, series in curves],
        # The script's copy; four digits are what it shows.
        data=json.loads(
            json.dumps({i: asdict(t) for i, t in predicted}),
            parse_float=lambda digits: round(float(digits), 4),
        ),
        first=order[-1][0],
    )


def render_part(seen: Sequence[SeenToken], rows: Sequence[tuple[int, SeenToken]], gain: float) -> str:
    """A text and its thoughts as an element of another page: no script, and no style but its own.

    Args:
        rows: the tokens of the table of thoughts, with their places in ``seen``.
        gain: nats per token, over all of them.
    """
    return _ENVIRONMENT.get_template("notebook.html").render(
        tokens=seen,
        rows=[(before, token) for _, before, token in _in_context(rows, seen, True, len(rows))],
        gain=gain,
        scale=_scale(np.array([token.gain for token in seen if token.gain is not None])),
    )


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


def gain_by_difficulty(base: Any, gain: Any) -> str:
    """The figure of the gains in each decile of difficulty, as an SVG element.

    Args:
        base: [tokens] losses without thoughts, nats; gain: [tokens], what thinking took off them.
    """
    decile = deciles(base[None], np.ones((1, len(base)), dtype=bool))[0]
    groups = [(base[decile == d], gain[decile == d]) for d in range(10)]
    spans = [(hard.min(), hard.max()) if len(hard) else (0.0, 0.0) for hard, _ in groups]
    return deciles_figure([gains for _, gains in groups], spans)


# ---- parts of the page --------------------------------------------------------------------------


def colour(gain: float, scale: float) -> str:
    """Teal where thinking helped, orange where it hurt; full at ``scale`` nats."""
    strength = min(abs(gain) / scale, 1.0) * 0.7
    red, green, blue = (31, 122, 140) if gain >= 0 else (217, 118, 43)
    return f"rgb({red} {green} {blue} / {strength:.2f})"


def _scale(gain: Any) -> float:
    """The gain at which a colour is full, nats."""
    return max(0.1, float(np.percentile(np.abs(gain), 98)))


def _in_context(
    tokens: Sequence[tuple[int, SeenToken]], seen: Sequence[SeenToken], joined: bool, count: int = 8
) -> list[tuple[int, str, SeenToken]]:
    """The first tokens, each with its place and what stands before it in its row."""
    found = []
    for index, token in tokens[:count]:
        near = [t.text for t in seen[max(0, index - 12) : index] if joined or t.row == token.row]
        found.append((index, "".join(near)[-28:], token))
    return found


def signed(value: float, digits: int) -> str:
    """A number with its sign, which is a true minus sign."""
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def visible(text: str, *, alone: bool = False) -> str:
    """Text with visible line ends and tabs; ``alone``: with visible spaces, if there is nothing else."""
    shown = text.replace("\n", "\u21b5").replace("\t", "\u21e5")
    return shown.replace(" ", "\u2423") if alone and not text.strip() else shown


# Everything that is put in is escaped, but for the figures; JSON so that a script element can hold it.
_ENVIRONMENT = Environment(
    loader=PackageLoader("quietstar.inspect"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
_ENVIRONMENT.filters.update(colour=colour, signed=signed, visible=visible)
