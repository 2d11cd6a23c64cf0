"""Where to think: one grammar for ``think_at`` in training and ``thinking`` in generation.

A rule is a word, or a word and numbers behind colons:

- in both, ``entropy`` compares the entropies of the base prediction, and the long spelling says how:
  ``entropy-share:p`` (``think_at``) takes the share p of positions with the highest, ``entropy-nats:x``
  (``thinking``) those above x nats, as the end of a growing text has no others to compare itself with;
- ``think_at`` besides: ``all``, ``stride:k`` (every k-th token of a document), ``random:p`` (a share p),
  ``completion`` (before the first token of each completion that is not blank) and ``loss:x:y`` (where
  the base prediction's loss of the true next token is from x to y nats);
- ``thinking`` besides: ``always``, ``never``, ``every:k`` (at every k-th new token).

``entropy:p`` and ``entropy:x`` are the short spellings: a share in ``think_at``, nats in ``thinking``.
"""

from __future__ import annotations

import math

_IN_RANGE = {"k": lambda k: k >= 1 and k.is_integer(), "p": lambda p: 0 < p <= 1, "x": lambda x: x >= 0}
# The numbers that the rules of a setting take, what a rule without a number has, and what is expected.
_RULES: dict[str, tuple[dict[str, str], float, str]] = {
    "think_at": (
        {
            **{"all": "", "stride": "k", "random": "p", "entropy": "p", "entropy-share": "p"},
            **{"completion": "", "loss": "x:y"},
        },
        1.0,
        "'all', 'stride:k' with a whole number k >= 1, 'random:p' or 'entropy-share:p' with 0 < p <= 1,"
        " 'completion', or 'loss:x:y' with 0 <= x < y",
    ),
    "thinking": (
        {"always": "", "never": "", "every": "k", "entropy": "x", "entropy-nats": "x"},
        math.nan,
        "'always', 'never', 'every:k' with a whole number k >= 1 or 'entropy-nats:x' with x >= 0",
    ),
}
# Rules whose positions follow from the pass over the text, so that nobody knows them before.
_OF_THE_PASS = ("entropy", "loss")
# Rules that go by text behind the position.
_OF_TRAINING = ("loss", "completion")


def parse_rule(setting: str, text: object) -> tuple[str, float]:
    """A rule as (name, number): ``"entropy"`` for all its spellings, and 1 where a word is enough.

    Of ``loss`` the number is the lower bound (:func:`loss_bounds` has both).

    Args:
        setting: ``"think_at"`` or ``"thinking"``.

    Raises:
        ValueError: names the setting and what was expected.
    """
    takes, default, expected = _RULES[setting]
    name, colon, number = str(text).partition(":")
    kind = takes.get(name)
    if kind == "" and not colon:
        return name, 1.0
    if kind == "x:y":
        bounds = [_number(part, math.nan) for part in number.split(":")]
        if len(bounds) == 2 and 0 <= bounds[0] < bounds[1]:
            return name, bounds[0]
    elif kind and _IN_RANGE[kind](value := _number(number, default)):
        return name.partition("-")[0], value
    why = ""
    if setting == "thinking" and name in _OF_TRAINING:
        why = ", a rule of think_at, as generation knows no text to come"
    raise ValueError(f"{setting} is {text!r}{why}; expected {expected}")


def loss_bounds(text: str) -> tuple[float, float]:
    """Both numbers of the rule ``loss:x:y``, in nats."""
    _, low, high = text.split(":")
    return float(low), float(high)


def follows_from_the_pass(rule: str) -> bool:
    """Whether the positions that a rule of ``think_at`` takes are unknown before the text's pass."""
    return rule in _OF_THE_PASS


def _number(text: str, default: float) -> float:
    try:
        return float(text) if text else default
    except ValueError:
        return math.nan
