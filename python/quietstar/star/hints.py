"""The answer as a hint in a prompt, for problems that a model did not solve.

Every prompt ends with a line that asks for the answer (``A:``); before that line a hint has its place.
"""

from __future__ import annotations

import re

from quietstar.errors import UserError
from quietstar.recipes.star_section import Hint

MARK = "(CORRECT)"


def hinted(kind: Hint, prompt: str, answer: str) -> str:
    """The prompt with the answer in it.

    Raises:
        UserError: where the prompt has no place for it.
    """
    if kind == "choice":
        return _mark_choice(prompt, answer)
    body = prompt.rstrip("\n")
    before, line_break, asks = body.rpartition("\n")
    if not before.strip():
        raise UserError(
            f"star.hint is {kind!r} and the prompt {prompt!r:.80} has one line; expected a last line of"
            " its own that asks for the answer, before which the hint has its place"
        )
    hint = f" ({answer})" if kind == "question" else f"\n{answer}"
    return f"{before}{hint}{line_break}{asks}{prompt[len(body) :]}"


def _mark_choice(prompt: str, answer: str) -> str:
    choice = re.compile(rf"^(\({re.escape(answer)}\) .*)$", re.MULTILINE)
    found = list(choice.finditer(prompt))
    if not found:
        raise UserError(
            f"star.hint is 'choice' and the prompt {prompt!r:.80} has no line that begins with"
            f" ({answer}); expected a line for each choice, as the format choices writes them"
        )
    end = found[-1].end()
    return f"{prompt[:end].rstrip()} {MARK}{prompt[end:]}"
