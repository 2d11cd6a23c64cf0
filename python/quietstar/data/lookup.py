"""A small language in which thinking pays: serial look-ups that are too deep for one step.

The text is a stream of items of 39 tokens: 6 states, 6 operators (each a fixed permutation of the
states), 24 filler words and three marks. Filler is easy. A problem, ``s0 o1 o2 o3 o4 ?``, is answered
by s4, where s_t = permutation[o_t](s_{t-1}): four look-ups one after the other, while a model of two
layers can do about one per token. The corpus for pre-training shows such derivations now and then in
asides between dashes; the text for Quiet-STaR never does. So the skill is in the model, but nothing
in the second text asks for it.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar.config import END_TOKEN, START_TOKEN
from quietstar.data.blocks import TokenBlocks
from quietstar.errors import UserError
from quietstar.values import typed

STATES = 6
OPERATORS = 6
FILLERS = 24
STEPS = 4

_STATE_NAMES = list("ABCDEF")
_OPERATOR_NAMES = list("uvwxyz")
_FILLER_NAMES = [
    *("the", "a", "tree", "bird", "sang", "near", "by", "old", "green", "hill", "and", "slow"),
    *("river", "ran", "under", "stone", "bridge", "while", "wind", "moved", "soft", "white"),
    *("clouds", "home"),
]
_MARKS = ["?", "—", ";"]

FIRST_OPERATOR = STATES
FIRST_FILLER = STATES + OPERATORS
ASK = FIRST_FILLER + FILLERS
DASH = ASK + 1
STOP = ASK + 2
VOCABULARY = ASK + 3

_NOTHING = -1
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TextMix:
    """What a text is made of.

    Attributes:
        problems: share of items that are problems; the others are filler.
        asides: share of problems with an aside between question and answer.
        work: share of those asides that hold the derivation; the others hold filler words.
        filler_asides: share of filler items with an aside of filler words.
        held_out: problems from the quarter that is kept from training, instead of the other three.
    """

    problems: float = 0.6
    asides: float = 0.0
    work: float = 0.0
    filler_asides: float = 0.0
    held_out: bool = False


def corpus_mix(work: float) -> TextMix:
    """The mix for pre-training: mostly asides, of which a share ``work`` are derivations."""
    return TextMix(asides=0.6, work=work, filler_asides=0.2)


class LookupLanguage:
    """One language of the family: its permutations and filler grammar, drawn from a seed."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.permutations: Ints = np.stack([rng.permutation(STATES) for _ in range(OPERATORS)])
        # Each filler word has three successors, with odds 6 : 3 : 1.
        self.successors: Ints = np.stack(
            [rng.choice(FILLERS, size=3, replace=False) for _ in range(FILLERS)]
        )

    def tokens(self, count: int, mix: TextMix, seed: int) -> Ints:
        """A stream of ``count`` tokens, [count] int64."""
        rng = np.random.default_rng([seed, 17])
        parts: list[Ints] = []
        have = 0
        while have < count:
            items = self._items(max(64, (count - have) // 7), mix, rng)
            part = items[items != _NOTHING]
            parts.append(part)
            have += len(part)
        return np.concatenate(parts)[:count]

    def blocks(self, count: int, length: int, mix: TextMix, seed: int) -> Ints:
        """``count`` blocks cut from one stream, [count, length] int64."""
        return self.tokens(count * length, mix, seed).reshape(count, length)

    def derivations(self, count: int, seed: int) -> Ints:
        """Held-out problems with their derivation in the aside, [count, 15] int64."""
        mix = TextMix(asides=1.0, work=1.0, held_out=True)
        rng = np.random.default_rng([seed, 18])
        return self._problems(count, mix, rng)[:, :15]

    def derive(self, states: Ints, operators: Ints) -> Ints:
        """s0 [count] and operators [count, 4], counted from 0 -> s0 .. s4 [count, 5]."""
        path = [states]
        for t in range(STEPS):
            path.append(self.permutations[operators[:, t], path[-1]])
        return np.stack(path, axis=1)

    def _items(self, count: int, mix: TextMix, rng: np.random.Generator) -> Ints:
        """[count, 16], each row an item, padded with -1."""
        problems, fillers = self._problems(count, mix, rng), self._fillers(count, mix, rng)
        return np.where((rng.random(count) < mix.problems)[:, None], problems, fillers)

    def _problems(self, count: int, mix: TextMix, rng: np.random.Generator) -> Ints:
        states, operators = _draw_combinations(count, mix.held_out, rng)
        trace = self.derive(states, operators)
        aside = np.where(
            (rng.random(count) < mix.work)[:, None], trace, self._words(count, STEPS + 1, rng)
        )
        dash = np.full((count, 1), DASH)
        aside = np.concatenate([dash, aside, dash], axis=1)
        aside[rng.random(count) >= mix.asides] = _NOTHING
        return _rows(
            states[:, None],
            operators + FIRST_OPERATOR,
            np.full((count, 1), ASK),
            aside,
            trace[:, -1:],
            np.full((count, 1), STOP),
        )

    def _fillers(self, count: int, mix: TextMix, rng: np.random.Generator) -> Ints:
        words = self._words(count, 8, rng)
        words[np.arange(8) >= rng.integers(3, 9, size=count)[:, None]] = _NOTHING
        dash = np.full((count, 1), DASH)
        aside = np.concatenate([dash, self._words(count, STEPS + 1, rng), dash], axis=1)
        aside[rng.random(count) >= mix.filler_asides] = _NOTHING
        return _rows(words, aside, np.full((count, 1), STOP))

    def _words(self, count: int, length: int, rng: np.random.Generator) -> Ints:
        """Filler words from the Markov chain, [count, length]."""
        word = rng.integers(0, FILLERS, size=count)
        found = [word]
        for _ in range(length - 1):
            branch = np.searchsorted([0.6, 0.9], rng.random(count), side="right")
            word = self.successors[word, branch]
            found.append(word)
        return np.stack(found, axis=1) + FIRST_FILLER


def held_out(states: Ints, operators: Ints) -> NDArray[np.bool_]:
    """Which combinations are kept from all training: a quarter, by arithmetic on the tokens."""
    mixed = states * 5 + operators @ np.array([7, 11, 13, 17])
    return (mixed + states * operators[:, 0]) % 4 == 0


def _draw_combinations(count: int, want: bool, rng: np.random.Generator) -> tuple[Ints, Ints]:
    states = np.empty(count, dtype=np.int64)
    operators = np.empty((count, STEPS), dtype=np.int64)
    todo = np.arange(count)
    while len(todo):
        states[todo] = rng.integers(0, STATES, size=len(todo))
        operators[todo] = rng.integers(0, OPERATORS, size=(len(todo), STEPS))
        todo = todo[held_out(states[todo], operators[todo]) != want]
    return states, operators


def _rows(*parts: Ints) -> Ints:
    """Join parts side by side and pad to 16 columns."""
    joined = np.concatenate(parts, axis=1)
    return np.pad(joined, ((0, 0), (0, 16 - joined.shape[1])), constant_values=_NOTHING)


def behind_question(tokens: Ints) -> NDArray[np.bool_]:
    """Which tokens stand right behind a question mark. [..., N] -> [..., N]."""
    after = np.zeros(tokens.shape, dtype=bool)
    after[..., 1:] = tokens[..., :-1] == ASK
    return after


def is_answer(tokens: Ints) -> NDArray[np.bool_]:
    """Which tokens are hard but can be known: answers whose whole problem is in view. [..., N]."""
    after = behind_question(tokens) & (tokens < STATES)
    after[..., : STEPS + 2] = False
    return after


def token_blocks(
    settings: Mapping[str, Any], block_size: int, num_blocks: int, num_eval_blocks: int
) -> tuple[TokenBlocks, TokenBlocks | None]:
    """Rows to train on and rows to evaluate on, these of held-out problems without asides.

    Args:
        settings: ``language`` (its seed), ``seed`` (of the text) and fields of :class:`TextMix`.

    Raises:
        UserError: for an unknown setting, or one of the wrong type.
    """
    known = {"language": int, "seed": int, **typing.get_type_hints(TextMix)}
    mix: dict[str, Any] = {"language": 0, "seed": 0}
    for key, value in settings.items():
        if key not in known:
            raise UserError(f"unknown key {key!r} in data.lookup; known keys: {', '.join(known)}")
        mix[key] = typed(f"data.lookup.{key}", value, known[key])
    language, seed = LookupLanguage(mix.pop("language")), mix.pop("seed")

    def rows(count: int, mix: TextMix, seed: int) -> TokenBlocks:
        tokens = language.blocks(count, block_size, mix, seed).astype(np.int32)
        return TokenBlocks(tokens, np.full(count, block_size, dtype=np.int32))

    heldout = TextMix(held_out=True)
    evaluation = rows(num_eval_blocks, heldout, seed + 1_000_000) if num_eval_blocks else None
    return rows(num_blocks, TextMix(**mix), seed), evaluation


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The language's tokenizer: a word per token, and the two meta tokens."""
    names = [*_STATE_NAMES, *_OPERATOR_NAMES, *_FILLER_NAMES, *_MARKS, START_TOKEN, END_TOKEN]
    assert len(set(names)) == VOCABULARY + 2
    # The question mark stands for anything unknown: it is in every text, and nothing else fits better.
    inner = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="?",
        eos_token=";",
        additional_special_tokens=[START_TOKEN, END_TOKEN],
    )
