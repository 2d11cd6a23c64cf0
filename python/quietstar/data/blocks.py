"""From text to blocks of tokens that a Trainer can read.

    source (sources.py) -> documents -> tokens -> blocks of block_size -> collated batches

Three ways to fill a block (``packing``):

- ``concat``: documents follow one another, each closed by the end-of-text token, and the stream is
  cut every ``block_size`` tokens; no padding, the last incomplete block is dropped;
- ``packed``: the same cut, but documents in a block are kept apart: no attention, no thought's talk and
  no prediction goes from one to the next, and position ids start anew in each;
- ``document``: one document per row, cut after ``block_size`` tokens, padded in the batch.

:class:`TokenBlocks` keeps everything in memory and has a length, :class:`StreamedBlocks` reads as
it goes. Items have ``input_ids``, ``attention_mask`` and ``labels``, int64 of [n], n <= block_size, and
if packed ``document_ids``, which number the documents in the block from 1.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from quietstar.data.collator import IGNORED as IGNORED
from quietstar.data.collator import PaddingCollator as PaddingCollator
from quietstar.data.collator import collator_for as collator_for
from quietstar.data.left_out import LeftOut
from quietstar.data.stdlib import Document
from quietstar.data.streams import Position, batches
from quietstar.errors import UserError
from quietstar.plain_text import plain_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKINGS = ("concat", "document", "packed")
# Documents tokenized in one call: enough for the tokenizer's own threads, little enough to stream.
TOKENIZER_BATCH = 64

# Positions that are remembered: more than a loader can be ahead of the training.
REMEMBERED = 256
BEGINNING: Position = {"rows": 0, "in_pass": 0, "drop": 0, "rest": [], "numbers": []}
BEGINNING |= {"documents": 0, "source": None}

Ints = NDArray[np.int32]
Block = list[int]
Item = dict[str, torch.Tensor]


class PackedBlock(list[int]):
    """A block and the number of the document that each of its tokens is from (from 1)."""

    documents: list[int]


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
        if self.packing == "document" and len(ids) < self.min_tokens:
            return f"has fewer than {self.min_tokens} tokens (talk_length + 2)"
        return None if ids else "has no text"


def tokenize(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the token ids of each document, closed by the end-of-text token where there is one.

    What the tokenizer adds by itself (a begin-of-text token, say) is kept. Documents without text are
    skipped.
    """
    return (ids for document, ids in _tokenized(documents, tokenizer) if document.text)


def _tokenized(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Document, list[int]]]:
    """Each document with its tokens, none for one without text."""
    eos = tokenizer.eos_token_id
    stream = iter(documents)
    while batch := list(islice(stream, TOKENIZER_BATCH)):
        texts = [document.text for document in batch if document.text]
        token_lists = iter(plain_ids(tokenizer, texts) if texts else ())
        for document in batch:
            ids = next(token_lists) if document.text else []
            if eos is not None and ids and ids[-1] != eos:
                ids = [*ids, eos]
            yield document, ids


def _counted(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, blocks: Blocks, left_out: LeftOut
) -> Iterator[list[int]]:
    """The token ids of each document; those that give no row are counted."""
    for document, ids in _tokenized(documents, tokenizer):
        reason = blocks.unsupported_reason(ids)
        if reason is None:
            left_out.used()
        else:
            left_out.add(f"document {document.name}", reason)
        yield ids


def cut_blocks(token_lists: Iterable[list[int]], blocks: Blocks) -> Iterator[Block]:
    """Cut the tokens of documents into rows of at most ``blocks.block_size`` (see the module).

    With ``document`` packing those of fewer than ``min_tokens`` are left out.
    """
    cutter = _Cutter(blocks)
    for ids in token_lists:
        yield from cutter.feed(ids)


class _Cutter:
    """Cuts a stream of documents; ``rest`` holds the tokens that do not fill a block yet.

    ``numbers``: for each of these tokens, the number of its document.
    """

    def __init__(self, blocks: Blocks, rest: Iterable[int] = (), numbers: Iterable[int] = ()) -> None:
        self.blocks = blocks
        self.rest, self.numbers = list(rest), list(numbers)
        self._next = max(self.numbers, default=-1) + 1

    def feed(self, ids: list[int]) -> Iterator[Block]:
        """Take a document; yields the blocks that are complete with it."""
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


def _item(tokens: Sequence[int] | Ints, numbers: Sequence[int] | Ints | None) -> Item:
    ids = torch.as_tensor(tokens, dtype=torch.int64)
    item = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if numbers is not None:
        item["document_ids"] = documents = torch.as_tensor(numbers, dtype=torch.int64)
        # Nothing within its document stands before a first token to predict it from.
        item["labels"][1:][documents[1:] != documents[:-1]] = IGNORED
    return item


class TokenBlocks(Dataset[Item]):
    """Rows of token ids in memory.

    ``tokens`` [rows, block_size] int32, ``lengths`` [rows]: how many of each row are text;
    ``documents`` [rows, block_size] int32, None where a row is one document.
    """

    def __init__(self, tokens: Ints, lengths: Ints, documents: Ints | None = None) -> None:
        self.tokens = tokens
        self.lengths = lengths
        self.documents = documents

    @classmethod
    def from_rows(cls, rows: Iterable[Block], block_size: int) -> TokenBlocks:
        """Store rows of at most ``block_size`` ids."""
        # Growing flat arrays: lists of Python integers would take ten times the memory.
        flat, numbers, lengths = array("i"), array("i"), array("i")
        for row in rows:
            flat.extend(row)
            numbers.extend(row.documents if isinstance(row, PackedBlock) else ())
            lengths.append(len(row))
        sizes = np.asarray(lengths, dtype=np.int32)
        tokens = np.zeros((len(lengths), block_size), dtype=np.int32)
        kept = np.arange(block_size)[None, :] < sizes[:, None]
        tokens[kept] = flat
        if not numbers:
            return cls(tokens, sizes)
        documents = np.zeros_like(tokens)
        documents[kept] = numbers
        return cls(tokens, sizes, documents)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Item:
        length = self.lengths[index]
        numbers = None if self.documents is None else self.documents[index, :length]
        return _item(self.tokens[index, :length], numbers)

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows, padding not counted."""
        return int(self.lengths.sum())


class StreamedBlocks(IterableDataset[Item]):
    """Rows cut while reading. Starts again from the beginning at each iteration.

    With several loader workers each takes every n-th document, so that no text is seen twice.
    ``skip`` documents at the front are left out (they were taken for evaluation). ``repeat``: begin
    again at the end, for ever.

    Without loader workers :meth:`position_at` says where the stream was after so many rows, and
    :meth:`seek` makes the next iteration begin there.
    """

    def __init__(
        self,
        open_source: Callable[[], Iterator[Document]],
        tokenizer: PreTrainedTokenizerBase,
        blocks: Blocks,
        skip: int = 0,
        max_blocks: int | None = None,
        repeat: bool = False,
    ) -> None:
        self.open_source = open_source
        self.tokenizer = tokenizer
        self.blocks = blocks
        self.skip = skip
        self.max_blocks = max_blocks
        self.repeat = repeat
        self.left_out = LeftOut()
        self._past: deque[Position] = deque(maxlen=REMEMBERED)
        self._start = BEGINNING

    def position_at(self, rows: int) -> Position:
        """The stream's position after so many rows, as plain data.

        It is the last one remembered at or before them, with the number of rows to drop from there.

        Raises:
            UserError: if the stream has been read too far ahead.
        """
        for position in reversed(self._past):
            if position["rows"] <= rows:
                return {**position, "drop": rows - position["rows"]}
        raise UserError(
            f"the stream was read more than {REMEMBERED} batches of documents ahead of row {rows}; lower"
            " training.dataloader_prefetch_factor"
        )

    def seek(self, position: Position) -> None:
        """Begin the next iteration at a position."""
        self._start = position

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        if worker is not None:
            limit = self.max_blocks
            if limit is not None:
                limit = -(-(limit - worker.id) // worker.num_workers)
            return (yield from self._rows(BEGINNING, limit, worker))
        start, self._start = self._start, BEGINNING
        return (yield from islice(self._rows(start, self.max_blocks), start["drop"], None))

    def _open(self, worker: Any) -> tuple[Iterator[Document], int]:
        """The source, or a worker's share of it, and how many documents to skip."""
        if worker is None:
            return self.open_source(), self.skip
        return islice(self.open_source(), self.skip + worker.id, None, worker.num_workers), 0

    def _rows(self, start: Position, limit: int | None, worker: Any = None) -> Iterator[Item]:
        """Rows from a position on, at most ``limit`` in each pass; of a loader worker, its share."""
        rows, begun = start["rows"], start["rows"] - start["in_pass"]
        cutter = _Cutter(self.blocks, start["rest"], start["numbers"])
        while True:
            for position, batch in batches(*self._open(worker), TOKENIZER_BATCH, start):
                kept = {"rest": list(cutter.rest), "numbers": list(cutter.numbers)}
                self._past.append({**position, **kept, "rows": rows, "in_pass": rows - begun})
                for ids in _counted(batch, self.tokenizer, self.blocks, self.left_out):
                    for row in cutter.feed(ids):
                        if limit is None or rows - begun < limit:
                            rows += 1
                            yield _item(row, getattr(row, "documents", None))
                    if limit is not None and rows - begun >= limit:
                        break  # what follows is not read, and nothing is said about it
                if limit is not None and rows - begun >= limit:
                    break
            if not self.repeat or (rows == begun and worker is not None):
                return
            if rows == begun:
                raise UserError(
                    f"the stream gave no row of {self.blocks.block_size} tokens; lower data.block_size"
                )
            start, begun, cutter = BEGINNING, rows, _Cutter(self.blocks)


def read_blocks(
    open_source: Callable[[], Iterator[Document]],
    tokenizer: PreTrainedTokenizerBase,
    blocks: Blocks,
    *,
    max_blocks: int | None = None,
    skip: int = 0,
    what: str = "the text",
    progress: bool = True,
) -> tuple[TokenBlocks, int]:
    """Read rows into memory; returns them and how many documents they took (``skip`` included).

    Raises :class:`UserError` if not one row comes out.
    """
    from transformers.utils.logging import tqdm

    seen = {"documents": 0, "tokens": 0}

    def counted() -> Iterator[list[int]]:
        # Documents are tokenized one batch ahead of the rows; counting here, one by one, tells how
        # many were used when max_blocks stops the reading.
        texts = islice(open_source(), skip, None)
        with tqdm(desc=f"tokenizing {what}", unit=" tokens", disable=not progress) as bar:
            for ids in _counted(texts, tokenizer, blocks, LeftOut()):
                seen["documents"] += 1
                seen["tokens"] += len(ids)
                bar.update(len(ids))
                yield ids

    rows = islice(cut_blocks(counted(), blocks), max_blocks)
    result = TokenBlocks.from_rows(rows, blocks.block_size)
    if len(result) == 0:
        if not seen["documents"]:
            taken = (
                f" after the first {skip}, which are evaluated on; set data.eval_files,"
                " data.eval_blocks=0 or, for text files, data.txt_documents"
            )
            raise UserError(f"{what} has no documents" + (taken if skip else ""))
        needed, which = blocks.block_size, "block_size"
        if blocks.packing == "document":
            needed, which = blocks.min_tokens, "talk_length + 2"
        raise UserError(
            f"{what} is too short: {seen['tokens']} tokens in {seen['documents']} documents give no row"
            f" of {needed} tokens ({which}); lower data.block_size or give more text"
        )
    return result, skip + seen["documents"]
