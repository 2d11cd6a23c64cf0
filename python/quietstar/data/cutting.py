"""Tokens of documents, cut into rows (``packing``).

- ``concat``: documents follow one another, each closed by the end-of-text token, and the stream is
  cut every ``block_size`` tokens; no padding, the last incomplete block is dropped;
- ``packed``: the same cut, but documents in a block are kept apart: no attention, no thought's talk and
  no prediction goes from one to the next, and position ids start anew in each;
- ``document``: one document per row, cut after ``block_size`` tokens, padded in the batch.

A prompt with its completion (:mod:`quietstar.data.pairs`) is never cut: ``document`` has one per row,
``packed`` as many as a row has room for. One that is too long for a row is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from quietstar.data.collator import IGNORED
from quietstar.data.pairs import ANCHOR, LEARNT, PairTokens
from quietstar.errors import UserError

PACKINGS = ("concat", "document", "packed")

Ints = NDArray[np.int32]
Marks = NDArray[np.int8]
Block = list[int]
Item = dict[str, torch.Tensor]


class PackedBlock(list[int]):
    """A block and the number of the document that each of its tokens is from (from 1)."""

    documents: list[int]


class PairBlock(PackedBlock):
    """Whole prompts with their completions, and a mark for each token (of :mod:`quietstar.data.pairs`).

    Args:
        numbered: whether they are told apart; otherwise there is one.
    """

    def __init__(self, pairs: Sequence[PairTokens], numbered: bool):
        super().__init__(token for pair in pairs for token in pair)
        self.marks = [mark for pair in pairs for mark in pair.marks()]
        self.documents = []
        if numbered:
            self.documents = [n for n, pair in enumerate(pairs, start=1) for _ in pair]


@dataclass(frozen=True)
class Blocks:
    """How tokens are cut: block size, packing, and the shortest row worth keeping.

    ``min_tokens`` is talk_length + 2: a shorter row has no position that a thought could be judged
    by.
    """

    block_size: int
    packing: str = "concat"
    min_tokens: int = 2

    def __post_init__(self) -> None:
        if self.packing not in PACKINGS:
            raise UserError(f"data.packing is {self.packing!r}; expected one of {', '.join(PACKINGS)}")
        if self.block_size < self.min_tokens:
            raise UserError(
                f"data.block_size is {self.block_size}; expected at least {self.min_tokens} "
                "(talk_length + 2)"
            )

    def unsupported_reason(self, ids: list[int]) -> str | None:
        """Why a document with these tokens gives no row; None if it does."""
        if isinstance(ids, PairTokens):
            if ids.prompt == 0:
                return "has no token before its completion (an empty prompt, and no begin-of-text token)"
            if len(ids) > self.block_size:
                return f"has {len(ids)} tokens; expected at most {self.block_size} (data.block_size)"
        if self.packing == "document" and len(ids) < self.min_tokens:
            return f"has fewer than {self.min_tokens} tokens (talk_length + 2)"
        return None if ids else "has no text"


def cut_blocks(token_lists: Iterable[list[int]], blocks: Blocks) -> Iterator[Block]:
    """Cut the tokens of documents into rows of at most ``blocks.block_size`` (see the module).

    With ``document`` packing those of fewer than ``min_tokens`` are left out.
    """
    cutter = Cutter(blocks)
    for ids in token_lists:
        yield from cutter.feed(ids)
    yield from cutter.end()


class Cutter:
    """Cuts a stream of documents; ``rest`` holds the tokens that do not fill a block yet.

    ``numbers``: for each of these tokens, the number of its document; ``pairs``: prompts with their
    completions that wait for others to share a block with.
    """

    def __init__(
        self,
        blocks: Blocks,
        rest: Iterable[int] = (),
        numbers: Iterable[int] = (),
        pairs: Iterable[PairTokens] = (),
    ) -> None:
        self.blocks = blocks
        self.rest, self.numbers, self.pairs = list(rest), list(numbers), list(pairs)
        self._next = max(self.numbers, default=-1) + 1

    def feed(self, ids: list[int]) -> Iterator[Block]:
        """Take a document; yields the blocks that are complete with it."""
        if isinstance(ids, PairTokens):
            yield from self._feed_pair(ids)
            return
        size, rest, numbers = self.blocks.block_size, self.rest, self.numbers
        if self.blocks.packing == "document":
            if len(ids) >= self.blocks.min_tokens:
                yield ids[:size]
            return
        rest.extend(ids)
        numbers.extend([self._next] * len(ids))
        self._next += 1
        whole = len(rest) - len(rest) % size
        # Taken out before a block is handed on, so that the rest is always what is left.
        ready, of = rest[:whole], numbers[:whole]
        del rest[:whole], numbers[:whole]
        for start in range(0, whole, size):
            block = ready[start : start + size]
            if self.blocks.packing == "packed":
                block = PackedBlock(block)
                # 1 for the first number, 2 for the next that differs (empty documents leave gaps).
                seen: dict[int, int] = {}
                block.documents = [seen.setdefault(n, len(seen) + 1) for n in of[start : start + size]]
            yield block

    def _feed_pair(self, pair: PairTokens) -> Iterator[Block]:
        if self.blocks.packing == "concat":
            raise UserError(
                "data.packing is 'concat' with prompts and completions; expected 'document' or 'packed',"
                " which keep them whole"
            )
        if self.blocks.unsupported_reason(pair) is not None:
            return
        if self.blocks.packing == "document":
            yield PairBlock([pair], numbered=False)
            return
        ready: list[PairTokens] = []
        if sum(map(len, self.pairs)) + len(pair) > self.blocks.block_size:
            ready, self.pairs = self.pairs, []
        self.pairs.append(pair)
        if ready:
            yield PairBlock(ready, numbered=True)

    def end(self) -> Iterator[Block]:
        """The last block of a source: of whole documents, not of the tokens that fill none."""
        ready, self.pairs = self.pairs, []
        if ready:
            yield PairBlock(ready, numbered=True)


def item_of(
    tokens: Sequence[int] | Ints,
    numbers: Sequence[int] | Ints | None = None,
    marks: Sequence[int] | Marks | None = None,
) -> Item:
    """A row for the model: of a text, of documents with their ``numbers``, of prompts with completions
    and their ``marks``."""
    ids = torch.as_tensor(tokens, dtype=torch.int64)
    item = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if numbers is not None:
        item["document_ids"] = documents = torch.as_tensor(numbers, dtype=torch.int64)
        # Nothing within its document stands before a first token to predict it from.
        item["labels"][1:][documents[1:] != documents[:-1]] = IGNORED
    if marks is not None:
        kinds = torch.as_tensor(marks, dtype=torch.int64)
        item["labels"][kinds & LEARNT == 0] = IGNORED
        item["completion_anchors"] = (kinds & ANCHOR).nonzero()[:, 0]
    return item
