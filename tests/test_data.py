"""Text to tokens to batches: sources, packing, padding, the standard library corpus, bad files."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from quietstar.corpora import (
    SPECIAL_TOKENS,
    Document,
    in_split,
    load_stdlib,
    stdlib_files,
    train_tokenizer,
)
from quietstar.data import (
    Blocks,
    PaddingCollator,
    StreamedBlocks,
    TokenBlocks,
    collator_for,
    cut_blocks,
    read_blocks,
    tokenize,
)
from quietstar.errors import UserError
from quietstar.sources import local_documents, open_documents

TEXTS = [f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * (i + 1) for i in range(9)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


def documents() -> list[Document]:
    return [Document(str(i), text) for i, text in enumerate(TEXTS)]


def texts_of(path: Path | str, **options: str) -> list[str]:
    return [d.text for d in local_documents(str(path), **options)]


class TestPacking:
    def test_concat_is_the_stream_cut_in_equal_blocks(self, tokenizer: PreTrainedTokenizerFast) -> None:
        stream = [t for text in TEXTS for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        rows = list(cut_blocks(tokenize(documents(), tokenizer), Blocks(32)))
        assert all(len(row) == 32 for row in rows)
        assert [t for row in rows for t in row] == stream[: len(stream) // 32 * 32]

    def test_document_is_one_row_each_from_its_start(self, tokenizer: PreTrainedTokenizerFast) -> None:
        rows = list(cut_blocks(tokenize(documents(), tokenizer), Blocks(40, "document")))
        assert len(rows) == len(TEXTS)
        for row, text in zip(rows, TEXTS, strict=True):
            whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            assert row == whole[:40]

    def test_documents_too_short_to_think_in_are_left_out(self) -> None:
        rows = cut_blocks([[1, 2], [1, 2, 3], [1]], Blocks(8, "document", min_tokens=3))
        assert list(rows) == [[1, 2, 3]]

    def test_streamed_equals_in_memory(self, tokenizer: PreTrainedTokenizerFast) -> None:
        memory, used = read_blocks(documents_iter, tokenizer, Blocks(16), progress=False)
        streamed = list(StreamedBlocks(documents_iter, tokenizer, Blocks(16)))
        assert used == len(TEXTS) and len(memory) == len(streamed)
        for i, item in enumerate(streamed):
            for key, value in item.items():
                assert torch.equal(value, memory[i][key]), (i, key)

    def test_packed_is_the_stream_with_its_documents(self, tokenizer: PreTrainedTokenizerFast) -> None:
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

    def test_documents_without_a_token_are_not_counted(self) -> None:
        rows = list(cut_blocks([[1], [], [], [2, 3], [4, 5]], Blocks(3, "packed")))
        assert rows == [[1, 2, 3]] and rows[0].documents == [1, 2, 2]

    def test_evaluation_rows_are_not_trained_on(self, tokenizer: PreTrainedTokenizerFast) -> None:
        heldout, used = read_blocks(documents_iter, tokenizer, Blocks(16), max_blocks=3, progress=False)
        assert len(heldout) == 3
        needed = [len(ids) for ids in tokenize(documents(), tokenizer)]
        assert sum(needed[:used]) >= 48 > sum(needed[: used - 1])
        train, _ = read_blocks(documents_iter, tokenizer, Blocks(16), skip=used, progress=False)
        first = [*tokenizer(TEXTS[used])["input_ids"]][:16]
        assert train[0]["input_ids"].tolist() == first

    def test_loader_workers_share_the_documents(self, tokenizer: PreTrainedTokenizerFast) -> None:
        data = StreamedBlocks(documents_iter, tokenizer, Blocks(200, "document"))
        rows = [row["input_ids"][0].tolist() for row in DataLoader(data, num_workers=2)]
        whole = [row["input_ids"].tolist() for row in data]
        assert sorted(rows) == sorted(whole)


def documents_iter():  # noqa: ANN201 - module level, so that loader workers can pickle it
    return iter(documents())


class TestCollator:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, side: str) -> None:
        rows = [TokenBlocks.from_rows([[5, 6, 7], [8]], 4)[i] for i in range(2)]
        batch = PaddingCollator(9, side)(rows)
        pad = [8, 9, 9] if side == "right" else [9, 9, 8]
        assert batch["input_ids"].tolist() == [[5, 6, 7], pad]
        # With pads before it nothing predicts the 8; in a first column it is no target anyway.
        assert batch["labels"][1].tolist() == ([8, -100, -100] if side == "right" else [-100] * 3)
        assert batch["attention_mask"][1].tolist() == [int(t != 9) for t in pad]

    def test_pad_token_may_be_the_end_token(self, tokenizer: PreTrainedTokenizerFast) -> None:
        collate = collator_for(tokenizer, "right")
        collate.pad_id = eos = tokenizer.eos_token_id
        rows = [TokenBlocks.from_rows([[5, 6, 7, eos], [8, eos]], 4)[i] for i in range(2)]
        batch = collate(rows)
        assert batch["labels"].tolist() == [[5, 6, 7, eos], [8, eos, -100, -100]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]

    def test_unknown_side(self) -> None:
        with pytest.raises(UserError, match="padding_side is 'up'; expected left or right"):
            PaddingCollator(0, "up")


class TestLocalFiles:
    def test_txt(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(b"\xef\xbb\xbffirst\nsecond\n\n\nthird \xc3\xa9\n")
        assert texts_of(path) == ["first\nsecond\n\n\nthird é\n"]
        assert texts_of(path, txt_documents="paragraph") == ["first\nsecond\n", "third é\n"]
        assert texts_of(path, txt_documents="line") == ["first", "second", "third é"]

    def test_jsonl_and_gz(self, tmp_path: Path) -> None:
        lines = "".join(json.dumps({"body": t, "n": 1}) + "\n" for t in TEXTS)
        (tmp_path / "a.jsonl").write_text(lines)
        with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
            file.write(lines)
        assert texts_of(tmp_path / "a.jsonl", text_column="body") == TEXTS
        assert texts_of(tmp_path / "*.jsonl*", text_column="body") == TEXTS * 2

    def test_parquet(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": TEXTS, "n": range(9)}), tmp_path / "a.parquet")
        assert texts_of(tmp_path / "a.parquet") == TEXTS
        with pytest.raises(UserError, match=r"has no text column 'body'; its columns are: n, text"):
            texts_of(tmp_path / "a.parquet", text_column="body")

    def test_globs_are_sorted_and_counted_once(self, tmp_path: Path) -> None:
        for name in "cab":
            (tmp_path / f"{name}.txt").write_text(name)
        found = local_documents([f"{tmp_path}/*.txt", f"{tmp_path}/a.txt"])
        assert [d.text for d in found] == ["a", "b", "c"]

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("no.txt", None, "no.txt does not exist"),
            ("*.nothing", None, "pattern matches no file"),
            ("empty.txt", b"", "empty.txt is empty; expected text"),
            ("blank.txt", b" \n\n", "holds nothing but white space"),
            ("latin.txt", b"caf\xe9", "latin.txt is not UTF-8 text"),
            ("a.jsonl", b'{"text": \n{"text": 3}\n', "line 1 is not JSON"),
            ("a.jsonl", b'{"body": "x", "id": 1}\n', "no text column 'text'; its columns are: body, id"),
            ("a.jsonl", b'{"text": 3}\n', "column 'text' holds int; expected text"),
            ("a.jsonl", b'["x"]\n', "line 1 is a JSON list; expected an object"),
            ("a.jsonl", b"\n\n", "has no rows"),
            ("a.json", b"[]", "a.json has no rows"),
            ("a.csv", b"text\n", "a.csv has no rows"),
            ("a.csv", b"id;text\n1;x\n", "no text column 'text'; its columns are: id;text"),
            ("a.pdf", b"%PDF-1.4", "a.pdf cannot be read; expected plain text, jsonl, json, csv or tsv"),
            ("a.parquet", b"PAR2 nonsense", "cannot be read as parquet"),
            ("a.txt.gz", b"not gzip", "cannot be read"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError) as error:
            texts_of(path)
        assert words in str(error.value)
        assert "\n" not in str(error.value)

    def test_csv_tsv_and_json(self, tmp_path: Path) -> None:
        texts = ["plain", 'with, comma and "quotes"', "two\nlines", "é"]
        (tmp_path / "a.csv").write_text(
            'id,text\r\n1,plain\r\n2,"with, comma and ""quotes"""\r\n3,"two\nlines"\r\n4,é\r\n',
            newline="",
        )
        (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts], indent=1))
        (tmp_path / "a.tsv").write_text("text\tid\n" + "".join(f"{t}\t1\n" for t in ("a, b", "c")))
        with gzip.open(tmp_path / "b.csv.gz", "wb") as file:
            file.write((tmp_path / "a.csv").read_bytes())
        for name in ("a.csv", "b.csv.gz", "a.json"):
            assert texts_of(tmp_path / name) == texts, name
        assert texts_of(tmp_path / "a.tsv") == ["a, b", "c"]

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="is a folder; name its files"):
            texts_of(tmp_path)

    def test_a_missing_file_is_found_before_reading(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="does not exist"):
            open_documents(name=None, files=[str(tmp_path / "no.txt")], split="train")


class TestLeftOut:
    """Rows and files that cannot be used cost a warning with their place, and nothing else."""

    @pytest.mark.parametrize(
        ("name", "bad", "place"),
        [
            ("a.jsonl", b'{"text": "cut', "line 2 is not JSON"),
            ("a.jsonl", b'{"text": "half \\ud83d"}', "line 2 cannot be used: column 'text' holds half"),
            ("a.jsonl", b'{"text": "caf\xe9"}', "line 2 is not UTF-8 text"),
            ("a.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "line 2 is beyond the JSON parser"),
            ("a.jsonl", b"[" * 100_000, "line 2 is beyond the JSON parser (nested too deeply)"),
            ("a.jsonl", b'{"text": NaN}', "line 2 cannot be used: column 'text' holds float"),
            ("a.jsonl", b'{"body": "x"}', "line 2 has no text column 'text'; its columns are: body"),
            ("a.jsonl", b"\0\0\0", "line 2 is not JSON"),
            ("a.json", b'{"text": 5}', "line 2 cannot be used: column 'text' holds int"),
            ("lines.txt", b"caf\xe9", "lines.txt, line 2 is not UTF-8 text"),
            ("a.csv", b"one,two", "line 3 has 2 fields; expected 1"),
            ("a.csv", b"caf\xe9", "line 3 is not UTF-8 text"),
        ],
    )
    def test_a_row(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, bad: bytes, place: str
    ) -> None:
        good = b'{"text": "first"}' if name.startswith("a.json") else b"first"
        head = [b"text"] if name == "a.csv" else []
        path = tmp_path / name
        path.write_bytes(b"\n".join([*head, good, bad, good.replace(b"first", b"last")]))
        source = open_documents(name=None, files=[str(path)], split="", txt_documents="line")
        for _ in range(2):  # a second pass leaves the same out and says nothing
            assert [document.text for document in source()] == ["first", "last"]
        (record,) = caplog.records
        assert place in record.getMessage() and "left out (1 so far)" in record.getMessage()

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("b.txt", b"", "b.txt is empty"),
            ("b.txt", b"\n \n", "b.txt holds nothing but white space"),
            ("b.txt", b"\xff\xfea\0", "b.txt is not UTF-8 text"),
            ("b.jsonl", b"\n", "b.jsonl has no rows"),
            ("b.json", b'[{"text": "x"}, {"te', "b.json is not JSON"),
            ("b.parquet", b"PAR1", "b.parquet cannot be read as parquet"),
            ("b.txt.gz", b"not gzip", "b.txt.gz cannot be read to its end"),
            ("b.txt.gz", gzip.compress(b"words " * 99)[:-20], "b.txt.gz cannot be read to its end"),
        ],
    )
    def test_a_file_of_a_glob(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes, words: str
    ) -> None:
        for other in "ac":
            (tmp_path / f"{other}.txt").write_text(other)
        (tmp_path / name).write_bytes(content)
        assert texts_of(tmp_path / "*") == ["a", "c"]
        assert words in caplog.records[0].getMessage()

    def test_a_column_that_no_row_of_a_file_has_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("words")
        (tmp_path / "b.jsonl").write_text('{"body": "x"}\n' * 2000)
        with pytest.raises(UserError, match="b.jsonl, line 1 has no text column 'text'"):
            texts_of(tmp_path / "*")

    def test_many_are_counted_and_few_are_named(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        rows = [{"text": "good" if i % 10 == 0 else i} for i in range(200)]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert texts_of(tmp_path / "a.jsonl") == ["good"] * 20
        said = [record.getMessage().rpartition("(")[2] for record in caplog.records]
        assert said == [f"{number} so far)" for number in (1, 2, 3, 10, 100)]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_rows_of_a_data_set(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        streaming: bool,
    ) -> None:
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        (tmp_path / "set").mkdir()
        lines = [json.dumps({"text": text}) for text in ("a", None, "b", " ", "c")]
        (tmp_path / "set" / "train.jsonl").write_text("\n".join(lines))
        source = open_documents(
            name=str(tmp_path / "set"), files=None, split="train", streaming=streaming
        )
        assert [d.text for d in source()] == ["a", "", "b", "", "c"]
        # What the data set's own reader cannot read is its last word.
        (tmp_path / "set" / "train.jsonl").write_text("\n".join([*lines, '{"text": "\\ud83d"}']))
        with pytest.raises(UserError, match="data set .*set"):
            list(source())

    def test_rows_without_text_are_documents_without_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(
            "\n".join(json.dumps({"text": t}) for t in (None, "", " ", "a"))
        )
        assert texts_of(tmp_path / "a.jsonl") == ["", "", "", "a"]


class TestTooShort:
    def test_shorter_than_a_block(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(
            UserError, match=r"too short: \d+ tokens in 9 documents .* lower data.block_size"
        ):
            read_blocks(documents_iter, tokenizer, Blocks(10_000), progress=False)

    def test_shorter_than_a_thought_needs(self, tokenizer: PreTrainedTokenizerFast) -> None:
        blocks = Blocks(64, "document", min_tokens=30)
        with pytest.raises(UserError, match=r"no row of 30 tokens \(talk_length \+ 2\)"):
            read_blocks(lambda: iter([Document("a", "fox")]), tokenizer, blocks, progress=False)

    def test_nothing_at_all(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(UserError, match="the text has no documents"):
            read_blocks(lambda: iter([]), tokenizer, Blocks(8), progress=False)

    def test_block_size(self) -> None:
        with pytest.raises(
            UserError, match=r"block_size is 3; expected at least 6 \(talk_length \+ 2\)"
        ):
            Blocks(3, min_tokens=6)


class TestHub:
    def test_a_local_folder_through_datasets(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        (tmp_path / "set").mkdir()
        lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS)
        (tmp_path / "set" / "train.jsonl").write_text(lines)
        for streaming in (False, True):
            source = open_documents(
                name=str(tmp_path / "set"),
                files=None,
                split="train",
                streaming=streaming,
                shuffle_buffer=0,
            )
            assert [d.text for d in source()] == TEXTS
        wrong = open_documents(name=str(tmp_path / "set"), files=None, split="train", text_column="body")
        with pytest.raises(UserError, match="no text column 'body'; its columns are: text"):
            list(wrong())
        wrong = open_documents(name=str(tmp_path / "set"), files=None, split="tset")
        with pytest.raises(UserError, match="cannot load split 'tset' of data set"):
            list(wrong())


class TestStandardLibrary:
    def test_files_are_sorted_real_and_without_tests(self) -> None:
        files = stdlib_files()
        assert files == sorted(files) and "argparse.py" in files and len(files) > 200
        assert not any(part in f.split("/") for f in files for part in ("test", "site-packages"))

    def test_the_split_is_by_name_and_complete(self) -> None:
        names = {s: {d.name for d in load_stdlib(s)} for s in ("train", "heldout", "first", "further")}
        assert not names["train"] & names["heldout"] and not names["first"] & names["further"]
        assert names["first"] | names["further"] == names["train"]
        assert min(map(len, names.values())) > 20
        # Fixed by arithmetic: these never change sides, on no machine and in no process.
        assert in_split("calendar.py", "heldout") and in_split("argparse.py", "train")

    def test_unknown_split(self) -> None:
        with pytest.raises(UserError, match="no split 'dev'; expected one of heldout"):
            next(load_stdlib("dev"))

    def test_tokenizer(self, tmp_path: Path) -> None:
        first, second = (train_tokenizer(TEXTS, 290) for _ in range(2))
        assert first.get_vocab() == second.get_vocab()
        assert first.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3]
        first.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        for text in ["plain", "  indented\n\ttab", "naïve 漢字 \N{GRINNING FACE}", ""]:
            ids = loaded(text)["input_ids"]
            assert ids == first(text)["input_ids"]
            assert loaded.decode(ids) == text

    def test_tokenizer_too_small(self) -> None:
        with pytest.raises(UserError, match="vocab_size is 100; expected at least 260"):
            train_tokenizer(TEXTS, 100)


def test_rows_in_memory_keep_their_lengths() -> None:
    rows = [[1, 2, 3], [4], [5, 6]]
    data = TokenBlocks.from_rows(rows, 3)
    assert len(data) == 3 and data.num_tokens == 6
    assert [data[i]["input_ids"].tolist() for i in range(3)] == rows
    assert data[0]["input_ids"].dtype == torch.int64
