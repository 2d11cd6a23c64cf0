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

from quietstar.data.templates import equation as spelled
from quietstar.errors import UserError
from quietstar.files import write_whole

# A problem in the layout of SVAMP; an equation is "( 43.0 - 21.0 )".
Problem = dict[str, Any]
COLUMNS = ("Body", "Question", "Equation", "Answer")
NUMBER = re.compile(r"\d+(?:\.\d+)?")
# Of a division of three digits by two, one draw in fifty has no remainder.
TRIES = 500
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
_OPERATORS[ast.Div] = operator.truediv


def values_of(equation: str) -> list[Fraction]:
    """What the parts of an equation of numbers, + - * / and parentheses come to; the whole one's last.

    Raises:
        ValueError: for any other equation; ZeroDivisionError.
    """
    found: list[Fraction] = []
    try:
        _value(ast.parse(equation.strip(), mode="eval").body, found)
    except (SyntaxError, KeyError) as error:
        expected = "expected numbers, + - * / and parentheses"
        raise ValueError(f"equation is {equation!r}; {expected}") from error
    return found


def _value(node: ast.expr, found: list[Fraction]) -> Fraction:
    if isinstance(node, ast.BinOp):
        operation = _OPERATORS[type(node.op)]
        found.append(operation(_value(node.left, found), _value(node.right, found)))
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        found.append(Fraction(str(node.value)))
    else:
        raise KeyError(type(node))
    return found[-1]


def varied(problem: Problem, draw: random.Random) -> Problem | None:
    """The problem with other numbers; None where its equation has numbers that its text does not, or no
    numbers were found with which the answer, and what leads to it, is a whole number, the answer of as
    many digits at most."""
    text = {key: str(problem[key]) for key in ("Body", "Question")}
    equation = str(problem["Equation"])
    there = sorted({Fraction(number) for part in text.values() for number in NUMBER.findall(part)})
    if not {Fraction(number) for number in NUMBER.findall(equation)} <= set(there):
        return None
    most = 10 ** len(str(abs(int(Fraction(str(problem["Answer"]))))))
    for _ in range(TRIES):
        new = dict(zip(there, _like(there, draw), strict=True))
        other = _with(new, equation)
        try:
            values = values_of(other)
        except ZeroDivisionError:
            continue
        answer, whole = values[-1], all(value.denominator == 1 for value in values)
        if len({*new.values()}) == len(new) and whole and 0 < answer < most:
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


def read_problems(file: Path) -> list[Problem]:
    """The rows of a jsonl file.

    Raises:
        UserError: names the line that is no problem.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            missing = [column for column in COLUMNS if column not in row]
            Fraction(str(row.get("Answer", 0)))
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{file}, line {number}, is no problem of SVAMP's: {error}") from error
        if missing:
            raise UserError(f"{file}, line {number}, has no {missing[0]}; expected {', '.join(COLUMNS)}")
        found.append(row)
    return found


def write_varied(problems: Sequence[Problem], to: Path, copies: int, *, seed: int, first: bool) -> None:
    """Write variants of problems, of those that cannot be varied once themselves.

    Args:
        copies: of each problem; first: the problems themselves before them.
    """
    draw = random.Random(seed)
    rows = list(problems) if first else []
    for problem in problems:
        made = [found for _ in range(copies) if (found := varied(problem, draw)) is not None]
        rows += made or ([] if first else [problem])
    write_whole(to, "".join(json.dumps(row) + "\n" for row in rows))


def write_drills(problems: Sequence[Problem], to: Path, copies: int, *, seed: int) -> None:
    """Write problems that ask for what other problems' equations come to, with other numbers: the words
    of a problem say what to calculate, and a small model is as often wrong in how.

    Args:
        copies: of each problem's equation.
    """
    draw = random.Random(seed)
    made = [varied(problem, draw) for problem in problems for _ in range(copies)]
    rows = [
        {**each, "Body": "Calculate", "Question": f"How much is {spelled(each['Equation'])}?"}
        for each in made
        if each is not None
    ]
    write_whole(to, "".join(json.dumps(row) + "\n" for row in rows))
