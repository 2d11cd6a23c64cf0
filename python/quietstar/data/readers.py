"""What a row of a table is made into: a text, or a prompt and its completion.

A reader gives the fields of a :class:`~quietstar.data.stdlib.Document` behind its name. Templates are in
:mod:`quietstar.data.templates`; a conversation goes through the tokenizer's chat template.
"""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from quietstar.data.left_out import LeftOut, is_utf8
from quietstar.data.presets import PRESETS, Layout
from quietstar.data.tables import Place
from quietstar.data.templates import Template
from quietstar.errors import UserError, blaming, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# (text,) or (completion, prompt, whether both have their special tokens already).
Fields = tuple[Any, ...]
Completion = str | Sequence[str | Mapping[str, Any]]


class RowReader(ABC):
    """Makes documents of rows.

    Attributes:
        columns: those that a row must have; None: the reader looks for itself.
        kind: what a column is called in an error.
        reads_text: whether a plain text is a document, too.
    """

    columns: list[str] | None = None
    kind = "column"
    reads_text = False

    @abstractmethod
    def read(self, row: Mapping[str, Any], where: object, left_out: LeftOut) -> Fields | None:
        """The fields of a row's document; None: it cannot be used, and was left out."""


class TextColumn(RowReader):
    """A row is a text, which one of its columns holds."""

    kind = "text column"
    reads_text = True

    def __init__(self, column: str):
        self.column, self.columns = column, [column]

    def read(self, row: Mapping[str, Any], where: object, left_out: LeftOut) -> Fields | None:
        text = left_out.text_of(row[self.column], self.column, where)
        return None if text is None else (text,)


class PairReader(RowReader):
    """A row is a prompt and its completion.

    Args:
        lenient: once a row could be used, those that cannot be are left out with a warning: for streams,
            whose training goes on. Otherwise the first of them is an error.
    """

    def __init__(self, lenient: bool = False):
        self.lenient = lenient

    def read(self, row: Mapping[str, Any], where: object, left_out: LeftOut) -> Fields | None:
        try:
            fields = self.fields(row, where)
            if not fields[0].strip():
                raise UserError("has an empty completion; expected text to learn")
        except UserError as error:
            if not self.lenient or left_out.nothing_used:
                raise UserError(f"{where} {error}") from error.__cause__
            left_out.add(where, str(error))
            return None
        left_out.used()
        return fields

    @abstractmethod
    def fields(self, row: Mapping[str, Any], where: object) -> Fields:
        """Completion, prompt, and whether they have their special tokens.

        Raises:
            UserError: goes on behind the name of the row.
        """


def check_preset(preset: object) -> None:
    """Raise :class:`UserError` for a preset that there is not."""
    if preset is not None and preset not in PRESETS:
        raise UserError(
            f"data.preset is {preset!r}; expected one of {', '.join(PRESETS)}"
            f"{did_you_mean(str(preset), list(PRESETS))}"
        )


class _Option(NamedTuple):
    """Templates of a layout: the prompt's, and the completions' with the sums of their shares."""

    prompt: Template
    completions: list[Template]
    bounds: list[float]

    def fits(self, row: Mapping[str, Any]) -> bool:
        return self.prompt.fits(row) and all(template.fits(row) for template in self.completions)


class TemplateReader(PairReader):
    """Fills a prompt's and a completion's template with a row's columns.

    Args:
        prompt, completion: templates. Of several completions (a list of templates, or of mappings with
            ``template`` and ``share``) one is drawn for each row, by their shares.
        preset: of :data:`~quietstar.data.presets.PRESETS`, for what is not given; of its layouts a row
            takes the first that it has the columns for.
        seed: of the draws, which belong to a row's file and number, so that it has the same completion
            each time that it is read.

    Raises:
        UserError: for templates that no row can fill, or one that is missing.
    """

    def __init__(
        self,
        prompt: str | None = None,
        completion: Completion | None = None,
        *,
        preset: str | None = None,
        seed: int = 0,
        lenient: bool = False,
    ):
        super().__init__(lenient)
        check_preset(preset)
        if preset is None and (prompt is None or completion is None):
            given, missing = ("prompt", "completion") if completion is None else ("completion", "prompt")
            raise UserError(
                f"data.{given} is given without data.{missing}; expected both, or data.preset"
            )
        self.seed = seed
        layouts = PRESETS[preset].layouts if preset is not None else (Layout("", ""),)
        self._options = [
            _Option(
                Template(layout.prompt if prompt is None else prompt, "data.prompt"),
                *_completions(layout.completion if completion is None else completion),
            )
            for layout in layouts
        ]

    def fields(self, row: Mapping[str, Any], where: object) -> Fields:
        option = next((option for option in self._options if option.fits(row)), self._options[0])
        place = option.bounds[-1] * self._drawn(where)
        chosen = next(n for n, bound in enumerate(option.bounds) if place < bound)
        prompt = option.prompt.fill(row)
        for template in option.completions:  # a missing column is an error whatever is drawn
            if not template.fits(row):
                template.fill(row)
        return option.completions[chosen].fill(row), prompt, False

    def _drawn(self, where: object) -> float:
        """A number from 0 to 1 that belongs to the row, whatever folder its file is in."""
        name = f"{where.path.name}:{where.number}" if isinstance(where, Place) else str(where)
        bits = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=6).digest()
        return int.from_bytes(bits) / 2**48


def _completions(given: Completion) -> tuple[list[Template], list[float]]:
    entries = [given] if isinstance(given, str) else list(given)
    if not entries:
        raise UserError("data.completion is an empty list; expected a template, or several")
    templates, shares = [], []
    for entry in entries:
        parts = {"template": entry} if isinstance(entry, str) else entry
        share = parts.get("share", 1.0) if isinstance(parts, Mapping) else 0
        known = isinstance(parts, Mapping) and isinstance(parts.get("template"), str)
        if not known or set(parts) - {"template", "share"}:
            raise UserError(
                f"data.completion has the entry {entry!r}; expected a template, or {{template: text,"
                " share: number}"
            )
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1e9:
            raise UserError(f"data.completion has the share {share!r}; expected a number above 0")
        templates.append(Template(parts["template"], "data.completion"))
        shares.append(float(share))
    return templates, list(itertools.accumulate(shares))


class MessagesReader(PairReader):
    """The last message of the assistant is the completion, the conversation before it the prompt.

    Args:
        column: holds a list of ``{role, content}``; messages behind the assistant's last are left away.

    Raises:
        UserError: for a tokenizer without a chat template.
    """

    def __init__(self, column: str, tokenizer: PreTrainedTokenizerBase, *, lenient: bool = False):
        super().__init__(lenient)
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"data.messages is {column!r} and the tokenizer has no chat template; expected that of a"
                " chat model, or data.prompt and data.completion"
            )
        self.column, self.columns, self.tokenizer = column, [column], tokenizer

    def fields(self, row: Mapping[str, Any], where: object) -> Fields:
        messages = row[self.column]
        whole = isinstance(messages, list) and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages
        )
        if not whole:
            raise UserError(
                f"cannot be used: column {self.column!r} holds {messages!r:.80}; expected a list of"
                " {role, content}"
            )
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            roles = ", ".join(message["role"] for message in messages) or "no message"
            raise UserError(
                f"has no message of the assistant in column {self.column!r}, only {roles}; expected one"
                " to learn"
            )
        answer = messages[answers[-1]].get("content")
        if not isinstance(answer, str) or not answer.strip():
            raise UserError("has an empty completion; expected text to learn")
        with blaming("cannot be written by the tokenizer's chat template"):
            render, until = self.tokenizer.apply_chat_template, answers[-1]
            before = [dict(message) for message in messages[: until + 1]]
            prompt = str(render(before[:-1], tokenize=False, add_generation_prompt=True))
            text = str(render(before, tokenize=False))
        if not text.startswith(prompt):
            raise UserError(
                "cannot be used: the tokenizer's chat template writes the conversation before the answer"
                " in another way than with it"
            )
        if not is_utf8(text):
            raise UserError(
                "cannot be used: it holds half of a surrogate pair, which is not a character"
            )
        completion, eos = text[len(prompt) :], self.tokenizer.eos_token
        if isinstance(eos, str) and completion.rstrip().endswith(eos):
            completion = completion.rstrip()  # behind the end of the turn nothing is to be learnt
        return completion, prompt, True


def row_reader(text_column: str | RowReader) -> RowReader:
    """The reader that a column's name stands for."""
    return TextColumn(text_column) if isinstance(text_column, str) else text_column
