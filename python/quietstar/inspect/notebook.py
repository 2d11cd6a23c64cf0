"""Thoughts that show themselves in a notebook: a text, what was thought in it, and what that gained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from quietstar.errors import UserError
from quietstar.inspect.data import SeenToken, look, split_rows
from quietstar.inspect.page import render_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quietstar.modeling.model import QuietStarForCausalLM


@dataclass(frozen=True)
class SeenText:
    """A text as a model with thoughts reads it; a notebook shows it coloured, with its thoughts.

    Attributes:
        tokens: of the text, with both predictions and the thoughts at each.
        shown: so many tokens have a row in the table of thoughts, those that thinking helped most first.
    """

    tokens: tuple[SeenToken, ...]
    shown: int = 8

    @property
    def gain(self) -> float:
        """What thinking gained, nats per predicted token."""
        return float(np.mean([token.gain for token in self.tokens if token.gain is not None]))

    def most_helped(self) -> list[tuple[int, SeenToken]]:
        """Predicted tokens and their places, by what thinking gained there, the most first."""
        predicted = [(at, token) for at, token in enumerate(self.tokens) if token.gain is not None]
        return sorted(predicted, key=lambda pair: -(pair[1].gain or 0.0))

    def __repr__(self) -> str:
        return f"SeenText({len(self.tokens)} tokens, gain {self.gain:+.3f} nats per token)"

    def _repr_html_(self) -> str:
        """The text and its thoughts as a part of a page, without scripts; tooltips tell the losses."""
        return render_part(self.tokens, self.most_helped()[: self.shown], self.gain)


@dataclass(frozen=True)
class Gains:
    """What thinking gained, per token of a text or over many, by the difficulty of the tokens.

    Attributes:
        base, mixed: [tokens], losses without and with thoughts, nats.

    Raises:
        UserError: for losses of no token, or of different tokens, or that are not numbers.
    """

    base: Sequence[float]
    mixed: Sequence[float]

    def __post_init__(self) -> None:
        base, mixed = np.shape(self.base), np.shape(self.mixed)
        if len(base) != 1 or base != mixed or not base[0]:
            raise UserError(
                f"base and mixed have shapes {list(base)} and {list(mixed)}; expected the losses of the"
                " same tokens, [tokens], at least one"
            )
        for name, losses in (("base", self.base), ("mixed", self.mixed)):
            if not np.isfinite(losses).all():
                raise UserError(f"{name} has losses that are not finite; expected nats")

    def __repr__(self) -> str:
        gain = np.subtract(self.base, self.mixed)
        tokens = "1 token" if len(gain) == 1 else f"{len(gain)} tokens"
        return f"Gains({tokens}, mean {gain.mean():+.3f} nats, helped {(gain > 0).mean():.0%})"

    def _repr_html_(self) -> str:
        """The figure of `quietstar inspect`: boxes of the gains in each decile of difficulty."""
        from quietstar.inspect.page import gain_by_difficulty

        base = np.asarray(self.base)
        return gain_by_difficulty(base, base - np.asarray(self.mixed))


def show_thoughts(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[int] | torch.Tensor,
    *,
    samples: int = 2,
    shown: int = 8,
    seed: int = 0,
) -> SeenText:
    """Read a text with thoughts, for a notebook to show.

    Args:
        text: a text, or the ids of one [N] int64; at most as long as the model reads at once.
        samples: thoughts sampled at every token, beside the most likely one.
        shown: rows of the table of thoughts.

    Raises:
        UserError: for a model without thoughts, or a text of fewer than ``talk_length + 2`` tokens.
    """
    if not hasattr(model.config, "thinks"):
        raise UserError(f"model is a {type(model).__name__}; expected a model with thoughts")
    given = torch.as_tensor(tokenizer(text)["input_ids"] if isinstance(text, str) else text)
    if given.dim() != 1:
        raise UserError(f"text has shape {list(given.shape)}; expected the ids [N] of one text")
    ids: list[int] = given.tolist()
    shortest = model.config.talk_length + 2
    if len(ids) < shortest:
        raise UserError(f"text has {len(ids)} tokens; expected at least {shortest} (talk_length + 2)")
    (row,) = split_rows(ids, len(ids), shortest)
    return SeenText(tuple(look(model, tokenizer, [row], samples=samples, seed=seed)), shown)
