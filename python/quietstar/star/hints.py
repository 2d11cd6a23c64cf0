"""The answer as a hint in a prompt, for problems that a model did not solve.

Every prompt ends with a line that asks for the answer (``A:``); before that line a hint has its place.
"""

from __future__ import annotations

import re

from quietstar.errors import UserError
from quietstar.recipes.star_section import Hint

MARK = "(CORRECT)"
# Between a question and the line that asks for the answer.
_BLANK_LINES = re.compile(r"(?:\s*\n\s*|\r)\Z")


def hinted(kind: Hint, prompt: str, answer: str) -> str:
    """The prompt with the answer in it.

    Raises:
        UserError: where the prompt has no place for it.
    """
    if kind == "choice":
        return _mark_choice(prompt, answer)
    body = prompt.rstrip()
    before, _, asks = body.rpartition("\n")
    before = _BLANK_LINES.sub("", before)
    if not before.strip():
        raise UserError(
            f"star.hint is {kind!r} and the prompt {prompt!r:.80} has one line; expected a last line of"
            " its own that asks for the answer, before which the hint has its place"
        )
    if kind == "question":
        return f"{before} ({answer}){prompt[len(before) :]}"
    place = len(body) - len(asks)
    return f"{prompt[:place]}{answer}\n{prompt[place:]}"


def _mark_choice(prompt: str, answer: str) -> str:
    # "(B) wood"; else "B) wood" or "B. wood". Letters may be small, as in STaR's own prompts.
    letter = re.escape(answer)
    found: list[re.Match[str]] = []
    for label in (rf"\({letter}\)", rf"{letter}[).]"):
        choice = re.compile(rf"^[ \t]*{label}[ \t]+\S.*$", re.MULTILINE | re.IGNORECASE)
        found = found or list(choice.finditer(prompt))
    if not found:
        raise UserError(
            f"star.hint is 'choice' and the prompt {prompt!r:.80} has no line that begins with"
            f" ({answer}); expected a line for each choice, as the format choices writes them"
        )
    end = found[-1].end()
    return f"{prompt[:end].rstrip()} {MARK}{prompt[end:]}"
