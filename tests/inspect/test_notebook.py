"""What shows itself in a notebook: numbers, thoughts, and text that is escaped."""

import re

import numpy as np
import pytest
import torch
from families import thinking_model, tiny_decoder

from quietstar.data.stdlib import stdlib_tokenizer
from quietstar.errors import UserError
from quietstar.inspect.data import look
from quietstar.inspect.notebook import Gains, show_thoughts

TEXT = "if x < 1 & y:  # </span><script>alert(1)</script>\n    caf\u00e9()\n"


@pytest.fixture(scope="module")
def tokenizer():
    return stdlib_tokenizer(300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(5)
    decoder = tiny_decoder("llama", vocab_size=len(tokenizer))
    return thinking_model(decoder, tokenizer, mixing=0.5, thought_length=3, talk_length=2).eval()


def test_the_numbers_are_those_of_look(model, tokenizer):
    seen = show_thoughts(model, tokenizer, TEXT, samples=1, shown=3)
    ids = tokenizer(TEXT)["input_ids"]
    expected = look(model, tokenizer, [ids], samples=1)
    assert list(seen.tokens) == expected
    gains = [token.gain for token in expected if token.gain is not None]
    assert seen.gain == pytest.approx(np.mean(gains))
    helped = [token.gain for _, token in seen.most_helped()]
    assert helped == sorted(gains, reverse=True)
    assert repr(seen) == f"SeenText({len(ids)} tokens, gain {seen.gain:+.3f} nats per token)"
    # Ids are read as they are.
    assert show_thoughts(model, tokenizer, torch.tensor(ids), samples=1).tokens == seen.tokens


def test_html_has_text_and_thoughts_and_no_script(model, tokenizer):
    seen = show_thoughts(model, tokenizer, TEXT, samples=2, shown=4)
    page = seen._repr_html_()
    assert "<script" not in page and "&lt;script&gt;" in re.sub(r"</span><span[^>]*>", "", page)
    assert len(re.findall(r'<span style="background:[^"]*" title="loss', page)) == len(seen.tokens) - 1
    assert page.count("<tr>") == 5
    best = seen.most_helped()[0][1]
    assert len(best.thoughts) == 3 and f"with {best.mixed:.3f} nats" in page


def test_gains_by_difficulty():
    base = np.linspace(0, 5, 200)
    gains = Gains(base, base - np.where(base > 4, 1.0, 0.0))
    assert repr(gains) == "Gains(200 tokens, mean +0.200 nats, helped 20%)"
    figure = gains._repr_html_()
    assert "decile 10: NLL 4.52 to 5.00, 20 tokens; mean gain +1.000" in figure
    assert "decile 1: NLL 0.00 to 0.48, 20 tokens; mean gain +0.000" in figure


def test_texts_that_are_too_short(model, tokenizer):
    with pytest.raises(UserError, match=r"text has 2 tokens; expected at least 4 \(talk_length \+ 2\)"):
        show_thoughts(model, tokenizer, [5, 6])


def test_what_is_no_text_or_no_model_with_thoughts(model, tokenizer):
    with pytest.raises(UserError, match=r"text has shape \[1, 9\]; expected the ids \[N\] of one text"):
        show_thoughts(model, tokenizer, torch.ones(1, 9, dtype=torch.int64))
    with pytest.raises(UserError, match="model is a LlamaForCausalLM; expected a model with thoughts"):
        show_thoughts(model.base, tokenizer, TEXT)


def test_gains_of_one_token():
    gains = Gains([2.0], [1.5])
    assert repr(gains) == "Gains(1 token, mean +0.500 nats, helped 100%)"
    assert "mean gain +0.500" in gains._repr_html_()


@pytest.mark.parametrize(
    ("base", "mixed", "message"),
    [
        (
            [],
            [],
            r"shapes \[0\] and \[0\]; expected the losses of the same tokens, \[tokens\], at least one",
        ),
        ([1.0, 2.0], [1.0], r"shapes \[2\] and \[1\]"),
        ([[1.0]], [[1.0]], r"shapes \[1, 1\] and \[1, 1\]"),
        (1.0, 2.0, r"shapes \[\] and \[\]"),
        ([1.0], [float("nan")], "mixed has losses that are not finite; expected nats"),
    ],
)
def test_gains_of_nothing(base, mixed, message):
    with pytest.raises(UserError, match=message):
        Gains(base, mixed)
