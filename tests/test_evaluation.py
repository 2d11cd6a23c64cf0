"""``quietstar eval``: the metric by hand, tokens, intervals, resumption, errors, the harness."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import tiny_decoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar import QuietStarForCausalLM, cli
from quietstar.corpora import train_tokenizer
from quietstar.errors import UserError
from quietstar.evaluation import chains, controls, reasoning
from quietstar.evaluation.items import load_rows, read_table
from quietstar.evaluation.journal import Journal
from quietstar.evaluation.perplexity import token_losses
from quietstar.evaluation.run import assign_files, fingerprint
from quietstar.evaluation.statistics import bootstrap
from quietstar.evaluation.tasks import OWN, Settings
from quietstar.tokens import add_meta_tokens

GSM_ROWS = [
    {
        "question": f"Tom has {n} apples and buys {n}. How many?",
        "answer": f"{n}+{n}={2 * n}\n#### {2 * n}",
    }
    for n in range(4, 10)
]
CSQA_ROWS = [
    {
        "id": str(n),
        "question": f"Where would you put {n} plates?",
        "question_concept": "plate",
        "choices": {"label": list("ABCDE"), "text": ["shelf", "sea", "sky", "road", f"hat {n}"]},
        "answerKey": "ABCDE"[n % 5],
    }
    for n in range(6)
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerFast:
    """A tokenizer that writes " 18" and " A" as one token each."""
    text = "Q: 1 2 3 4 5 6 7 8 9 0\nA: 18\n" + "".join(f"\nA: {x}\n" for x in "ABCDE") * 3
    tokenizer = train_tokenizer([(text + "A: 18\n" * 9) * 3], 340)
    add_meta_tokens(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def splitting() -> PreTrainedTokenizerFast:
    """A tokenizer as Mistral's: the space before a number is a token, digits are split, " A" is one
    token, and what is not in the vocabulary is written in bytes (so "1" is there as a byte as well)."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    names += [*"0123456789ABCDEQ:,abcdefghijklmnopqrstuvwxyzT.?()+"]
    merges = [("▁", letter) for letter in "ABCDE"]
    names += ["".join(pair) for pair in merges]
    core = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def model(merging: PreTrainedTokenizerFast) -> QuietStarForCausalLM:
    decoder = tiny_decoder("llama", vocab_size=len(merging), max_position_embeddings=400)
    model = QuietStarForCausalLM.from_base(decoder, merging, thought_length=3).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        model.mixing_head.fc3.weight.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def folder(
    model: QuietStarForCausalLM,
    merging: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    merging.save_pretrained(path)
    return str(path)


@pytest.fixture
def gsm_file(tmp_path: Path) -> Path:
    path = tmp_path / "gsm.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GSM_ROWS))
    return path


@pytest.fixture
def csqa_file(tmp_path: Path) -> Path:
    path = tmp_path / "csqa.json"
    path.write_text(json.dumps(CSQA_ROWS))
    return path


class FakeModel:
    """Predicts at each position the probabilities of a table, whatever the text."""

    device = torch.device("cpu")

    def __init__(self, table: torch.Tensor):
        self.table = table
        self.config = SimpleNamespace(model_type="llama")

    def __call__(self, input_ids, attention_mask, position_ids, logits_to_keep):
        assert input_ids.shape == attention_mask.shape == position_ids.shape
        rows = self.table[-logits_to_keep:].log().expand(len(input_ids), -1, -1)
        return SimpleNamespace(logits=rows)


# ---- the metric -----------------------------------------------------------------------------------


def test_probability_by_hand():
    """Two answer tokens: (0.2 / 0.5) · (0.3 / 0.6), other tokens' mass left out."""
    valid = torch.tensor([1, 2, 4])
    first = torch.tensor([0.5, 0.2, 0.2, 0.0, 0.1])
    second = torch.tensor([0.1, 0.1, 0.2, 0.3, 0.3])
    logits = torch.stack([first, second]).log()[None] + 3.0
    targets = torch.tensor([[1, 4]])
    found = reasoning.gold_probability(logits, targets, valid)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([0.4 * 0.5])
    # A token that is not valid (3) is given; an absent one (-100) as well.
    targets = torch.tensor([[1, 3], [-100, 4], [3, -100]])
    found = reasoning.gold_probability(logits.expand(3, -1, -1), targets, valid)
    assert found.tolist() == pytest.approx([0.4, 0.5, 1.0])


def test_exact_match_and_choice_by_hand():
    logits = torch.tensor([[[0.0, 2.0, 1.0, 5.0], [3.0, 0.0, 1.0, 2.0]]])
    assert reasoning.exact_match(logits, torch.tensor([[3, 0]])).tolist() == [True]
    assert reasoning.exact_match(logits, torch.tensor([[3, 2]])).tolist() == [False]
    assert reasoning.exact_match(logits, torch.tensor([[-100, 0]])).tolist() == [True]
    # Letters are tokens 1, 2, 3; the answer stands at the second place.
    targets = torch.tensor([[0, 2]])
    assert reasoning.letter_choice(logits, targets, (1, 2, 3), [3]).tolist() == [2]
    assert reasoning.letter_choice(logits, targets, (1, 2, 3), [2]).tolist() == [1]


def test_score_of_a_model_with_known_probabilities():
    """Rows of different lengths in one batch; the fake knows the last three positions only."""
    table = torch.full((3, 8), 0.05)
    table[1, 5], table[2, 6] = 0.65, 0.35
    items = [
        reasoning.Encoded([1, 2, 3, 5, 6], answer=2, cut=False),
        reasoning.Encoded([1, 2, 4, 5, 7], answer=3, cut=True),
    ]
    valid = reasoning.ValidTokens(torch.tensor([4, 5, 6, 7]))
    first, second = reasoning.score_answers(FakeModel(table), items, valid)
    assert first["base_probability"] == pytest.approx((0.65 / 0.8) * (0.35 / 0.5), rel=1e-6)
    assert first["base_correct"] and not first["cut"]
    assert second["base_probability"] == pytest.approx(0.25 * (0.65 / 0.8) * (0.05 / 0.5), rel=1e-6)
    assert not second["base_correct"] and second["cut"]
    assert "mixed_probability" not in first


def test_scores_of_a_thinking_model(model: QuietStarForCausalLM, merging: PreTrainedTokenizerFast):
    """In a padded batch as alone, and equal to the probability read off the full logits."""
    valid = reasoning.number_tokens(merging)
    rows = [*GSM_ROWS[:2], {"question": "1?", "answer": "#### 1234"}]
    items = [reasoning.encode(merging, *reasoning.gsm8k_text(row)) for row in rows]
    together = reasoning.score_answers(model, items, valid)
    assert model.config.thought_kind == "sampled"
    for item, record in zip(items, together, strict=True):
        ids = torch.tensor([item.ids])
        with torch.no_grad():
            mixed = model(ids).logits[0].double()
            with reasoning.without_thoughts(model):
                base = model(ids).logits[0].double()
        for name, logits in (("base", base), ("mixed", mixed)):
            expected = 1.0
            for place in range(len(item.ids) - item.answer, len(item.ids)):
                if item.ids[place] in valid.ids:
                    chances = logits[place - 1].softmax(-1)
                    expected *= float(chances[item.ids[place]] / chances[valid.ids].sum())
            assert record[f"{name}_probability"] == pytest.approx(expected, rel=1e-4)
        assert record["base_probability"] != record["mixed_probability"]


# ---- tokens and prompts ---------------------------------------------------------------------------


def test_number_tokens_of_a_tokenizer_that_splits(splitting: PreTrainedTokenizerFast):
    valid = reasoning.number_tokens(splitting)
    # Ten digits and the newline; "<0x31>" also reads "1", but the tokenizer never writes it.
    expected = {*splitting.convert_tokens_to_ids(list("0123456789")), 3 + 10}
    assert set(valid.ids.tolist()) == expected
    start, ids = reasoning.split_answer(splitting, "Q: a?\nA:", " 18\n")
    assert splitting.convert_ids_to_tokens(ids[start:]) == ["▁", "1", "8", "<0x0A>"]


def test_number_tokens_of_a_tokenizer_that_merges(merging: PreTrainedTokenizerFast):
    valid = set(reasoning.number_tokens(merging).ids.tolist())
    texts = {merging.decode([i]) for i in valid}
    assert {*"0123456789", " 18", "\n"} <= texts
    assert all(t == "\n" or t.strip(" ").isdigit() for t in texts)
    start, ids = reasoning.split_answer(merging, "Q: a?\nA:", " 18\n")
    assert [merging.decode([i]) for i in ids[start:]] == [" 18", "\n"]
    assert set(ids[start:]) <= valid


@pytest.mark.parametrize("name", ["merging", "splitting"])
def test_letter_tokens(name: str, request: pytest.FixtureRequest):
    """The letters as they stand behind a space: one token with it, not the bare letter."""
    tokenizer = request.getfixturevalue(name)
    valid = reasoning.letter_tokens(tokenizer)
    space = "Ġ" if name == "merging" else "▁"
    assert tokenizer.convert_ids_to_tokens(list(valid.letters)) == [f"{space}{x}" for x in "ABCDE"]
    assert len(valid.ids) == 6


def test_a_tokenizer_without_letters_is_refused():
    core = Tokenizer(models.WordLevel({"?": 0, "Q": 1}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")
    with pytest.raises(UserError, match="no token for the letter 'A'"):
        reasoning.letter_tokens(tokenizer)
    with pytest.raises(UserError, match="no token for the digit '0'"):
        reasoning.number_tokens(tokenizer)


def test_prompts():
    assert reasoning.gsm8k_text({"question": "How many?", "answer": "3 * 6 = 18\n#### 1,800"}) == (
        "Q: How many?\nA:",
        " 1,800\n",
    )
    prompt, answer = reasoning.csqa_text(CSQA_ROWS[2])
    assert prompt == (
        "Q: Where would you put 2 plates?\n(A) shelf\n(B) sea\n(C) sky\n(D) road\n(E) hat 2\nA:"
    )
    assert answer == " C\n"


def test_a_long_item_keeps_its_answer(splitting: PreTrainedTokenizerFast):
    whole = reasoning.encode(splitting, "Q: " + "ab " * 40 + "\nA:", " 18\n", max_length=256)
    short = reasoning.encode(splitting, "Q: " + "ab " * 40 + "\nA:", " 18\n", max_length=20)
    assert not whole.cut and short.cut
    assert len(short.ids) == 20 and short.answer == whole.answer == 4
    assert short.ids == whole.ids[-20:]
    with pytest.raises(UserError, match="an answer has 4 tokens; expected fewer than 4"):
        reasoning.encode(splitting, "Q: a\nA:", " 18\n", max_length=5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answerKey": ""}, "answerKey is ''; expected one of A, B, C, D, E"),
        ({"choices": ["a", "b"]}, "choices is"),
        ({"choices": {"label": ["1", "2"], "text": ["a", "b"]}}, "labelled"),
    ],
)
def test_wrong_choices(change: dict, message: str):
    with pytest.raises(UserError, match=message):
        reasoning.csqa_text({**CSQA_ROWS[0], **change})


# ---- intervals ------------------------------------------------------------------------------------


def test_intervals_cover_the_mean():
    """Of 300 samples from a known distribution, about 95 of 100 intervals hold its mean."""
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(300):
        found = bootstrap(generator.normal(2.0, 1.0, 60).tolist(), resamples=400)
        held += found.low <= 2.0 <= found.high
    # 0.95 less the bootstrap's own bias at 60 items; 3 standard errors are 0.038.
    assert 0.90 <= held / 300 <= 0.985


def test_interval_of_known_data():
    found = bootstrap([0.0] * 50 + [1.0] * 50)
    assert found.mean == 0.5
    # The standard error is 0.05.
    assert found.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015)
    assert bootstrap([0.25]) == bootstrap([0.25], seed=3)
    with pytest.raises(ValueError, match="at least one item"):
        bootstrap([])


# ---- chains ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, number",
    [(" 18.", 18), (" $1,234 a day", 1234), (" -3", -3), (" 2.50", 2.5), (" none", None)],
)
def test_numbers(text: str, number: float | None):
    assert chains.find_number(text) == number


def test_votes():
    assert chains.majority([3.0, None, 4.0, 4.0, None, None]) == 4.0
    assert chains.majority([3.0, 4.0]) == 3.0
    assert chains.majority([None]) is None
    assert chains.cut_chain(" It is 4.\n\nQ: What else?") == " It is 4."
    with pytest.raises(UserError, match="votes is 4 at temperature 0"):
        chains.ChainSettings(votes=4, temperature=0.0)


class Oracle:
    """Generates given texts, one per row, and remembers what it was asked."""

    device = torch.device("cpu")
    config = SimpleNamespace(model_type="llama")

    def __init__(self, tokenizer: PreTrainedTokenizerFast, answers: list[list[str]]):
        self.tokenizer, self.answers, self.asked = tokenizer, list(answers), []

    def generate(self, ids, attention_mask, **options):
        rows = [row[mask == 1] for row, mask in zip(ids, attention_mask, strict=True)]
        self.asked.append(self.tokenizer.batch_decode(rows))
        new = [self.tokenizer(text)["input_ids"] for text in self.answers.pop(0)]
        pad = options["pad_token_id"]
        width = max(map(len, new))
        new = torch.tensor([row + [pad] * (width - len(row)) for row in new])
        return torch.cat([ids, new], dim=1)


def test_the_majority_of_chains(merging: PreTrainedTokenizerFast):
    oracle = Oracle(merging, [[" a", " b\nQ: x", " c"], [" 5", " 18.", " 18"]])
    settings = chains.ChainSettings(votes=3)
    record = chains.vote(oracle, merging, "1?", 18.0, settings, seed=0)
    assert record["numbers"] == [5.0, 18.0, 18.0]
    assert record["correct"] and record["answer"] == 18.0
    assert record["share"] == pytest.approx(2 / 3)
    assert oracle.asked[0] == ["Q: 1?\nA: Let's think step by step."] * 3
    assert oracle.asked[1][1] == (
        "Q: 1?\nA: Let's think step by step. b\nTherefore, the answer (arabic numerals) is"
    )


@pytest.mark.parametrize("thinking", ["always", "never"])
def test_chains_of_a_model(model: QuietStarForCausalLM, merging: PreTrainedTokenizerFast, thinking: str):
    """The same item gives the same chains, and torch's generator is left alone."""
    settings = chains.ChainSettings(votes=2, max_new_tokens=4, thinking=thinking)
    state = torch.get_rng_state()
    first = chains.vote(model, merging, "1 2?", 3.0, settings, seed=7)
    assert torch.equal(state, torch.get_rng_state())
    assert bool(model.thoughts) == (thinking == "always")
    assert chains.vote(model, merging, "1 2?", 3.0, settings, seed=7) == first
    assert chains.vote(model, merging, "1 2?", 3.0, settings, seed=8) != first


# ---- perplexity -----------------------------------------------------------------------------------


def test_blocks_of_text():
    assert controls.cut([[1, 2, 3], [4, 5, 6, 7]], 3) == [[1, 2, 3], [4, 5, 6]]
    assert controls.cut([[1, 2, 3], [4, 5]], 3) == [[1, 2, 3], [4, 5]]
    assert controls.cut([[1, 2, 3], [4, 5]], 2, limit=1) == [[1, 2]]
    for count in (2, 3, 10):
        places = controls.moved(count, seed=1)
        assert sorted(places) == list(range(count))
        assert all(place != there for place, there in enumerate(places))


def test_controls_of_a_model(model: QuietStarForCausalLM):
    torch.manual_seed(2)
    blocks = [torch.randint(5, 200, (n,)).tolist() for n in (24, 9, 17)]
    records = controls.block_losses(model, blocks)
    assert model.config.thought_kind == "sampled"
    rows = [
        {"input_ids": torch.tensor(b), "attention_mask": torch.ones(len(b)), "labels": torch.tensor(b)}
        for b in blocks
    ]
    known = token_losses(model, rows, progress=False)
    for row, (block, record) in enumerate(zip(blocks, records, strict=True)):
        n = len(block) - 1
        assert list(record) == list(controls.PREDICTIONS)
        torch.testing.assert_close(record["base"], known.base[row, :n].tolist(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(record["mixed"], known.mixed[row, :n].tolist(), rtol=1e-4, atol=1e-5)
        alone = controls.block_losses(model, [block])[0]
        for name in controls.PREDICTIONS:
            torch.testing.assert_close(record[name], alone[name], rtol=1e-4, atol=1e-5)
            assert name == "base" or record[name] != record["base"]
    summary = controls.summarize_controls(records)
    assert summary["tokens"] == 23 + 8 + 16
    every = [value for record in records for value in record["mixed"]]
    assert summary["nll"]["mixed"]["mean"] == pytest.approx(np.mean(every))
    shares = [d["base"]["mean"] for d in summary["nll_by_decile"]]
    assert shares == sorted(shares)


def test_controls_are_what_they_say(model: QuietStarForCausalLM, monkeypatch: pytest.MonkeyPatch):
    """Each control against the model itself, brought to the same by its public arguments."""
    torch.manual_seed(3)
    ids = torch.randint(5, 200, (1, 20))
    (record,) = controls.block_losses(model, ids.tolist())

    def losses(**arguments: torch.Tensor) -> list[float]:
        with torch.no_grad():
            return model(ids, labels=ids, **arguments).talk_losses[0, 0, 0, :-1].tolist()

    def close(name: str, expected: list[float]) -> None:
        torch.testing.assert_close(record[name], expected, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        own = model(ids).thought_ids
    partner = [*controls.moved(19, seed=int(ids.sum())), 19]
    assert not torch.equal(own, own[:, :, partner])
    close("mixed", losses(thought_ids=own))
    close("shuffled", losses(thought_ids=own[:, :, partner]))
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "thought_kind", "pause")
        close("pause", losses())
    with monkeypatch.context() as patch:
        # A mixing weight of one is the thought's prediction alone.
        alone = lambda base, thought, *rest: (thought, torch.ones(len(thought), 1))  # noqa: E731
        patch.setattr(model.mixing_head, "forward", alone)
        close("thought", losses())


@pytest.mark.parametrize("kind, names", [("none", ["base"]), ("pause", ["base", "mixed", "thought"])])
def test_controls_of_a_model_that_samples_nothing(
    model: QuietStarForCausalLM, kind: str, names: list[str]
):
    model.config.thought_kind = kind
    try:
        (record,) = controls.block_losses(model, [[5, 6, 7, 8, 9]])
        assert list(record) == names
        assert all(math.isfinite(value) for losses in record.values() for value in losses)
        controls.summarize_controls([record])
        assert model.config.thought_kind == kind
    finally:
        model.config.thought_kind = "sampled"


# ---- items and the journal ------------------------------------------------------------------------


def test_items_of_local_files(tmp_path: Path, gsm_file: Path, csqa_file: Path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(CSQA_ROWS), tmp_path / "csqa.parquet")
    assert read_table(gsm_file) == GSM_ROWS
    assert read_table(csqa_file) == CSQA_ROWS == read_table(tmp_path / "csqa.parquet")
    options = {"hub_name": "openai/gsm8k", "hub_config": "main", "split": "test"}
    rows = load_rows(("question",), data=gsm_file, limit=2, **options)
    assert rows == [{"question": row["question"]} for row in GSM_ROWS[:2]]
    with pytest.raises(
        UserError, match="row 1, has no column 'answerKey'; its columns are: answer, que"
    ):
        load_rows(("question", "answerKey"), data=gsm_file, **options)
    gsm_file.write_text('{"question": "a"}\n{"question')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_table(gsm_file)


def test_hub_items_have_the_same_columns(monkeypatch: pytest.MonkeyPatch, merging):
    import datasets

    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(GSM_ROWS if "gsm8k" in name else CSQA_ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(OWN["gsm8k"]("gsm8k", Settings(limit=4)).items(merging)) == 4
    assert OWN["csqa"]("csqa", Settings()).items(merging)[1]["answerKey"] == "B"
    assert asked == [
        ("openai/gsm8k", "main", "test"),
        ("tau/commonsense_qa", None, "validation"),
    ]


def test_the_journal_finds_its_items(tmp_path: Path):
    output = tmp_path / "out.json"
    one, other = Journal.key("run", {"a": 1}), Journal.key("other run", {"a": 1})
    assert one != other
    Journal(output).add([(one, {"x": 1})])
    Journal(output, process=1).add([(other, {"x": 2})])
    with Journal(output).path.open("a") as file:
        file.write(
            '{"key": "cut off',
        )
    journal = Journal(output)
    assert journal.found == {one: {"x": 1}, other: {"x": 2}}
    journal.add([("third", {"x": 3})])
    assert len(Journal(output).found) == 3


def test_the_fingerprint_knows_the_weights(model: QuietStarForCausalLM, folder: str):
    same = QuietStarForCausalLM.from_pretrained(folder)
    assert fingerprint(model) == fingerprint(same)
    with torch.no_grad():
        same.mixing_head.fc3.weight *= 1.01
    assert fingerprint(model) != fingerprint(same)


# ---- the command ----------------------------------------------------------------------------------


def run(*words: object) -> int:
    return cli.main(["eval", *map(str, words), "--quiet", "--device", "cpu"])


def test_the_command(
    folder: str, gsm_file: Path, csqa_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out.json"
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 9)
    words = [folder, "--tasks", "gsm8k,csqa,gsm8k-cot,perplexity", "--output", output]
    words += ["--data", f"gsm8k={gsm_file}", "--data", f"csqa={csqa_file}", "--limit", 3]
    words += ["--data", f"perplexity={text}", "--block-size", 32, "--votes", 2, "--max-new-tokens", 4]
    assert run(*words) == 0
    shown = capsys.readouterr().out
    for part in ("gsm8k: 3 items", "csqa: 3 items", "maj@2", "decile 10", "pause tokens", str(output)):
        assert part in shown
    found = json.loads(output.read_text())
    assert list(found["tasks"]) == ["gsm8k", "csqa", "gsm8k-cot", "perplexity"]
    assert set(found["tasks"]["csqa"]["accuracy"]) == {"base", "mixed", "gain"}
    lines = (tmp_path / "out.json.items.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 4


def test_an_interrupted_command_continues(
    folder: str,
    gsm_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Stopped after two batches, the same command scores the rest only, and the result is the same."""
    words = [folder, "--tasks", "gsm8k", "--data", gsm_file, "--batch-size", 2]
    assert run(*words, "--output", tmp_path / "whole.json") == 0
    real, scored = reasoning.score_answers, []

    def counted(model, items, *rest):
        if len(scored) == stop:
            raise KeyboardInterrupt
        scored.append(len(items))
        return real(model, items, *rest)

    monkeypatch.setattr(reasoning, "score_answers", counted)
    stop = 2
    assert run(*words, "--output", tmp_path / "out.json") == 130
    assert not (tmp_path / "out.json").exists()
    stop = 99
    assert run(*words, "--output", tmp_path / "out.json") == 0
    assert scored == [2, 2, 2]
    whole, resumed = (json.loads((tmp_path / f).read_text()) for f in ("whole.json", "out.json"))
    assert whole == resumed
    # Other settings are another run, a smaller limit is not.
    assert run(*words, "--output", tmp_path / "out.json", "--limit", 3) == 0
    assert len(scored) == 3
    assert run(*words, "--output", tmp_path / "out.json", "--max-length", 200) == 0
    assert len(scored) == 6
    capsys.readouterr()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--tasks", "gsm8kk"], "unknown task 'gsm8kk', did you mean gsm8k?"),
        (["--tasks", ","], "--tasks is ','"),
        (["--tasks", "gsm8k", "--data", "missing.json"], "missing.json does not exist"),
        (["--tasks", "gsm8k,csqa", "--data", "x.json"], "expected TASK=FILE"),
        (["--tasks", "gsm8k", "--data", "csqa=x.json"], "csqa, which is not among --tasks"),
        (["--tasks", "perplexity", "--block-size", "1"], "--block-size is 1"),
        (["--tasks", "perplexity", "--limit", "0"], "--limit is 0"),
        (["--tasks", "perplexity", "--batch-size", "0"], "--batch-size is 0"),
        (["--tasks", "perplexity", "--votes", "0"], "votes is 0"),
    ],
)
def test_wrong_words(folder: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert run(folder, *words) == cli.USER_ERROR
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_without_the_harness(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ("lm_eval", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "quietstar.evaluation.harness", raising=False)
    assert run(folder, "--tasks", "perplexty") == cli.USER_ERROR
    shown = capsys.readouterr().err
    assert "unknown task 'perplexty', did you mean perplexity?" in shown
    assert "pip install 'quietstar[eval]'" in shown


def test_files_per_task(gsm_file: Path):
    both = ["gsm8k", "gsm8k-cot"]
    assert assign_files([f"gsm8k={gsm_file}"], both) == dict.fromkeys(both, gsm_file)
    assert assign_files([str(gsm_file)], ["gsm8k-cot"]) == {"gsm8k-cot": gsm_file}


@pytest.mark.slow
def test_two_processes_share_the_items(folder: str, gsm_file: Path, tmp_path: Path):
    """Half of the items each, one result, equal to that of one process but for rounding."""
    words = ["eval", folder, "--tasks", "gsm8k", "--data", str(gsm_file), "--quiet", "--device", "cpu"]
    assert cli.main([*words, "--output", str(tmp_path / "one.json")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = [*launch, "-m", "quietstar", *words, "--output", str(tmp_path / "two.json")]
    done = subprocess.run(two, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gsm8k: 6 items") == 1
    for name in ("two.json.items.jsonl", "two.json.items1.jsonl"):
        assert len((tmp_path / name).read_text().splitlines()) == 3
    one, both = (
        json.loads((tmp_path / f).read_text())["tasks"]["gsm8k"] for f in ("one.json", "two.json")
    )
    for name in ("base", "mixed", "gain"):
        assert both["probability"][name] == pytest.approx(one["probability"][name], rel=1e-3)


# ---- lm-evaluation-harness ------------------------------------------------------------------------

TASK_FILE = """
task: quietstar_toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")
    path = tmp_path / "tasks"
    path.mkdir()
    rows = [
        {"question": "Two and two?", "choices": ["four", "six"], "label": 0},
        {"question": "The sky?", "choices": ["green", "blue", "red"], "label": 1},
    ]
    (path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "toy.yaml").write_text(TASK_FILE.format(data=path / "toy.jsonl"))
    return path


def test_a_task_of_the_harness(
    folder: str, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out.json"
    words = ["--tasks", "quietstar_toy", "--include-path", task_folder, "--output", output]
    assert run(folder, *words) == 0
    assert "quietstar_toy (lm-evaluation-harness)" in capsys.readouterr().out
    found = json.loads(output.read_text())["tasks"]["quietstar_toy"]
    assert found["acc,none"] in (0.0, 0.5, 1.0)


def test_the_harness_thinks(
    model: QuietStarForCausalLM, merging: PreTrainedTokenizerFast, task_folder: Path
):
    """Its log-likelihoods are those of the mixed prediction; ``thoughts=False`` gives the base's."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    adapter = get_model("quietstar")
    context, rest = "Q: 1 2?\nA:", " 18"
    start, ids = reasoning.split_answer(merging, context, rest)
    request = Instance("loglikelihood", {}, (context, rest), 0)
    found = {}
    try:
        for thoughts in (True, False):
            lm = adapter(model, tokenizer=merging, batch_size=1, thoughts=thoughts)
            # One position less for each slot of a thought: start, three tokens, end.
            assert lm.max_length == (395 if thoughts else 400)
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids)))
            ((found[thoughts], _),) = lm.loglikelihood([request], disable_tqdm=True)
            assert found[thoughts] == pytest.approx(expected, rel=1e-4)
    finally:
        model.config.thought_kind = "sampled"
    assert found[True] != pytest.approx(found[False], rel=1e-3)
    with pytest.raises(ValueError, match="expected a Quiet-STaR model"):
        adapter(model.base, tokenizer=merging)
