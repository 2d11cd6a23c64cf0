"""More problems to train on: the words of one, its numbers drawn anew, and the answer that follows.

600 problems are known by heart after a few epochs, and what the model then thinks of them is no sample
of what it would think of others. Numbers keep their order and their count of digits, so that a problem
stays as hard and as sensible as it was.
"""

from __future__ import annotations

import ast
import json
import operator
import random
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

# A problem in the layout of SVAMP: Body, Question, Equation ("( 43.0 - 21.0 )"), Answer.
Problem = dict[str, Any]
NUMBER = re.compile(r"\d+(?:\.\d+)?")
# Of a division of three digits by two, one draw in fifty has no remainder.
TRIES = 500
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
_OPERATORS[ast.Div] = operator.truediv


def value_of(equation: str) -> Fraction:
    """What an equation of numbers, + - * / and parentheses comes to.

    Raises:
        ValueError: for any other equation; ZeroDivisionError.
    """
    try:
        return _value(ast.parse(equation.strip(), mode="eval").body)
    except (SyntaxError, KeyError) as error:
        raise ValueError(
            f"equation is {equation!r}; expected numbers, + - * / and parentheses"
        ) from error


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        found: Fraction = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
        return found
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))
    raise KeyError(type(node))


def varied(problem: Problem, draw: random.Random) -> Problem | None:
    """The problem with other numbers; None where its equation has numbers that its text does not, or no
    numbers were found with which the answer is a whole one of as many digits at most."""
    text = {key: str(problem[key]) for key in ("Body", "Question")}
    equation = str(problem["Equation"])
    there = sorted({Fraction(number) for part in text.values() for number in NUMBER.findall(part)})
    if not {Fraction(number) for number in NUMBER.findall(equation)} <= set(there):
        return None
    most = 10 ** len(str(abs(int(problem["Answer"]))))
    for _ in range(TRIES):
        new = dict(zip(there, _like(there, draw), strict=True))
        other = _with(new, equation)
        try:
            answer = value_of(other)
        except ZeroDivisionError:
            continue
        if len({*new.values()}) == len(new) and answer.denominator == 1 and 0 < answer < most:
            changed = {key: _with(new, part) for key, part in text.items()}
            return {**problem, **changed, "Equation": other, "Answer": float(answer)}
    return None


def _with(new: dict[Fraction, Fraction], text: str) -> str:
    def other(found: re.Match[str]) -> str:
        number = new[Fraction(found[0])]
        return str(number) if number.denominator == 1 else found[0]

    return NUMBER.sub(other, text)


def _like(numbers: Sequence[Fraction], draw: random.Random) -> list[Fraction]:
    """As many numbers in the same order, each with the digits of its own; 0, 1 (which words agree with)
    and fractions as they are."""
    free = [number for number in numbers if number.denominator == 1 and number > 1]
    drawn = []
    for number in free:
        least = 10 ** (len(str(number)) - 1)
        drawn.append(Fraction(draw.randrange(max(least, 2), 10 * least)))
    new = dict(zip(free, sorted(drawn), strict=True))
    return [new.get(number, number) for number in numbers]


def write_varied(problems: Path, to: Path, copies: int, *, seed: int, first: bool) -> None:
    """Write variants of the problems of a file, those that cannot be varied once as they are.

    Args:
        copies: of each problem; first: the problems themselves before them.
    """
    draw = random.Random(seed)
    given = [
        json.loads(line) for line in problems.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    rows = list(given) if first else []
    for problem in given:
        made = [found for _ in range(copies) if (found := varied(problem, draw)) is not None]
        rows += made or ([] if first else [problem])
    to.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
