"""Sums with a scratchpad: n-digit addition, worked digit by digit, as in STaR (arXiv 2203.14465).

    Input:
    6 2 4 + 2 5 9
    Target:
    <scratch>
    6 2 4 + 2 5 9 , C: 0
    6 2 + 2 5 , 3 C: 1
    6 + 2 , 8 3 C: 0
    , 8 8 3 C: 0
    0 8 8 3
    </scratch>
    8 8 3

The prompt ends behind ``<scratch>``. Without that line the answer follows at once; with a hint the
answer stands on a line before it. A tenth of the sums of two and more digits is held out from everything
but tests; of one digit there are a hundred, and all of them are seen.

:func:`corpus` is what a base model learns from: it has seen answers explained (hinted scratchpads) for
larger numbers than it has seen them worked out.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar.config import END_TOKEN, START_TOKEN

END_OF_TEXT = "<end>"
OPEN, CLOSE = "<scratch>", "</scratch>"
_WORDS = ["?", "\n", "Input:", "Target:", "Repeat:", OPEN, CLOSE, "+", ",", "C:"]
# Sums of each digit count in the pool of solved examples, the paper's few-shot examples.
POOL = 50


class Sum(NamedTuple):
    """Two numbers of ``digits`` digits each."""

    a: int
    b: int
    digits: int

    @property
    def name(self) -> str:
        """The sum as one writes it."""
        return f"{self.a}+{self.b}"

    @property
    def answer(self) -> str:
        """Its result, digits apart."""
        return apart(self.a + self.b)


def apart(number: int | str) -> str:
    """A number's digits with spaces between them."""
    return " ".join(str(number))


def held_out(a: int, b: int) -> bool:
    """Whether a sum of several digits is kept for tests."""
    return zlib.crc32(f"{a}+{b}".encode()) % 10 == 0


def all_of_one_digit() -> list[Sum]:
    """The hundred sums of one digit."""
    return [Sum(a, b, 1) for a in range(10) for b in range(10)]


def draw(rng: np.random.Generator, digits: int, count: int, *, test: bool = False) -> list[Sum]:
    """Random sums, from those held out or from the others."""
    low, high = (10 ** (digits - 1), 10**digits) if digits > 1 else (0, 10)
    found: list[Sum] = []
    while len(found) < count:
        a, b = (int(n) for n in rng.integers(low, high, size=2))
        if digits == 1 or held_out(a, b) == test:
            found.append(Sum(a, b, digits))
    return found


def question(problem: Sum, task: str = "Target:") -> str:
    """The lines before the answer."""
    return f"Input:\n{apart(problem.a)} + {apart(problem.b)}\n{task}\n"


def scratch_prompt(problem: Sum) -> str:
    """The prompt behind which the scratchpad is written."""
    return f"{question(problem)}{OPEN}\n"


def hinted_prompt(problem: Sum) -> str:
    """The same with the answer before it."""
    return f"{question(problem)}{problem.answer}\n{OPEN}\n"


def scratchpad(problem: Sum) -> list[str]:
    """The lines of a right scratchpad, without the marks around it."""
    left, right = str(problem.a), str(problem.b)
    carry, result, lines = 0, "", []
    for done in range(problem.digits + 1):
        rest = problem.digits - done
        terms = f"{apart(left[:rest])} + {apart(right[:rest])} " if rest else ""
        lines.append(f"{terms}, {apart(result)}{' ' if result else ''}C: {carry}")
        if rest:
            carry, digit = divmod(int(left[rest - 1]) + int(right[rest - 1]) + carry, 10)
            result = f"{digit}{result}"
    return [*lines, f"{carry} {apart(result)}"]


def worked(problem: Sum) -> str:
    """What is to be written behind :func:`scratch_prompt`: scratchpad and answer."""
    return "\n".join([*scratchpad(problem), CLOSE, problem.answer])


def wrong_line(problem: Sum, completion: str) -> int | None:
    """The first line of a scratchpad that is not as it should be, from 1; None: all are right."""
    written, right = completion.strip().split("\n"), worked(problem).split("\n")
    for number, line in enumerate(right, start=1):
        if number > len(written) or written[number - 1].strip() != line:
            return number
    return None if len(written) == len(right) else len(right) + 1


class Pair(NamedTuple):
    """A prompt and its completion."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class CorpusMix:
    """What a corpus is made of.

    Attributes:
        answers, worked, explained: relative shares of answers without a scratchpad, scratchpads, and
            scratchpads whose answer stands in the prompt; each with the relative shares of its numbers
            of digits, from 1.
        repeated: share of prompts that ask for a scratchpad's first line alone, of up to
            ``repeated_digits`` digits: so that a sum can be copied, whatever its length.
        pool: share of solved sums of up to ``pool_digits`` digits that come from a small pool.
    """

    answers: tuple[float, ...] = (0.6, 0.4)
    worked: tuple[float, ...] = (0.6, 0.4)
    explained: tuple[float, ...] = (0.5, 0.35, 0.15)
    shares: tuple[float, float, float] = (0.2, 0.4, 0.4)
    repeated: float = 0.15
    repeated_digits: int = 7
    pool: float = 0.1
    pool_digits: int = 5


def corpus(count: int, mix: CorpusMix, seed: int) -> Iterator[Pair]:
    """Pairs for a base model to learn from; the same for the same seed."""
    rng = np.random.default_rng([seed, 2])
    pool_rng = np.random.default_rng([seed, 1])
    pool = [problem for n in range(1, mix.pool_digits + 1) for problem in draw(pool_rng, n, POOL)]
    for _ in range(count):
        if rng.random() < mix.repeated:
            (problem,) = draw(rng, 1 + int(rng.integers(mix.repeated_digits)), 1)
            asked = question(problem, "Repeat:")
            hint = f"{problem.answer}\n" if rng.random() < 0.5 else ""
            yield Pair(f"{asked}{hint}{OPEN}\n", scratchpad(problem)[0])
            continue
        if rng.random() < mix.pool:
            problem = pool[rng.integers(len(pool))]
            kind = 1 + int(rng.integers(2))
        else:
            kind = int(rng.choice(3, p=_normal(mix.shares)))
            digits = _normal((mix.answers, mix.worked, mix.explained)[kind])
            (problem,) = draw(rng, 1 + int(rng.choice(len(digits), p=digits)), 1)
        if kind == 0:
            yield Pair(question(problem), problem.answer)
        else:
            prompt: Callable[[Sum], str] = hinted_prompt if kind == 2 else scratch_prompt
            yield Pair(prompt(problem), worked(problem))


def _normal(shares: Sequence[float]) -> np.ndarray:
    given = np.asarray(shares, dtype=float)
    return given / given.sum()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each digit, mark and line break; spaces are no tokens."""
    names = [*map(str, range(10)), *_WORDS, END_OF_TEXT, START_TOKEN, END_TOKEN]
    inner = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(Regex(" +"), "removed")]
    )
    # Spaces between tokens, none around a line break: the text as it was.
    inner.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(" \n", "\n"),
            decoders.Replace("\n ", "\n"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="?",
        eos_token=END_OF_TEXT,
        additional_special_tokens=[START_TOKEN, END_TOKEN],
    )
