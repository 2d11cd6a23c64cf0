"""Streams: continued from a saved position, row for row, without reading all that was before."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_recipes import content, from_files
from small_training import Interrupt
from transformers import PreTrainedTokenizerFast

from quietstar.data.blocks import TOKENIZER_BATCH, Blocks, StreamedBlocks
from quietstar.data.sources import open_documents
from quietstar.data.stdlib import Document, train_tokenizer
from quietstar.errors import UserError
from quietstar.recipes.recipe import parse_recipe
from quietstar.recipes.run import run_recipe

pytestmark = pytest.mark.usefixtures("stdlib_tokenizer_once")
TEXTS = [f"{i} " + "the quick brown fox jumps over the lazy dog " * (1 + i * 7 % 5) for i in range(300)]
Source = Callable[[], Iterator[Document]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS[:20], 300)


@pytest.fixture(params=["files", "hub", "hub shuffled"])
def source(request, tmp_path, monkeypatch) -> Source:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for shard in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[shard * 100 : shard * 100 + 100]]
        (folder / f"train-{shard}.jsonl").write_text("".join(lines))
    if request.param == "files":
        return open_documents(name=None, files=[str(folder / "*.jsonl")], split="train")
    buffer = 20 if request.param == "hub shuffled" else 0
    return open_documents(
        name=str(folder), files=None, split="train", streaming=True, shuffle_buffer=buffer, seed=3
    )


def take(stream: Iterator[dict[str, torch.Tensor]], count: int) -> list[dict[str, torch.Tensor]]:
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("packing", ["concat", "packed", "document"])
@pytest.mark.parametrize("limit", [None, 90])
def test_a_position_continues_row_for_row(
    source: Source, tokenizer: PreTrainedTokenizerFast, packing: str, limit: int | None
):
    def stream() -> StreamedBlocks:
        return StreamedBlocks(source, tokenizer, Blocks(24, packing), 0, limit, repeat=True)

    whole = take(iter(stream()), 400)
    running = stream()
    rows = iter(running)
    seen = 0
    # The last one lies in the second pass over the data, or in the fifth with a limit.
    for stop in (3, 75, int(torch.randint(100, 200, ())), 370):
        take(rows, stop + 7 - seen)  # a loader reads ahead
        seen = stop + 7
        position = json.loads(json.dumps(running.position_at(stop)))
        other = stream()
        other.seek(position)
        for expected, found in zip(whole[stop:], take(iter(other), 400 - stop), strict=True):
            assert expected.keys() == found.keys()
            assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_little_is_read_again(tokenizer: PreTrainedTokenizerFast, source: Source):
    read: list[str] = []

    def counted() -> Iterator[Document]:
        inner = source()

        class Counted:
            def __iter__(self):
                return self

            def __next__(self) -> Document:
                document = next(inner)
                read.append(document.text)
                return document

        counting: Any = Counted()
        if hasattr(inner, "seek"):
            counting.seek, counting.position = inner.seek, inner.position
        return counting

    stream = StreamedBlocks(counted, tokenizer, Blocks(24), repeat=True)
    rows = iter(stream)
    take(rows, 300)
    first = len(read)
    position = stream.position_at(300)
    read.clear()
    other = StreamedBlocks(counted, tokenizer, Blocks(24), repeat=True)
    other.seek(position)
    take(iter(other), 1)
    again = 2 * TOKENIZER_BATCH  # the batch that the position lies in, and the next if it ends there
    seekable = hasattr(source(), "seek")
    assert len(read) <= (again if seekable else first + again)
    assert first > again and position["drop"] < 150


def test_one_pass_ends_and_a_stream_without_rows_says_so(tokenizer: PreTrainedTokenizerFast):
    def few() -> Iterator[Document]:
        return iter([Document("a", "the fox")])

    assert list(StreamedBlocks(few, tokenizer, Blocks(24))) == []
    with pytest.raises(UserError, match="the stream gave no row of 24 tokens"):
        next(iter(StreamedBlocks(few, tokenizer, Blocks(24), repeat=True)))


@pytest.mark.slow
def test_a_streamed_run_resumes_exactly(tmp_path, monkeypatch):
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:40])
    )
    recipe = parse_recipe(
        content(
            model={"tokenizer": "stdlib", "vocab_size": 300},
            data=from_files(
                tmp_path / "text.jsonl", streaming=True, packing="packed", max_train_blocks=15
            ),
            thoughts={"think_at": "random:0.5"},
            training={"max_steps": 9, "gradient_accumulation_steps": 2, "save_steps": 4},
        )
    )
    run_recipe(recipe, tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "parts", progress=False, callbacks=[Interrupt(6)])
    assert (tmp_path / "parts" / "checkpoint-4" / "data_position.json").is_file()
    fetched: list[int] = []
    original = StreamedBlocks.__iter__

    def counted(self: StreamedBlocks) -> Iterator[dict[str, torch.Tensor]]:
        for row in original(self):
            fetched.append(1)
            yield row

    monkeypatch.setattr(StreamedBlocks, "__iter__", counted)
    run_recipe(recipe, tmp_path / "parts", progress=False)
    # Five steps of four rows and what the loader reads ahead: nothing was skipped.
    assert len(fetched) <= 5 * 4 + 4
    whole, parts = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
