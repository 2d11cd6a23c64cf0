"""Prompts and completions: from rows of any source to ids, labels and the place to think at."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from real_data import real_data
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from quietstar.data.blocks import Blocks, StreamedBlocks, TokenBlocks, read_blocks
from quietstar.data.collator import PaddingCollator
from quietstar.data.pairs import PairTokens, encode_pair
from quietstar.data.presets import PRESETS
from quietstar.data.readers import MessagesReader, RowReader, TemplateReader
from quietstar.data.sources import open_documents
from quietstar.data.stdlib import train_tokenizer
from quietstar.errors import UserError

ROWS = [
    {"Body": f"Tom has {n} apples", "Question": f"Are {n} many?", "Equation": f"( {n}.0 + 1.0 )"}
    | {"Answer": n + 1.0}
    for n in range(1, 40)
]
PROMPT, COMPLETION = "Question: {Body:sentence} {Question}\nAnswer:", " {Answer:g}"
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [f"{r['Body']}. {r['Question']} Answer: {r['Answer']:g}" for r in ROWS]
    made = train_tokenizer(texts, 300)
    made.chat_template = CHAT
    return made


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def source(*files: Path, reader: RowReader, **options: Any) -> Callable[[], Any]:
    names = [str(file) for file in files]
    return open_documents(name=None, files=names, split="train", text_column=reader, **options)


def read(file: Path, tokenizer: Any, reader: RowReader, packing: str = "document", **more: Any) -> Any:
    blocks = Blocks(more.pop("block_size", 64), packing)
    return read_blocks(source(file, reader=reader), tokenizer, blocks, progress=False, **more)[0]


def test_a_row_is_its_prompt_and_its_completion(file: Path, tokenizer: PreTrainedTokenizerFast):
    data = read(file, tokenizer, TemplateReader(PROMPT, COMPLETION))
    assert len(data) == len(ROWS)
    for row, item in zip(ROWS, (data[n] for n in range(len(data))), strict=True):
        prompt = f"Question: {row['Body']}. {row['Question']}\nAnswer:"
        before = tokenizer(prompt)["input_ids"]
        after = [*tokenizer(f" {row['Answer']:g}")["input_ids"], tokenizer.eos_token_id]
        assert item["input_ids"].tolist() == before + after
        assert item["labels"].tolist() == [-100] * len(before) + after
        (anchor,) = item["completion_anchors"].tolist()
        first = tokenizer.decode([(before + after)[anchor + 1]])
        blank = [
            tokenizer.decode([token]).strip() for token in (before + after)[len(before) : anchor + 1]
        ]
        assert first.strip() and not any(blank)
        assert encode_pair(tokenizer, prompt, f" {row['Answer']:g}") == {
            name: item[name].tolist() for name in ("input_ids", "labels", "completion_anchors")
        }


def test_every_kind_of_file(file: Path, tmp_path, tokenizer: PreTrainedTokenizerFast):
    import csv

    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(ROWS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    expected = read(file, tokenizer, TemplateReader(PROMPT, COMPLETION)).tokens
    for name in ("a.parquet", "a.json", "a.csv", "a.tsv"):
        found = read(tmp_path / name, tokenizer, TemplateReader(PROMPT, COMPLETION)).tokens
        assert (found == expected).all(), name


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_by_its_name(file: Path, tmp_path, monkeypatch, tokenizer, streaming: bool):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    file.rename(folder / "train.jsonl")
    options: dict[str, Any] = {"streaming": streaming, "shuffle_buffer": 0}
    opened = open_documents(
        name=str(folder),
        files=None,
        split="train",
        text_column=TemplateReader(PROMPT, COMPLETION),
        **options,
    )
    data, _ = read_blocks(opened, tokenizer, Blocks(64, "document"), progress=False)
    whole = read(folder / "train.jsonl", tokenizer, TemplateReader(PROMPT, COMPLETION))
    assert (data.tokens == whole.tokens).all() and (data.marks == whole.marks).all()


@pytest.mark.parametrize("packing", ["document", "packed"])
def test_a_stream_is_what_is_read_at_once_and_continues_row_for_row(file: Path, tokenizer, packing: str):
    reader = TemplateReader(PROMPT, [COMPLETION, " ({Equation:equation}) {Answer:g}"], lenient=True)

    def stream(repeat: bool) -> StreamedBlocks:
        return StreamedBlocks(source(file, reader=reader), tokenizer, Blocks(96, packing), repeat=repeat)

    memory = read(file, tokenizer, reader, packing, block_size=96)
    for number, item in enumerate(stream(False)):
        assert all(torch.equal(item[key], value) for key, value in memory[number].items())
    assert number == len(memory) - 1
    running = iter(stream(True))
    whole = [next(running) for _ in range(3 * len(memory))]
    for stop in (1, len(memory) - 1, len(memory), len(memory) + 2):
        first, other = stream(True), stream(True)
        reading = iter(first)
        for _ in range(stop + 3):
            next(reading)
        other.seek(json.loads(json.dumps(first.position_at(stop))))
        for expected, found in zip(whole[stop:], iter(other), strict=False):
            assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_packed_rows_hold_whole_documents(file: Path, tokenizer: PreTrainedTokenizerFast):
    reader = TemplateReader(PROMPT, COMPLETION)
    alone = read(file, tokenizer, reader)
    packed = read(file, tokenizer, reader, "packed", block_size=150)
    texts = []
    for item in (packed[n] for n in range(len(packed))):
        assert len(item["input_ids"]) <= 150
        places = item["completion_anchors"].tolist()
        for number in item["document_ids"].unique().tolist():
            inside = item["document_ids"] == number
            begin = int(inside.nonzero()[0])
            texts.append(
                {name: item[name][inside].tolist() for name in ("input_ids", "labels")}
                | {"completion_anchors": [p - begin for p in places if inside[p]]}
            )
    assert len(packed) < len(alone) / 2
    expected = [{n: v.tolist() for n, v in alone[i].items() if n != "attention_mask"} for i in range(39)]
    assert texts == expected


def test_one_of_several_completions_is_drawn_by_the_seed(file: Path, tmp_path, tokenizer):
    aside = " ({Equation:equation} = {Answer:g}) {Answer:g}"

    def asides(path: Path, share: float, seed: int) -> list[bool]:
        entries = [{"template": COMPLETION, "share": 1 - share}, {"template": aside, "share": share}]
        reader = TemplateReader(PROMPT, entries, seed=seed)
        return ["(" in document.text for document in source(path, reader=reader)()]

    found = asides(file, 0.3, 0)
    assert 0.1 < sum(found) / len(found) < 0.5
    assert asides(file, 0.3, 0) == found != asides(file, 0.3, 1)
    # A larger share only adds to them, and the folder of the file says nothing.
    assert all(more or not less for less, more in zip(found, asides(file, 0.6, 0), strict=True))
    (tmp_path / "other").mkdir()
    moved = file.rename(tmp_path / "other" / file.name)
    assert asides(moved, 0.3, 0) == found


def test_what_is_too_long_is_left_out_whole_and_counted(tmp_path, tokenizer, caplog):
    long = [{**ROWS[0], "Body": "word " * 40}] * 2
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:3], *long, ROWS[3]]))
    for packing in ("document", "packed"):
        caplog.clear()
        data = read(path, tokenizer, TemplateReader(PROMPT, COMPLETION), packing, block_size=60)
        ends = sum((data[n]["labels"] == tokenizer.eos_token_id).sum() for n in range(len(data)))
        assert ends == 4
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 2 and "expected at most 60 (data.block_size); it is left out (2" in said[1]
    with pytest.raises(UserError, match=r"a.jsonl:1 has \d+ tokens; expected at most 9 .* \(and 5 more"):
        read(path, tokenizer, TemplateReader(PROMPT, COMPLETION), block_size=9)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": " "}, "line 2 has an empty completion; expected text to learn"),
        ({"text": None}, "line 2 cannot fill data.completion '{text}': column 'text' holds null"),
        (
            {"words": 1},
            "line 2 has no column 'text' for data.completion '{text}'; its columns are: q, w",
        ),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, tokenizer, caplog, row: dict[str, Any], said: str):
    path = tmp_path / "a.jsonl"
    good = {"q": "why", "text": "so"}
    path.write_text("\n".join(map(json.dumps, [good, {"q": "why", **row}, good])))
    with pytest.raises(UserError, match=said.replace("{", r"\{")):
        read(path, tokenizer, TemplateReader("{q}:", "{text}"))
    # A stream's training goes on, once something could be used.
    data = read(path, tokenizer, TemplateReader("{q}:", "{text}", lenient=True))
    assert len(data) == 2 and said.partition(" cannot")[0] in caplog.records[0].getMessage()
    path.write_text(json.dumps({"q": "why", **row}))
    with pytest.raises(UserError, match=said.replace("line 2", "line 1").replace("{", r"\{")):
        read(path, tokenizer, TemplateReader("{q}:", "{text}", lenient=True))


def test_a_plain_text_has_no_columns(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(UserError, match="a.txt is plain text; expected rows with columns"):
        read(tmp_path / "a.txt", tokenizer, TemplateReader(PROMPT, COMPLETION))


def test_a_prompt_without_a_token(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "so"}))
    with pytest.raises(UserError, match="a.jsonl:1 has no token before its completion"):
        read(tmp_path / "a.jsonl", tokenizer, TemplateReader("", "{text}"))
    with pytest.raises(UserError, match="the prompt is empty and the tokenizer has no begin-of-text"):
        encode_pair(tokenizer, "", " so")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": "{x}"}, "data.prompt is given without data.completion; expected both, or"),
        ({"completion": "{x}"}, "data.completion is given without data.prompt"),
        ({"preset": "swamp"}, "data.preset is 'swamp'; expected one of .*; did you mean svamp?"),
        ({"prompt": "{x}", "completion": []}, "data.completion is an empty list"),
        ({"prompt": "{x}", "completion": [3]}, "data.completion has the entry 3; expected a template"),
        (
            {"prompt": "{x}", "completion": [{"template": "{x}", "share": 0}]},
            "data.completion has the share 0; expected a number above 0",
        ),
        (
            {"prompt": "{x}", "completion": [{"template": "{x}", "part": 1}]},
            "data.completion has the entry {'template': '{x}', 'part': 1}; expected",
        ),
    ],
)
def test_readers_that_make_no_sense(options: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said.replace("{", r"\{").replace("?", r"\?")):
        TemplateReader(**options)


# ---- conversations ------------------------------------------------------------------------------


def talk(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_the_assistant_s_last_message_is_the_completion(tmp_path, tokenizer):
    path = tmp_path / "chat.jsonl"
    row = talk(
        ("user", "Tom has 1"), ("assistant", "no"), ("user", "2?"), ("assistant", "3"), ("user", "x")
    )
    path.write_text(json.dumps(row))
    (item,) = (read(path, tokenizer, MessagesReader("messages", tokenizer))[n] for n in range(1))
    eos = tokenizer.eos_token
    prompt = f"<|user|>\nTom has 1{eos}\n<|assistant|>\nno{eos}\n<|user|>\n2?{eos}\n<|assistant|>\n"
    ids = {
        name: tokenizer(text, add_special_tokens=False)["input_ids"]
        for name, text in (("prompt", prompt), ("answer", f"3{eos}"))
    }
    assert item["input_ids"].tolist() == ids["prompt"] + ids["answer"]
    assert item["labels"].tolist() == [-100] * len(ids["prompt"]) + ids["answer"]
    assert item["completion_anchors"].tolist() == [len(ids["prompt"]) - 1]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            talk(("user", "why")),
            "line 1 has no message of the assistant in column 'messages', only user",
        ),
        (talk(("user", "why"), ("assistant", " ")), "line 1 has an empty completion"),
        (
            {"messages": "why"},
            "line 1 cannot be used: column 'messages' holds 'why'; expected a list of",
        ),
        ({"messages": []}, "line 1 has no message of the assistant .*, only no message"),
        ({"talk": []}, "line 1 has no column 'messages'; its columns are: talk"),
    ],
)
def test_conversations_that_cannot_be_used(tmp_path, tokenizer, row: dict[str, Any], said: str):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=said):
        read(tmp_path / "a.jsonl", tokenizer, MessagesReader("messages", tokenizer))


def test_chat_templates_that_cannot_be_used(tmp_path, tokenizer):
    plain = train_tokenizer(["words"], 270)
    with pytest.raises(
        UserError, match="data.messages is 'messages' and the tokenizer has no chat templ"
    ):
        MessagesReader("messages", plain)
    (tmp_path / "a.jsonl").write_text(json.dumps(talk(("user", "a"), ("assistant", "b"))))
    for template, said in (
        (
            "{{ raise_exception('roles!') }}",
            "cannot be written by the tokenizer's chat template: roles!",
        ),
        ("{{ messages | length }}: {{ messages[-1].content }}", "in another way than with it"),
    ):
        plain.chat_template = template
        with pytest.raises(UserError, match=said):
            read(tmp_path / "a.jsonl", plain, MessagesReader("messages", plain))


# ---- real data and tokenizers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "file", "first"),
    [
        (
            "svamp",
            "svamp/train.jsonl",
            "Question: Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each"
            " pack. How much do you have to pay to buy each pack?\nAnswer:| 51\n",
        ),
        ("gsm8k", "gsm8k/train.jsonl", "Q: Natalia sold clips to 48 of her friends in April|\nA:| 72\n"),
        (
            "gsm8k-steps",
            "gsm8k/train.jsonl",
            "Q: Natalia|\nA:| Natalia sold 48/2 = 24 clips|\n#### 72\n",
        ),
        ("csqa", "commonsenseqa/train.jsonl", "Q: The sanctions|?\n(A) ignore\n(B) enforce|\nA:| A\n"),
    ],
)
def test_presets_on_the_published_files(preset: str, file: str, first: str):
    documents = list(source(real_data(file), reader=TemplateReader(preset=preset))())
    assert len(documents) == sum(1 for line in real_data(file).open() if line.strip())
    text = f"{documents[0].prompt}{documents[0].text}"
    for part in first.split("|"):
        assert part in text
        text = text[text.index(part) + len(part) :]
    assert not text
    for document in documents:
        assert document.prompt and "<<" not in document.text
        assert preset == "gsm8k-steps" or not document.text.endswith(".0\n")


def test_the_hub_s_layout_of_csqa_gives_the_same_text():
    nested = {"question": {"stem": "Why?", "choices": [{"label": "A", "text": "so"}]}, "answerKey": "A"}
    flat = {"question": "Why?", "choices": {"label": ["A"], "text": ["so"]}, "answerKey": "A"}
    reader = TemplateReader(preset="csqa")
    assert reader.fields(nested, "") == reader.fields(flat, "") == (" A\n", "Q: Why?\n(A) so\nA:", False)
    assert len(PRESETS["csqa"].layouts) == 2


@pytest.mark.parametrize("name", ["gpt2", "mistral", "pythia", "qwen2_5"])
def test_the_boundary_is_where_it_is_with_real_tokenizers(name: str):
    """The ids decode to the text, and the completion begins with a space only where it has one."""
    kind = GPT2Tokenizer if name == "gpt2" else AutoTokenizer  # of which there are the bare lists
    tokenizer = kind.from_pretrained(real_data(f"tokenizers/{name}"))
    for completion in (" 51", "51", " (43 - 21 = 22) 22", "\n51", "answer"):
        row = encode_pair(tokenizer, "Question: Why?\nAnswer:", completion)
        start = row["labels"].count(-100)
        assert row["input_ids"][:start] == tokenizer("Question: Why?\nAnswer:")["input_ids"]
        ids = row["input_ids"]
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert whole.endswith(f"Answer:{completion}")
        assert ids[-1] == tokenizer.eos_token_id
        (anchor,) = row["completion_anchors"]
        assert not tokenizer.decode(ids[start : anchor + 1]).strip()
        assert tokenizer.decode([ids[anchor + 1]]).strip() and anchor >= start - 1


def test_plain_data_of_a_pair():
    pair = PairTokens([4, 5, 6], 2, 1)
    again = PairTokens.of_plain(json.loads(json.dumps(pair.to_plain())))
    assert again == pair and (again.prompt, again.anchor) == (2, 1) and again.marks() == [0, 2, 1]
    assert TokenBlocks.from_rows([[1, 2]], 2).marks is None
    assert "completion_anchors" not in PaddingCollator()([TokenBlocks.from_rows([[1, 2]], 2)[0]])
