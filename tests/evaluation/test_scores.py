"""The metric by hand, its tokens and prompts, and intervals."""

import json
import re

import numpy as np
import pytest
import torch
from evaluation_cases import CSQA_ROWS, GSM_ROWS, FakeModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar import QuietStarForCausalLM
from quietstar.errors import UserError
from quietstar.evaluation import reasoning
from quietstar.evaluation.perplexity import summarize, token_losses
from quietstar.evaluation.statistics import bootstrap
from quietstar.evaluation.tasks import OWN, Settings


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
def test_letter_tokens(name: str, request):
    """The letters as they stand behind a space: one token with it, not the bare letter."""
    tokenizer = request.getfixturevalue(name)
    valid = reasoning.letter_tokens(tokenizer)
    space = "Ġ" if name == "merging" else "▁"
    assert tokenizer.convert_ids_to_tokens(list(valid.letters)) == [f"{space}{x}" for x in "ABCDE"]
    assert len(valid.ids) == 6


def test_a_tokenizer_without_letters_is_rejected():
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
        ({"question": None}, "question is None; expected text"),
        ({"answer": None}, "answer is None; expected text or a number"),
        ({"answer": ["#### 3"]}, "answer is \\['#### 3'\\]; expected text or a number"),
        ({"answer": "#### ²"}, "answer '#### ²' has no number"),
        ({"answer": "#### ①"}, "answer '#### ①' has no number"),
    ],
)
@pytest.mark.parametrize("name", ["gsm8k", "gsm8k-cot"])
def test_wrong_answers(tmp_path, merging, caplog, name: str, change: dict, message: str):
    path = tmp_path / "gsm.jsonl"
    rows = [{**GSM_ROWS[0], **change}, GSM_ROWS[1], {"question": "One?", "answer": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert OWN[name](name, Settings(data=path)).items(merging) == rows[1:]
    (record,) = caplog.records
    assert re.search(f"line 1 cannot be used: {message}.*left out \\(1 so far\\)", record.getMessage())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question": 3}, "question is 3; expected text"),
        ({"choices": {"label": [1, 2], "text": ["a", "b"]}}, "choices is .* lists of text"),
        ({"choices": {"label": ["A", "B"], "text": ["a", None]}}, "choices is .* lists of text"),
        ({"choices": {"label": ["A", "B"], "text": "ab"}}, "choices is .* lists of text"),
        ({"answerKey": ""}, "answerKey is ''; expected one of A, B, C, D, E"),
        ({"choices": ["a", "b"]}, "choices is"),
        ({"choices": {"label": ["1", "2"], "text": ["a", "b"]}}, "labelled"),
    ],
)
def test_wrong_choices(change: dict, message: str):
    with pytest.raises(UserError, match=message):
        reasoning.csqa_text({**CSQA_ROWS[0], **change})


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


def test_rows_that_cannot_be_scored_are_left_out(tmp_path, merging, caplog):
    """An answer without a number costs a counted warning; a file of nothing else is an error."""
    path = tmp_path / "gsm.jsonl"
    bad = {"question": "How?", "answer": "so"}
    path.write_text("".join(json.dumps(row) + "\n" for row in [GSM_ROWS[0], bad, GSM_ROWS[1], bad]))
    for name in ("gsm8k", "gsm8k-cot"):
        caplog.clear()
        assert OWN[name](name, Settings(data=path)).items(merging) == GSM_ROWS[:2]
        said = [r.getMessage() for r in caplog.records]
        for line, message in zip((2, 4), said, strict=True):
            assert f"{path}, line {line} cannot be used: answer 'so' has no number" in message
        assert said[1].endswith("it is left out (2 so far)")
    path.write_text(json.dumps(bad))
    with pytest.raises(UserError, match="line 1 cannot be used: answer 'so' has no number"):
        OWN["gsm8k"]("gsm8k", Settings(data=path)).items(merging)


def test_only_tokens_that_count_are_in_the_means(model: QuietStarForCausalLM):
    """Rows without a target, rows of one token, and first tokens of documents are no losses of zero."""
    ids = torch.randint(5, 200, (9,), generator=torch.Generator().manual_seed(4))
    documents = [ids[:4], ids[4:]]
    rows = [{"input_ids": d, "attention_mask": torch.ones_like(d), "labels": d} for d in documents]
    expected = summarize(token_losses(model, rows, progress=False))
    packed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    packed["document_ids"] = torch.tensor([1] * 4 + [2] * 5)
    found = summarize(token_losses(model, [packed], progress=False))
    hidden = {**rows[0], "labels": torch.full((4,), -100)}
    short = {name: value[:1] for name, value in rows[1].items()}
    others = [hidden, rows[0], short, rows[1]]
    alone = summarize(token_losses(model, others, batch_size=1, progress=False))
    for one in (found, alone):
        assert one["tokens"] == expected["tokens"] == 7
        for name in ("base_nll", "mixed_nll"):
            assert one[name]["mean"] == pytest.approx(expected[name]["mean"], rel=1e-5)
    with pytest.raises(UserError, match="the text to evaluate on has no token to predict"):
        token_losses(model, [hidden, short], progress=False)
