"""Documents that give no row cost a counted warning that says where they stand, not the run."""

import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from quietstar.data.blocks import Blocks, StreamedBlocks, read_blocks
from quietstar.data.sources import open_documents
from quietstar.data.stdlib import Document, stdlib_tokenizer
from quietstar.errors import UserError

TEXTS = ("", "a text that is long enough to think in", "b", "", "another one of the same kind", "c")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return stdlib_tokenizer(300)


def write(path: Path, texts: tuple[str, ...]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def read(path: str) -> Iterator[Document]:
    options = {"name": None, "files": [path], "split": "train", "config_name": None, "revision": None}
    options |= {"text_column": "text", "txt_documents": "file", "streaming": False}
    return open_documents(**options, shuffle_buffer=0, seed=0)()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("packing", "why", "named"),
    [
        ("document", "has fewer than 5 tokens (talk_length + 2)", (1, 3, 4)),
        ("concat", "has no text", (1, 4)),
    ],
)
def test_they_are_counted(tmp_path, caplog, tokenizer, packing: str, why: str, named, streamed: bool):
    path = write(tmp_path / "rows.jsonl", TEXTS)
    blocks = Blocks(12, packing, min_tokens=5)
    with caplog.at_level(logging.WARNING, logger="quietstar"):
        if streamed:
            stream = StreamedBlocks(partial(read, path), tokenizer, blocks)
            rows = list(stream)
            assert list(stream) and stream.left_out.count == (4 if packing == "document" else 2)
        else:
            rows = list(read_blocks(partial(read, path), tokenizer, blocks, progress=False)[0])
    assert len(rows) == 2 if packing == "document" else len(rows) > 2
    # Each is counted once, however often it is read.
    assert [r.message for r in caplog.records] == [
        f"document {path}:{line} {why}; it is left out ({number} so far)"
        for number, line in enumerate(named, start=1)
    ]


def test_nothing_usable_at_all_is_an_error(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", ("", "b", ""))
    with pytest.raises(UserError, match="the text is too short: 2 tokens in 3 documents give no row"):
        read_blocks(partial(read, path), tokenizer, Blocks(12, "document", min_tokens=5), progress=False)
