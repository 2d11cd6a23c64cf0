"""A prompt and its completion as tokens.

Both are tokenized by themselves and their ids follow one another, so that the boundary is where it is
and the prompt's tokens are those that generation starts from. The prompt gets what the tokenizer puts
before a text, the completion the end-of-text token behind it. Pauses (:mod:`.pause_tokens`) end a
prompt, where a recipe asks for them. The loss is on the completion.

A thought at the completion's start belongs before its first token that is not blank: many tokenizers
write " 51" as a space and digits, and after the space alone the answer is still open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from quietstar.data.collator import IGNORED
from quietstar.data.pause_tokens import pause_ids
from quietstar.data.plain_text import plain_ids, spells
from quietstar.data.stdlib import Document
from quietstar.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Marks of a token: it is learnt; the completion's first token that is not blank comes behind it.
LEARNT, ANCHOR = 1, 2
# Which tokenizers that put a space before a text write by itself, whatever follows.
_BEFORE = "\n"


class PairTokens(list[int]):
    """The ids of a prompt and its completion.

    Attributes:
        prompt: how many of them are the prompt's; anchor: the position before the completion's first
            token that is not blank, -1 if there is none.
    """

    def __init__(self, ids: Iterable[int], prompt: int, anchor: int):
        super().__init__(ids)
        self.prompt, self.anchor = prompt, anchor

    def marks(self) -> list[int]:
        """What each token is: :data:`LEARNT`, :data:`ANCHOR`, both or 0."""
        return [
            LEARNT * (place >= self.prompt) + ANCHOR * (place == self.anchor)
            for place in range(len(self))
        ]

    def to_plain(self) -> list[int]:
        """As plain data."""
        return [self.prompt, self.anchor, *self]

    @classmethod
    def of_plain(cls, numbers: Sequence[int]) -> PairTokens:
        """From :meth:`to_plain`."""
        return cls(numbers[2:], numbers[0], numbers[1])


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> dict[str, Any]:
    """A row for :class:`~quietstar.QuietStarTrainer`, as lists: ``input_ids``, ``labels`` (-100 on the
    prompt) and ``completion_anchors``, the position where ``think_at: completion`` thinks.

    Raises:
        UserError: for a completion without text, or nothing before it.
    """
    if not completion.strip():
        raise UserError("the completion is empty; expected text to learn")
    (ids,) = encode_pairs(tokenizer, [Document("", completion, prompt)])
    if not ids.prompt:
        raise UserError(
            "the prompt is empty and the tokenizer has no begin-of-text token; expected text"
        )
    labels = [IGNORED] * ids.prompt + ids[ids.prompt :]
    return {"input_ids": list(ids), "labels": labels, "completion_anchors": [ids.anchor]}


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> Iterator[PairTokens]:
    """The tokens of documents of one source, all with a prompt; one for each."""
    if not documents:
        return
    eos, blank, pauses = tokenizer.eos_token_id, _Blank(tokenizer), pause_ids(tokenizer)
    texts = [document.prompt or "" for document in documents]
    # Special tokens are what a chat template writes, and not what a text spells.
    rendered = documents[0].rendered
    ids = partial(_rendered_ids if rendered else plain_ids, tokenizer)
    prompts = ids(texts, add_special_tokens=not rendered)
    completions = _continuations(
        partial(ids, add_special_tokens=False), [document.text for document in documents]
    )
    for text, before, after in zip(texts, prompts, completions, strict=True):
        if before and before[-1] == eos and not _ends(tokenizer, text, rendered):
            before.pop()  # some tokenizers close every text
        if before:
            before = [*before, *pauses]
        if eos is not None and after[-1:] != [eos]:
            after.append(eos)
        skipped = next((n for n, token in enumerate(after) if not blank(token)), len(after))
        yield PairTokens(before + after, len(before), len(before) + skipped - 1)


def _ends(tokenizer: PreTrainedTokenizerBase, text: str, rendered: bool) -> bool:
    """Whether a text has its own end-of-text token."""
    eos = tokenizer.eos_token
    return text.endswith(str(eos)) if rendered else spells(tokenizer, text, eos)


def without_end(tokenizer: PreTrainedTokenizerBase, document: Document, ids: PairTokens) -> PairTokens:
    """The tokens without the end-of-text token that was added behind a completion."""
    own = _ends(tokenizer, document.text, document.rendered)
    added = ids[-1] == tokenizer.eos_token_id and not own
    return PairTokens(ids[:-1] if added else ids, ids.prompt, ids.anchor)


def _rendered_ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: Any
) -> list[list[int]]:
    # verbose=False: what is too long for the model's context is left out later, no warning needed.
    return [list(ids) for ids in tokenizer(texts, verbose=False, **options)["input_ids"]]


def _continuations(ids_of: Callable[[list[str]], list[list[int]]], texts: list[str]) -> list[list[int]]:
    """The ids of texts that go on behind another; by itself one would get a space before it from a
    tokenizer of the sentencepiece kind, where a text has the same ids as behind a space."""
    found, (plain, spaced) = ids_of(texts), ids_of(["a", " a"])
    if plain != spaced:
        return found
    head, *behind = ids_of([_BEFORE, *(_BEFORE + text for text in texts)])
    return [
        ids[len(head) :] if ids[: len(head)] == head else own
        for ids, own in zip(behind, found, strict=True)
    ]


class _Blank:
    """Whether a token is white space alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._known: dict[int, bool] = {}

    def __call__(self, token: int) -> bool:
        if token not in self._known:
            self._known[token] = not self._tokenizer.decode([token]).strip()
        return self._known[token]
