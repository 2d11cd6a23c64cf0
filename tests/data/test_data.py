"""Text to tokens to batches: packing, padding, the standard library corpus."""

import os

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from quietstar.data.blocks import Blocks, StreamedBlocks, TokenBlocks, cut_blocks, read_blocks, tokenize
from quietstar.data.collator import PaddingCollator, collator_for
from quietstar.data.stdlib import (
    SPECIAL_TOKENS,
    Document,
    in_split,
    load_stdlib,
    stdlib_files,
    train_tokenizer,
)
from quietstar.errors import UserError

TEXTS = [f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * (i + 1) for i in range(9)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


def documents() -> list[Document]:
    return [Document(str(i), text) for i, text in enumerate(TEXTS)]


class TestPacking:
    def test_concat_is_the_stream_cut_in_equal_blocks(self, tokenizer: PreTrainedTokenizerFast):
        stream = [t for text in TEXTS for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        rows = list(cut_blocks(tokenize(documents(), tokenizer), Blocks(32)))
        assert all(len(row) == 32 for row in rows)
        assert [t for row in rows for t in row] == stream[: len(stream) // 32 * 32]

    def test_document_is_one_row_each_from_its_start(self, tokenizer: PreTrainedTokenizerFast):
        rows = list(cut_blocks(tokenize(documents(), tokenizer), Blocks(40, "document")))
        assert len(rows) == len(TEXTS)
        for row, text in zip(rows, TEXTS, strict=True):
            whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            assert row == whole[:40]

    def test_documents_too_short_to_think_in_are_left_out(self):
        rows = cut_blocks([[1, 2], [1, 2, 3], [1]], Blocks(8, "document", min_tokens=3))
        assert list(rows) == [[1, 2, 3]]

    def test_streamed_equals_in_memory(self, tokenizer: PreTrainedTokenizerFast):
        memory, used = read_blocks(documents_iter, tokenizer, Blocks(16), progress=False)
        streamed = list(StreamedBlocks(documents_iter, tokenizer, Blocks(16)))
        assert used == len(TEXTS) and len(memory) == len(streamed)
        for i, item in enumerate(streamed):
            for key, value in item.items():
                assert torch.equal(value, memory[i][key]), (i, key)

    def test_packed_is_the_stream_with_its_documents(self, tokenizer: PreTrainedTokenizerFast):
        plain = list(cut_blocks(tokenize(documents(), tokenizer), Blocks(32)))
        memory, _ = read_blocks(documents_iter, tokenizer, Blocks(32, "packed"), progress=False)
        streamed = list(StreamedBlocks(documents_iter, tokenizer, Blocks(32, "packed")))
        eos, several = tokenizer.eos_token_id, 0
        assert len(memory) == len(plain) == len(streamed)
        for i, row in enumerate(plain):
            item = memory[i]
            assert item["input_ids"].tolist() == row
            assert all(torch.equal(streamed[i][key], value) for key, value in item.items())
            ends = [j + 1 for j, token in enumerate(row[:-1]) if token == eos]
            several += bool(ends)
            expected = [1 + sum(j >= end for end in ends) for j in range(32)]
            assert item["document_ids"].tolist() == expected
            assert [j for j, label in enumerate(item["labels"].tolist()) if label == -100] == ends
        assert several >= 2
        batch = PaddingCollator(9, "left")([memory[0], {k: v[:5] for k, v in memory[1].items()}])
        assert batch["document_ids"][1].tolist()[:27] == [0] * 27

    def test_documents_without_a_token_are_not_counted(self):
        rows = list(cut_blocks([[1], [], [], [2, 3], [4, 5]], Blocks(3, "packed")))
        assert rows == [[1, 2, 3]] and rows[0].documents == [1, 2, 2]

    def test_evaluation_rows_are_not_trained_on(self, tokenizer: PreTrainedTokenizerFast):
        heldout, used = read_blocks(documents_iter, tokenizer, Blocks(16), max_blocks=3, progress=False)
        assert len(heldout) == 3
        needed = [len(ids) for ids in tokenize(documents(), tokenizer)]
        assert sum(needed[:used]) >= 48 > sum(needed[: used - 1])
        train, _ = read_blocks(documents_iter, tokenizer, Blocks(16), skip=used, progress=False)
        first = [*tokenizer(TEXTS[used])["input_ids"]][:16]
        assert train[0]["input_ids"].tolist() == first

    def test_loader_workers_share_the_documents(self, tokenizer: PreTrainedTokenizerFast):
        data = StreamedBlocks(documents_iter, tokenizer, Blocks(200, "document"))
        rows = [row["input_ids"][0].tolist() for row in DataLoader(data, num_workers=2)]
        whole = [row["input_ids"].tolist() for row in data]
        assert sorted(rows) == sorted(whole)


def documents_iter():  # noqa: ANN201 - module level, so that loader workers can pickle it
    return iter(documents())


class TestCollator:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, side: str):
        rows = [TokenBlocks.from_rows([[5, 6, 7], [8]], 4)[i] for i in range(2)]
        batch = PaddingCollator(9, side)(rows)
        pad = [8, 9, 9] if side == "right" else [9, 9, 8]
        assert batch["input_ids"].tolist() == [[5, 6, 7], pad]
        # With pads before it nothing predicts the 8; in a first column it is no target anyway.
        assert batch["labels"][1].tolist() == ([8, -100, -100] if side == "right" else [-100] * 3)
        assert batch["attention_mask"][1].tolist() == [int(t != 9) for t in pad]

    def test_pad_token_may_be_the_end_token(self, tokenizer: PreTrainedTokenizerFast):
        collate = collator_for(tokenizer, "right")
        collate.pad_id = eos = tokenizer.eos_token_id
        rows = [TokenBlocks.from_rows([[5, 6, 7, eos], [8, eos]], 4)[i] for i in range(2)]
        batch = collate(rows)
        assert batch["labels"].tolist() == [[5, 6, 7, eos], [8, eos, -100, -100]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]

    def test_unknown_side(self):
        with pytest.raises(UserError, match="^padding_side is 'up'; expected left or right"):
            PaddingCollator(0, "up")


class TestTooShort:
    def test_shorter_than_a_block(self, tokenizer: PreTrainedTokenizerFast):
        with pytest.raises(
            UserError, match=r"too short: \d+ tokens in 9 documents .* lower data.block_size"
        ):
            read_blocks(documents_iter, tokenizer, Blocks(10_000), progress=False)

    def test_shorter_than_a_thought_needs(self, tokenizer: PreTrainedTokenizerFast):
        blocks = Blocks(64, "document", min_tokens=30)
        with pytest.raises(UserError, match=r"no row of 30 tokens \(talk_length \+ 2\)"):
            read_blocks(lambda: iter([Document("a", "fox")]), tokenizer, blocks, progress=False)

    def test_nothing_at_all(self, tokenizer: PreTrainedTokenizerFast):
        with pytest.raises(UserError, match="the text has no documents"):
            read_blocks(lambda: iter([]), tokenizer, Blocks(8), progress=False)

    def test_nothing_behind_what_is_evaluated_on(self, tokenizer: PreTrainedTokenizerFast):
        with pytest.raises(
            UserError, match=r"after the first 9, .* set data.eval_files, data.eval_blocks=0"
        ):
            read_blocks(documents_iter, tokenizer, Blocks(8), skip=9, progress=False)

    def test_block_size(self):
        with pytest.raises(
            UserError, match=r"block_size is 3; expected at least 6 \(talk_length \+ 2\)"
        ):
            Blocks(3, min_tokens=6)


class TestStandardLibrary:
    def test_files_are_sorted_real_and_without_tests(self):
        files = stdlib_files()
        assert files == sorted(files) and "argparse.py" in files and len(files) > 200
        assert not any(part in f.split("/") for f in files for part in ("test", "site-packages"))

    def test_folders_of_packages_are_not_walked_through(self, tmp_path, monkeypatch):
        """They are large, and another process may install into them just then."""
        for name in ("one.py", "part/two.py", "site-packages/pip/three.py", "part/test/four.py"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        opened, scandir = [], os.scandir

        def noted(path):
            opened.append(os.path.basename(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", noted)
        assert stdlib_files(tmp_path) == ["one.py", "part/two.py"]
        assert opened == [tmp_path.name, "part"]

    def test_the_split_is_by_name_and_complete(self):
        names = {s: {d.name for d in load_stdlib(s)} for s in ("train", "heldout", "first", "further")}
        assert not names["train"] & names["heldout"] and not names["first"] & names["further"]
        assert names["first"] | names["further"] == names["train"]
        assert min(map(len, names.values())) > 20
        # Fixed by arithmetic: these never change sides, on no machine and in no process.
        assert in_split("calendar.py", "heldout") and in_split("argparse.py", "train")

    def test_unknown_split(self):
        with pytest.raises(UserError, match="no split 'dev'; expected one of heldout"):
            next(load_stdlib("dev"))

    def test_tokenizer(self, tmp_path):
        first, second = (train_tokenizer(TEXTS, 290) for _ in range(2))
        assert first.get_vocab() == second.get_vocab()
        assert first.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]
        first.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        for text in ["plain", "  indented\n\ttab", "naïve 漢字 \N{GRINNING FACE}", ""]:
            ids = loaded(text)["input_ids"]
            assert ids == first(text)["input_ids"]
            assert loaded.decode(ids) == text

    def test_tokenizer_too_small(self):
        with pytest.raises(UserError, match="vocab_size is 100; expected at least 260"):
            train_tokenizer(TEXTS, 100)


def test_rows_in_memory_keep_their_lengths():
    rows = [[1, 2, 3], [4], [5, 6]]
    data = TokenBlocks.from_rows(rows, 3)
    assert len(data) == 3 and data.num_tokens == 6
    assert [data[i]["input_ids"].tolist() for i in range(3)] == rows
    assert data[0]["input_ids"].dtype == torch.int64
