"""Where an answer is found in a completion, and where it goes as a hint."""

import json
import re

import pytest
from real_data import real_data

from quietstar.errors import UserError
from quietstar.star.answers import extractor
from quietstar.star.hints import hinted


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("final", "48/2 = 24 clips.\n#### 72\n", "72"),
        ("final", "#### 1\nmore\n#### 70,000\nQ: another", "70000"),
        ("final", "72", None),
        ("final", "#### ", None),
        ("final", "#### $18.00", "18"),
        ("final", "#### -$5", "-5"),
        ("final", "#### \u22125", "-5"),
        ("final", "#### 50%", "50"),
        ("final", "#### 5€.", "5"),
        ("final", "#### **72**", "72"),
        ("final", "#### 72 square feet", "72"),
        ("final", "#### 1\u202f000 km", "1000"),
        ("final", "#### \u0663", "3"),
        ("final", "#### 3 million", "3 million"),
        ("final", "#### 3/4", "3/4"),
        ("final", "#### 3 hours 20 minutes", "3 hours 20 minutes"),
        ("final", "#### 2nd", "2nd"),
        ("letter", "The answer is 'B'.", "B"),
        ("letter", "It's E's turn, don't", None),
        ("letter", " B\n", "B"),
        ("letter", "A fire is hot, so the answer is (C).", "C"),
        ("letter", "It could be (A), but must be (D)", "D"),
        ("letter", "Ask Bob", None),
        ("letter", "(C)", "C"),
        ("letter", "A dog", None),
        ("letter", "A dog is an animal, so the answer is (c).", "C"),
        ("letter", "The answer is E. A bus is not (A).", "E"),
        ("letter", "The answer is B.\n(A) is wrong", "B"),
        ("letter", "The answer is D, not C.", "D"),
        ("letter", "The answer is wood (b), not (A)", "B"),
        ("letter", "The answer is not (A), so it is (D)", "D"),
        ("letter", "Answer: A", "A"),
        ("number", " (43 - 21 = 22) 22\n", "22"),
        ("number", " ( 43.0 - 21.5 = 21.5 ) 21.5", "21.5"),
        ("number", "so it is 1,200.", "1200"),
        ("number", "3 - 5 = -2", "-2"),
        ("number", ".5 of them", "0.5"),
        ("number", "10-7", "7"),
        ("number", "(10)-7", "7"),
        ("number", "x = -7", "-7"),
        ("number", "a loss of -$7", "-7"),
        ("number", "it is \u22127.", "-7"),
        ("number", "about 1e5", "100000"),
        ("number", "12\u00a0345 and 1'000'000", "1000000"),
        ("number", "none", None),
        ("line", "first\nlast \n\n", "last"),
        ("line", " \n", None),
        ("scratch", "0 8 8 3\n</scratch>\n8 8 3", "8 8 3"),
        ("scratch", "0 8 8 3\n8 8 3", None),
        ("scratch", "</scratch>\n", None),
        (r"regex:answer is (\w+)", "answer is x, no, answer is yes", "yes"),
        (r"regex:answer is (\w+)", "is it?", None),
    ],
)
def test_answers(name: str, text: str, answer: str | None):
    assert extractor(name)(text) == answer


def test_the_answers_that_are_published():
    """Every answer of GSM8K and of CommonsenseQA, as their own evaluations read them."""
    rows = (real_data("gsm8k") / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for text in (json.loads(row)["answer"] for row in rows):
        (theirs,) = re.findall(r"#### (-?[0-9.,]+)", text)
        assert extractor("final")(text) == theirs.replace(",", "")
    rows = (real_data("commonsenseqa") / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, rows):
        key = row["answerKey"]
        text = next(c["text"] for c in row["question"]["choices"] if c["label"] == key)
        for said in (key, f"({key})", f"Therefore, the answer is {text} ({key.lower()})."):
            assert extractor("letter")(said) == key, said


CHOICES = "Q: What burns?\n(A) water\n(B) wood\nA:"


@pytest.mark.parametrize(
    ("kind", "prompt", "answer", "with_hint"),
    [
        ("choice", CHOICES, "B", "Q: What burns?\n(A) water\n(B) wood (CORRECT)\nA:"),
        (
            "choice",
            "Q: What burns?\nAnswer Choices:\n(a) water\n(b) wood\nA:",
            "B",
            "Q: What burns?\nAnswer Choices:\n(a) water\n(b) wood (CORRECT)\nA:",
        ),
        (
            "choice",
            "Q: A. is?\nA. wood\nB. water\nA:",
            "A",
            "Q: A. is?\nA. wood (CORRECT)\nB. water\nA:",
        ),
        ("choice", "What?\n A) wood\n B) B) x\nA:", "B", "What?\n A) wood\n B) B) x (CORRECT)\nA:"),
        ("question", "Q: 3 + 4?\nA:", "7", "Q: 3 + 4? (7)\nA:"),
        ("question", "Q: 3 + 4?\n\nA:", "7", "Q: 3 + 4? (7)\n\nA:"),
        ("question", "Q: 3 + 4?\r\nA:\n", "7", "Q: 3 + 4? (7)\r\nA:\n"),
        ("scratchpad", "Q: 3 + 4?\n\nA: ", "7", "Q: 3 + 4?\n\n7\nA: "),
        ("scratchpad", "Input:\n3 + 4\n<scratch>\n", "7", "Input:\n3 + 4\n7\n<scratch>\n"),
        ("scratchpad", "Q: 3 + 4?\nA:", "7", "Q: 3 + 4?\n7\nA:"),
    ],
)
def test_hints(kind: str, prompt: str, answer: str, with_hint: str):
    assert hinted(kind, prompt, answer) == with_hint


@pytest.mark.parametrize(
    ("kind", "prompt", "said"),
    [
        ("choice", CHOICES, r"has no line that begins with \(C\)"),
        (
            "question",
            "3 + 4 =",
            "'question' and the prompt '3 \\+ 4 =' has one line; expected a last line",
        ),
        ("scratchpad", "\nA:", "has one line"),
    ],
)
def test_hints_with_nowhere_to_go(kind: str, prompt: str, said: str):
    with pytest.raises(UserError, match=said):
        hinted(kind, prompt, "C")
