"""The answer in a completion: of the data or of a model, found in the same way."""

from __future__ import annotations

import re
from collections.abc import Callable

from quietstar.data.sums import CLOSE
from quietstar.data.templates import Unfit, number
from quietstar.recipes.star_section import EXTRACTORS, REGEX

Extractor = Callable[[str], str | None]

# A minus behind a number, a word or a bracket takes away, as in 10-7.
_NUMBER = re.compile(r"(?:(?<![\w.)\]])-[$€£]?)?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+(?!\w))?")
# A number alone but for currency, percent, a unit of one or two words, a mark at the end.
_UNIT = r"\s*[%$€£]|\s+(?!.*(?:hundred|thousand|illion|dozen))[A-Za-z]+(?: [A-Za-z]+)?"
_FIGURE = re.compile(rf"(-?)[$€£]?\s*(-?[\d.,]*\d)(?:{_UNIT})?[.!]?")
# Between thousands, beside the comma.
_GAP = re.compile(r"(?<=\d)[\u00a0\u2009\u202f'\u2019](?=\d{3}(?!\d))")
_MINUS = "\u2212"
_IN_BRACKETS = re.compile(r"\(([A-Ea-e])\)")
# "A dog": an article.
_ALONE = re.compile(r"(?<!\w)(?<!\w')(A(?! +[a-z])|[B-E])(?!\w|'\w)")
# The letter itself, or the first in brackets of the same sentence: "the answer is wood (B)".
_SAID = re.compile(
    r"\b[Aa]nswer(?:\s+is(?!\s+not\b)\s*:?|\s*:)(?:\s*([A-E])(?![\w'])|[^.\n()]*\(([A-Ea-e])\))"
)


def last_number(text: str) -> str | None:
    """The last number, in digits: ``70,000`` is 70000 and ``51.0`` is 51; the 7 of ``10-7`` is one."""
    found = _NUMBER.findall(_even(text))
    return _plain(found[-1]) if found else None


def behind_mark(text: str) -> str | None:
    """What stands on the line behind the last ``####``; a number in digits, without its unit."""
    _, mark, rest = text.rpartition("####")
    answer = rest.strip().partition("\n")[0].strip()
    return _plain(answer) if mark and answer else None


def last_letter(text: str) -> str | None:
    """The letter, A to E, behind "answer is"; else the last in brackets; else the last alone."""
    said = [alone or inside for alone, inside in _SAID.findall(text)]
    found = said or _IN_BRACKETS.findall(text) or _ALONE.findall(text)
    return found[-1].upper() if found else None


def last_line(text: str) -> str | None:
    """The last line that is not blank."""
    return text.strip().rpartition("\n")[2].strip() or None


def behind_scratchpad(text: str) -> str | None:
    """What stands behind ``</scratch>``."""
    _, mark, answer = text.rpartition(CLOSE)
    return (answer.strip() or None) if mark else None


_KNOWN: dict[str, Extractor] = dict(
    zip(EXTRACTORS, (behind_mark, last_letter, last_number, last_line, behind_scratchpad), strict=True)
)


def extractor(name: str) -> Extractor:
    """The function that ``star.answer`` names; None is what it returns where there is no answer."""
    if not name.startswith(REGEX):
        return _KNOWN[name]
    pattern = re.compile(name.removeprefix(REGEX))

    def last_match(text: str) -> str | None:
        found = pattern.findall(text)
        return (found[-1].strip() or None) if found else None

    return last_match


def _even(text: str) -> str:
    """With one minus, and without gaps between thousands."""
    return _GAP.sub("", text.replace(_MINUS, "-"))


def _plain(text: str) -> str:
    bare = _even(text.strip("*_` "))  # Markdown's marks
    found = _FIGURE.fullmatch(bare)
    try:
        return number(f"{found[1]}{found[2]}" if found else bare.replace("$", ""))
    except Unfit:
        return text
