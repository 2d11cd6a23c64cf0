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

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from quietstar.data.collator import IGNORED as IGNORED
from quietstar.data.collator import PaddingCollator as PaddingCollator
from quietstar.data.collator import collator_for as collator_for
from quietstar.data.left_out import LeftOut
from quietstar.data.stdlib import Document
from quietstar.data.streams import Position, Track
from quietstar.errors import UserError

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("quietstar")

PACKINGS = ("concat", "document", "packed")
# Documents tokenized in one call: enough for the tokenizer's own threads, little enough to stream.
TOKENIZER_BATCH = 64

Block = list[int]


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

    def why_no_row(self, ids: list[int]) -> str | None:
        """Why nothing can be made of a document with these tokens; None if something can."""
        if self.packing == "document" and len(ids) < self.min_tokens:
            return f"has fewer than {self.min_tokens} tokens (talk_length + 2)"
        return None if ids else "has no text"


def tokenize(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the token ids of each document, closed by the end-of-text token where there is one.

    What the tokenizer adds by itself (a begin-of-text token, say) is kept. Documents without text give
    nothing.
    """
    for document, ids in _tokenized_one_by_one(documents, tokenizer):
        if document.text:
            yield ids


def _counted(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, blocks: Blocks, left_out: LeftOut
) -> Iterator[list[int]]:
    """The token ids of each document; those that give no row are counted."""
    for document, ids in _tokenized_one_by_one(documents, tokenizer):
        why = blocks.why_no_row(ids)
        if why is None:
            left_out.used()
        else:
            left_out.add(f"document {document.name}", why)
        yield ids


def _tokenized_one_by_one(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Document, list[int]]]:
    """Each document with its tokens, none for one without text."""
    eos = tokenizer.eos_token_id
    stream = iter(documents)
    while batch := list(islice(stream, TOKENIZER_BATCH)):
        texts = [document.text for document in batch if document.text]
        # verbose=False: documents longer than the model's context are cut below, no warning needed.
        token_lists = iter(tokenizer(texts, verbose=False)["input_ids"] if texts else ())
        for document in batch:
            ids = next(token_lists) if document.text else []
            if eos is not None and ids and ids[-1] != eos:
                ids = [*ids, eos]
            yield document, ids


def cut_blocks(token_lists: Iterable[list[int]], blocks: Blocks) -> Iterator[Block]:
    """Cut the tokens of documents into rows of at most ``blocks.block_size`` (see the module).

    With ``document`` packing those of fewer than ``min_tokens`` are left out.
    """
    size = blocks.block_size
    if blocks.packing == "document":
        for ids in token_lists:
            if len(ids) >= blocks.min_tokens:
                yield ids[:size]
        return
    cutter = _Cutter(blocks)
    for ids in token_lists:
        yield from cutter.feed(ids)


class _Cutter:
    """Cuts a stream of documents; what has not made a block yet is in ``rest``.

    ``numbers``: for each of these tokens, the number of its document.
    """

    def __init__(self, blocks: Blocks, rest: Iterable[int] = (), numbers: Iterable[int] = ()) -> None:
        self.blocks = blocks
        self.rest, self.numbers = list(rest), list(numbers)
        self._next = max(self.numbers, default=-1) + 1

    def feed(self, ids: list[int]) -> Iterator[Block]:
        size, rest, numbers = self.blocks.block_size, self.rest, self.numbers
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
                block.documents = _count_up(of[start : start + size])
            yield block


def _count_up(numbers: Iterable[int]) -> list[int]:
    """1 for the first number, 2 for the next that differs, and so on (empty documents leave gaps)."""
    seen: dict[int, int] = {}
    return [seen.setdefault(number, len(seen) + 1) for number in numbers]


def _item(ids: torch.Tensor, documents: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    item = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if documents is not None:
        item["document_ids"] = documents
        # Nothing within its document stands before a first token to predict it from.
        item["labels"][1:][documents[1:] != documents[:-1]] = IGNORED
    return item


class TokenBlocks(Dataset[dict[str, torch.Tensor]]):
    """Rows of token ids in memory.

    ``tokens`` [rows, block_size] int32, ``lengths`` [rows]: how many of each row are text;
    ``documents`` [rows, block_size] int32, None where a row is one document.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int32],
        documents: npt.NDArray[np.int32] | None = None,
    ) -> None:
        self.tokens = tokens
        self.lengths = lengths
        self.documents = documents

    @classmethod
    def from_rows(cls, rows: Iterable[Block], block_size: int) -> TokenBlocks:
        """Store rows of at most ``block_size`` ids."""
        # One growing flat array: lists of Python integers would take ten times the memory.
        flat, numbers, lengths = bytearray(), bytearray(), []
        for row in rows:
            flat += np.asarray(row, dtype=np.int32).tobytes()
            if isinstance(row, PackedBlock):
                numbers += np.asarray(row.documents, dtype=np.int32).tobytes()
            lengths.append(len(row))
        sizes = np.asarray(lengths, dtype=np.int32)
        tokens = np.zeros((len(lengths), block_size), dtype=np.int32)
        kept = np.arange(block_size)[None, :] < sizes[:, None]
        tokens[kept] = np.frombuffer(bytes(flat), dtype=np.int32)
        if not numbers:
            return cls(tokens, sizes)
        documents = np.zeros_like(tokens)
        documents[kept] = np.frombuffer(bytes(numbers), dtype=np.int32)
        return cls(tokens, sizes, documents)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        length = self.lengths[index]
        ids = torch.from_numpy(self.tokens[index, :length].astype(np.int64))
        if self.documents is None:
            return _item(ids)
        return _item(ids, torch.from_numpy(self.documents[index, :length].astype(np.int64)))

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows, padding not counted."""
        return int(self.lengths.sum())


class StreamedBlocks(IterableDataset[dict[str, torch.Tensor]]):
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
        self._track = Track(open_source, skip)
        self._start: Position | None = None

    def position_at(self, rows: int) -> Position:
        """Where the stream was when so many rows had come out of it, as plain data."""
        return self._track.position_at(rows)

    def seek(self, position: Position) -> None:
        """Begin the next iteration at a position."""
        self._start = position

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if get_worker_info() is not None:
            while True:
                yield from self._one_worker()
                if not self.repeat:
                    return
        start, self._start = self._start, None
        return (yield from islice(self._from(start), 0 if start is None else start["drop"], None))

    def _from(self, start: Position | None) -> Iterator[dict[str, torch.Tensor]]:
        rows = 0 if start is None else int(start["rows"])
        begun = 0 if start is None else rows - int(start["in_pass"])
        cutter = _Cutter(self.blocks, *((start["rest"], start["numbers"]) if start else ()))

        def about() -> dict[str, Any]:
            kept = {"rest": list(cutter.rest), "numbers": list(cutter.numbers)}
            return {"rows": rows, "in_pass": rows - begun, **kept}

        while True:
            for batch in self._track.batches(start, TOKENIZER_BATCH, about):
                for ids in _counted(batch, self.tokenizer, self.blocks, self.left_out):
                    for row in self._cut(cutter, ids):
                        if self.max_blocks is None or rows - begun < self.max_blocks:
                            rows += 1
                            yield _as_item(row)
                if self.max_blocks is not None and rows - begun >= self.max_blocks:
                    break
            if not self.repeat:
                return
            if rows == begun:
                raise UserError(
                    f"the stream gave no row of {self.blocks.block_size} tokens; lower data.block_size"
                )
            start, begun, cutter = None, rows, _Cutter(self.blocks)

    def _cut(self, cutter: _Cutter, ids: list[int]) -> Iterable[Block]:
        if self.blocks.packing != "document":
            return cutter.feed(ids)
        return cut_blocks([ids], self.blocks)

    def _one_worker(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        step, first = (1, 0) if worker is None else (worker.num_workers, worker.id)
        limit = self.max_blocks
        if limit is not None:
            limit = (limit - first + step - 1) // step
        documents = islice(self.open_source(), self.skip + first, None, step)
        tokens = _counted(documents, self.tokenizer, self.blocks, self.left_out)
        for row in islice(cut_blocks(tokens, self.blocks), limit):
            yield _as_item(row)


def _as_item(row: Block) -> dict[str, torch.Tensor]:
    numbers = torch.tensor(row.documents) if isinstance(row, PackedBlock) else None
    return _item(torch.tensor(row, dtype=torch.int64), numbers)


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

    seen, left_out = {"documents": skip, "tokens": 0}, LeftOut()

    def counted() -> Iterator[list[int]]:
        # Documents are tokenized one batch ahead of the rows; counting here, one by one, tells how
        # many were used when max_blocks stops the reading.
        texts = (d for d in islice(open_source(), skip, None))
        with tqdm(desc=f"tokenizing {what}", unit=" tokens", disable=not progress) as bar:
            for ids in _counted(texts, tokenizer, blocks, left_out):
                seen["documents"] += 1
                seen["tokens"] += len(ids)
                bar.update(len(ids))
                yield ids

    rows = islice(cut_blocks(counted(), blocks), max_blocks)
    result = TokenBlocks.from_rows(rows, blocks.block_size)
    if len(result) == 0:
        if seen["documents"] == skip:
            raise UserError(f"{what} has no documents" + (f" after the first {skip}" if skip else ""))
        needed = blocks.min_tokens if blocks.packing == "document" else blocks.block_size
        why = "talk_length + 2" if blocks.packing == "document" else "block_size"
        raise UserError(
            f"{what} is too short: {seen['tokens']} tokens in {seen['documents'] - skip} "
            f"documents give no row of {needed} tokens ({why}); lower data.block_size or give "
            "more text"
        )
    return result, seen["documents"]
