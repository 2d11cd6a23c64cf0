"""Where to think: one grammar for ``think_at`` in training and ``thinking`` in generation.

A rule is a word, or a word and a number behind a colon:

- in both, ``entropy`` compares the entropies of the base prediction, and the long spelling says how:
  ``entropy-share:p`` (``think_at``) takes the share p of positions with the highest, ``entropy-nats:x``
  (``thinking``) those above x nats, as the end of a growing text has no others to compare itself with;
- ``think_at`` besides: ``all``, ``stride:k`` (every k-th token of a document), ``random:p`` (a share p);
- ``thinking`` besides: ``always``, ``never``, ``every:k`` (at every k-th new token).

``entropy:p`` and ``entropy:x`` are the short spellings: a share in ``think_at``, nats in ``thinking``.
"""

from __future__ import annotations

import math

_IN_RANGE = {"k": lambda k: k >= 1 and k.is_integer(), "p": lambda p: 0 < p <= 1, "x": lambda x: x >= 0}
# The numbers that the rules of a setting take, what a rule without a number has, and what is expected.
_RULES: dict[str, tuple[dict[str, str], float, str]] = {
    "think_at": (
        {"all": "", "stride": "k", "random": "p", "entropy": "p", "entropy-share": "p"},
        1.0,
        "'all', 'stride:k' with a whole number k >= 1, 'random:p' or 'entropy-share:p' with 0 < p <= 1",
    ),
    "thinking": (
        {"always": "", "never": "", "every": "k", "entropy": "x", "entropy-nats": "x"},
        math.nan,
        "'always', 'never', 'every:k' with a whole number k >= 1 or 'entropy-nats:x' with x >= 0",
    ),
}


def parse_rule(setting: str, text: object) -> tuple[str, float]:
    """A rule as (name, number): ``"entropy"`` for all its spellings, and 1 where a word is enough.

    Args:
        setting: ``"think_at"`` or ``"thinking"``.

    Raises:
        ValueError: names the setting and what was expected.
    """
    takes, default, expected = _RULES[setting]
    name, colon, number = str(text).partition(":")
    kind = takes.get(name)
    try:
        value = float(number) if number else default
    except ValueError:
        value = math.nan
    if kind == "" and not colon:
        return name, 1.0
    if not kind or not _IN_RANGE[kind](value):
        raise ValueError(f"{setting} is {text!r}; expected {expected}")
    return name.partition("-")[0], value
