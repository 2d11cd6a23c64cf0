"""From text to blocks of tokens that a Trainer can read.

    source (sources.py) -> documents -> tokens -> blocks of block_size -> collated batches

How a block is filled is in :mod:`quietstar.data.cutting`, how a prompt and its completion become tokens
in :mod:`quietstar.data.pairs`.

:class:`TokenBlocks` keeps everything in memory and has a length, :class:`StreamedBlocks` reads as
it goes. Items have ``input_ids``, ``attention_mask`` and ``labels``, int64 of [n], n <= block_size, and
if packed ``document_ids``, which number the documents in the block from 1. With prompts and completions
the labels of prompts are -100, and ``completion_anchors`` are the positions before each completion's
first token that is not blank.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from quietstar.data.collator import IGNORED as IGNORED
from quietstar.data.collator import PaddingCollator as PaddingCollator
from quietstar.data.collator import collator_for as collator_for
from quietstar.data.cutting import PACKINGS as PACKINGS
from quietstar.data.cutting import Block, Blocks, Cutter, Ints, Item, Marks, item_of
from quietstar.data.cutting import PackedBlock as PackedBlock
from quietstar.data.cutting import PairBlock as PairBlock
from quietstar.data.cutting import cut_blocks as cut_blocks
from quietstar.data.left_out import LeftOut
from quietstar.data.pairs import PairTokens, encode_pairs
from quietstar.data.plain_text import plain_ids
from quietstar.data.stdlib import Document
from quietstar.data.streams import Position, batches
from quietstar.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Documents tokenized in one call: enough for the tokenizer's own threads, little enough to stream.
TOKENIZER_BATCH = 64

# Positions that are remembered: more than a loader can be ahead of the training.
REMEMBERED = 256
BEGINNING: Position = {"rows": 0, "in_pass": 0, "drop": 0, "rest": [], "numbers": []}
BEGINNING |= {"documents": 0, "source": None}


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
        if batch[0].prompt is not None:  # as have all of a source
            yield from zip(batch, encode_pairs(tokenizer, batch), strict=True)
            continue
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


class TokenBlocks(Dataset[Item]):
    """Rows of token ids in memory.

    ``tokens`` [rows, block_size] int32, ``lengths`` [rows]: how many of each row are text;
    ``documents`` [rows, block_size] int32, None where a row is one document; ``marks``
    [rows, block_size] int8 of prompts and completions, None where a row is text.
    """

    def __init__(
        self, tokens: Ints, lengths: Ints, documents: Ints | None = None, marks: Marks | None = None
    ) -> None:
        self.tokens = tokens
        self.lengths = lengths
        self.documents = documents
        self.marks = marks

    @classmethod
    def from_rows(cls, rows: Iterable[Block], block_size: int) -> TokenBlocks:
        """Store rows of at most ``block_size`` ids."""
        # Growing flat arrays: lists of Python integers would take ten times the memory.
        flat, numbers, lengths, marked = array("i"), array("i"), array("i"), array("b")
        for row in rows:
            flat.extend(row)
            numbers.extend(row.documents if isinstance(row, PackedBlock) else ())
            marked.extend(row.marks if isinstance(row, PairBlock) else ())
            lengths.append(len(row))
        sizes = np.asarray(lengths, dtype=np.int32)
        tokens = np.zeros((len(lengths), block_size), dtype=np.int32)
        kept = np.arange(block_size)[None, :] < sizes[:, None]
        tokens[kept] = flat
        documents = marks = None
        if numbers:
            documents = np.zeros_like(tokens)
            documents[kept] = numbers
        if marked:
            marks = np.zeros(tokens.shape, dtype=np.int8)
            marks[kept] = marked
        return cls(tokens, sizes, documents, marks)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Item:
        length = self.lengths[index]
        numbers = None if self.documents is None else self.documents[index, :length]
        marks = None if self.marks is None else self.marks[index, :length]
        return item_of(self.tokens[index, :length], numbers, marks)

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
        pairs = map(PairTokens.of_plain, start.get("pairs", ()))  # which older positions do not have
        cutter = Cutter(self.blocks, start["rest"], start["numbers"], pairs)
        while True:
            for position, batch in batches(*self._open(worker), TOKENIZER_BATCH, start):
                kept: Position = {"rest": list(cutter.rest), "numbers": list(cutter.numbers)}
                kept["pairs"] = [pair.to_plain() for pair in cutter.pairs]
                self._past.append({**position, **kept, "rows": rows, "in_pass": rows - begun})
                found = _counted(batch, self.tokenizer, self.blocks, self.left_out)
                ready = (cutter.feed(ids) for ids in found) if batch else [cutter.end()]
                for blocks in ready:
                    for row in blocks:
                        if limit is None or rows - begun < limit:
                            rows += 1
                            numbers = getattr(row, "documents", None) or None
                            yield item_of(row, numbers, getattr(row, "marks", None))
                    if limit is not None and rows - begun >= limit:
                        break  # what follows is not read, and nothing is said about it
                if limit is not None and rows - begun >= limit:
                    break
            if not self.repeat or (rows == begun and worker is not None):
                return
            if rows == begun:
                self.left_out.check("the stream")
                raise UserError(
                    f"the stream gave no row of {self.blocks.block_size} tokens; lower data.block_size"
                )
            start, begun, cutter = BEGINNING, rows, Cutter(self.blocks)


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

    seen, left_out = {"documents": 0, "tokens": 0, "pairs": 0}, LeftOut()

    def counted() -> Iterator[list[int]]:
        # Documents are tokenized one batch ahead of the rows; counting here, one by one, tells how
        # many were used when max_blocks stops the reading.
        texts = islice(open_source(), skip, None)
        with tqdm(desc=f"tokenizing {what}", unit=" tokens", disable=not progress) as bar:
            for ids in _counted(texts, tokenizer, blocks, left_out):
                seen["documents"] += 1
                seen["pairs"] += isinstance(ids, PairTokens)
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
        if seen["pairs"]:
            left_out.check(what)
        needed, which = blocks.block_size, "block_size"
        if blocks.packing == "document":
            needed, which = blocks.min_tokens, "talk_length + 2"
        raise UserError(
            f"{what} is too short: {seen['tokens']} tokens in {seen['documents']} documents give no row"
            f" of {needed} tokens ({which}); lower data.block_size or give more text"
        )
    return result, skip + seen["documents"]
