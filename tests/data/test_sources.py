"""Where text comes from: local files and data sets, and what of them cannot be used."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quietstar.data.sources import hub_documents, local_documents, open_documents
from quietstar.data.stdlib import Document
from quietstar.errors import UserError

TEXTS = [f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * (i + 1) for i in range(9)]


def texts_of(path: Path | str, **options: str) -> list[str]:
    return [d.text for d in local_documents(str(path), **options)]


CUT_GZ = gzip.compress(b"words " * 99, mtime=0)[:-20]
Source = Callable[[], Iterator[Document]]


@pytest.fixture
def data_set(tmp_path, monkeypatch) -> Callable[..., Source]:
    """A folder with a data set of these lines, opened by its name."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()

    def write(texts: list[str | None], *more: str, split: str = "train", **options) -> Source:
        lines = [*(json.dumps({"text": text}) for text in texts), *more]
        (tmp_path / "set" / "train.jsonl").write_text("\n".join(lines))
        return open_documents(name=str(tmp_path / "set"), files=None, split=split, **options)

    return write


class TestLocalFiles:
    def test_txt(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_bytes(b"\xef\xbb\xbffirst\nsecond\n\n\nthird \xc3\xa9\n")
        assert texts_of(path) == ["first\nsecond\n\n\nthird é\n"]
        assert texts_of(path, txt_documents="paragraph") == ["first\nsecond\n", "third é\n"]
        assert texts_of(path, txt_documents="line") == ["first", "second", "third é"]

    def test_jsonl_and_gz(self, tmp_path):
        lines = "".join(json.dumps({"body": t, "n": 1}) + "\n" for t in TEXTS)
        (tmp_path / "a.jsonl").write_text(lines)
        with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
            file.write(lines)
        assert texts_of(tmp_path / "a.jsonl", text_column="body") == TEXTS
        assert texts_of(tmp_path / "*.jsonl*", text_column="body") == TEXTS * 2

    def test_parquet(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": TEXTS, "n": range(9)}), tmp_path / "a.parquet")
        assert texts_of(tmp_path / "a.parquet") == TEXTS
        with pytest.raises(UserError, match=r"has no text column 'body'; its columns are: n, text"):
            texts_of(tmp_path / "a.parquet", text_column="body")

    def test_globs_are_sorted_and_counted_once(self, tmp_path):
        for name in "cab":
            (tmp_path / f"{name}.txt").write_text(name)
        found = local_documents([f"{tmp_path}/*.txt", f"{tmp_path}/a.txt"])
        assert [d.text for d in found] == ["a", "b", "c"]

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("no.txt", None, "no.txt does not exist"),
            ("*.nothing", None, "no data file matches"),
            ("empty.txt", b"", "empty.txt is empty; expected text"),
            ("blank.txt", b" \n\n", "holds nothing but white space"),
            ("latin.txt", b"caf\xe9", "latin.txt is not UTF-8 text"),
            ("a.jsonl", b'{"text": \n{"text": 3}\n', "(and 1 more that cannot be used)"),
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
    def test_bad_files(self, tmp_path, name: str, content: bytes | None, words: str):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError) as error:
            texts_of(path)
        assert words in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_file_is_not_counted_beside_its_only_row(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": \n')
        with pytest.raises(UserError, match=r"line 1 is not JSON \([^()]+\)$"):
            texts_of(path)

    def test_csv_tsv_and_json(self, tmp_path):
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

    def test_a_place_is_the_line_in_which_a_row_begins(self, tmp_path, caplog):
        path = tmp_path / "a.csv"
        path.write_text('id,text\n1,"two\nlines"\n2\n3,"two\nmore"\n4,"fields\n",too many\n')
        assert [d.name for d in local_documents(str(path))] == [f"{path}:2", f"{path}:5"]
        places = [record.getMessage().partition(" has ")[0] for record in caplog.records]
        assert places == [f"data file {path}, line {line}" for line in (4, 7)]

    @pytest.mark.parametrize(
        ("rows", "expected"),
        [
            (['"cut\t1', "whole\t2", '5" wide\t3'], ['"cut', "whole", '5" wide']),
            (['"one" word\t1', "whole\t2"], ['"one" word', "whole"]),
            (['"a ""tab""\there"\t1', '"two\nlines"\t2'], ['a "tab"\there', "two\nlines"]),
        ],
    )
    def test_quotes_in_a_tsv(self, tmp_path, rows: list[str], expected: list[str]):
        (tmp_path / "a.tsv").write_text("\n".join(["text\tid", *rows, ""]))
        assert texts_of(tmp_path / "a.tsv") == expected

    def test_a_folder(self, tmp_path):
        with pytest.raises(UserError, match="is a folder; name its files"):
            texts_of(tmp_path)

    def test_a_missing_file_is_found_before_reading(self, tmp_path):
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
    def test_a_row(self, tmp_path, caplog, name: str, bad: bytes, place: str):
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
            ("b.txt.gz", CUT_GZ, "b.txt.gz cannot be read to its end"),
        ],
    )
    def test_a_file_of_a_glob(self, tmp_path, caplog, name: str, content: bytes, words: str):
        for other in "ac":
            (tmp_path / f"{other}.txt").write_text(other)
        (tmp_path / name).write_bytes(content)
        assert texts_of(tmp_path / "*") == ["a", "c"]
        assert words in caplog.records[0].getMessage()

    def test_a_picture_of_a_glob(self, tmp_path, caplog):
        (tmp_path / "a.png").write_bytes(b"\x89PNG")
        picture = "a.png cannot be read; expected plain text"
        with pytest.raises(UserError, match=picture):
            texts_of(tmp_path / "*")
        (tmp_path / "b.txt").write_text("words")
        open_documents(name=None, files=[f"{tmp_path}/*"], split="")
        assert texts_of(tmp_path / "*") == ["words"]
        (record,) = caplog.records
        assert picture in record.getMessage() and record.getMessage().endswith("left out (1 so far)")
        with pytest.raises(UserError, match=picture):
            texts_of(tmp_path / "a.png")

    def test_a_column_that_no_row_of_a_file_has_is_an_error(self, tmp_path):
        (tmp_path / "a.txt").write_text("words")
        (tmp_path / "b.jsonl").write_text('{"body": "x"}\n' * 2000)
        with pytest.raises(UserError, match="b.jsonl, line 1 has no text column 'text'"):
            texts_of(tmp_path / "*")

    def test_many_are_counted_and_few_are_named(self, tmp_path, caplog):
        rows = [{"text": "good" if i % 10 == 0 else i} for i in range(200)]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert texts_of(tmp_path / "a.jsonl") == ["good"] * 20
        said = [record.getMessage().rpartition("(")[2] for record in caplog.records]
        assert said == [f"{number} so far)" for number in (1, 2, 3, 10, 100)]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_rows_of_a_data_set(self, data_set, streaming: bool):
        texts = ["a", None, "b", " ", "c"]
        source = data_set(texts, streaming=streaming)
        assert [d.text for d in source()] == ["a", "", "b", "", "c"]
        # What the data set's own reader cannot read is its last word.
        data_set(texts, '{"text": "\\ud83d"}')
        with pytest.raises(UserError, match="data set .*set"):
            list(source())

    def test_rows_without_text_are_documents_without_text(self, tmp_path):
        (tmp_path / "a.jsonl").write_text(
            "\n".join(json.dumps({"text": t}) for t in (None, "", " ", "a"))
        )
        assert texts_of(tmp_path / "a.jsonl") == ["", "", "", "a"]


class TestHub:
    def test_a_local_folder_through_datasets(self, data_set):
        for streaming in (False, True):
            source = data_set(TEXTS, streaming=streaming, shuffle_buffer=0)
            assert [d.text for d in source()] == TEXTS
        with pytest.raises(UserError, match="no text column 'body'; its columns are: text"):
            list(data_set(TEXTS, text_column="body")())
        with pytest.raises(UserError, match="cannot load split 'tset' of data set"):
            list(data_set(TEXTS, split="tset")())

    def test_a_stream_that_does_not_tell_its_columns(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

        class Rows(list[dict[str, str]]):
            column_names = None

        def read(rows: list[dict[str, str]], column: str) -> list[str]:
            monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: Rows(rows))
            return [d.text for d in hub_documents("some/set", text_column=column, streaming=True)]

        rows = [{"text": text} for text in TEXTS]
        missing = "row 0 has no text column 'body'; its columns are: text"
        with pytest.raises(UserError, match=missing):
            read(rows, "body")
        # Of many rows not all are read.
        with pytest.raises(UserError, match="row 1000 has no text column 'body'; .* text"):
            read([{"text": "x"}] * 3000 + [{"body": "x"}], "body")
        assert read([*rows, {"body": "late"}], "body") == ["late"]
        assert missing in caplog.records[0].getMessage()
