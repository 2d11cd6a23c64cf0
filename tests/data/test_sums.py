"""Sums with scratchpads: the paper's lines, their check, held-out ones, the corpus, the tokenizer."""

import collections

import numpy as np
import pytest
from seeds import reseed

from quietstar.data import sums
from quietstar.data.pairs import encode_pairs
from quietstar.data.stdlib import Document
from quietstar.data.sums import CorpusMix, Sum

PAPER = """\
6 2 4 + 2 5 9 , C: 0
6 2 + 2 5 , 3 C: 1
6 + 2 , 8 3 C: 0
, 8 8 3 C: 0
0 8 8 3
</scratch>
8 8 3"""


def test_the_scratchpad_is_the_paper_s():
    problem = Sum(624, 259, 3)
    assert sums.worked(problem) == PAPER
    assert sums.scratch_prompt(problem) == "Input:\n6 2 4 + 2 5 9\nTarget:\n<scratch>\n"
    assert sums.hinted_prompt(problem) == "Input:\n6 2 4 + 2 5 9\nTarget:\n8 8 3\n<scratch>\n"


def test_every_scratchpad_ends_in_the_sum():
    rng = np.random.default_rng(reseed())
    for digits in range(1, 9):
        for problem in sums.draw(rng, digits, 20):
            *lines, carry_line, close, answer = sums.worked(problem).split("\n")
            assert answer.replace(" ", "") == str(problem.a + problem.b)
            assert int(carry_line.replace(" ", "")) == problem.a + problem.b
            assert close == sums.CLOSE and len(lines) == digits + 1


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("", ""), None),
        (("4 + 2 5 9 ,", "5 + 2 5 9 ,"), 1),
        (("3 C: 1", "3 C: 0"), 2),
        ((", 8 8 3 C: 0", ", 8 8 3 C: 1"), 4),
        (("0 8 8 3\n", "1 8 8 3\n"), 5),
        (("</scratch>\n8 8 3", "</scratch>\n8 8 4"), 7),
        (("\n</scratch>\n8 8 3", ""), 6),
        (("</scratch>\n8 8 3", "</scratch>\n8 8 3\n8 8 3"), 8),
    ],
)
def test_the_first_wrong_line_is_found(change: tuple[str, str], line: int | None):
    assert sums.wrong_line(Sum(624, 259, 3), PAPER.replace(*change, 1)) == line


def test_a_tenth_is_held_out_and_never_drawn_otherwise():
    rng = np.random.default_rng(reseed())
    seen = {test: sums.draw(rng, 2, 3000, test=test) for test in (False, True)}
    assert not set(seen[False]) & set(seen[True])
    every = [sums.held_out(a, b) for a in range(10, 100) for b in range(10, 100)]
    assert 0.08 < np.mean(every) < 0.12
    assert len(set(sums.all_of_one_digit())) == 100


def test_the_corpus_holds_what_its_mix_says():
    mix = CorpusMix(pool=0.0)
    pairs = list(sums.corpus(4000, mix, 3))
    assert pairs == list(sums.corpus(4000, mix, 3)) != list(sums.corpus(4000, mix, 4))
    kinds: collections.Counter = collections.Counter()
    longest: collections.Counter = collections.Counter()
    for prompt, completion in pairs:
        lines = prompt.split("\n")
        a, b = (int(side.replace(" ", "")) for side in lines[1].split("+"))
        problem = Sum(a, b, len(str(a)))
        kind = "repeated" if "Repeat:" in prompt else ("answer", "worked", "explained")[len(lines) - 4]
        right = {"repeated": sums.scratchpad(problem)[0], "answer": problem.answer}
        assert completion == right.get(kind, sums.worked(problem))
        assert problem.digits == 1 or not sums.held_out(a, b)
        kinds[kind] += 1
        longest[kind] = max(longest[kind], problem.digits)
    assert longest == {"repeated": 7, "answer": 2, "worked": 2, "explained": 3}
    assert kinds["repeated"] / 4000 == pytest.approx(0.15, abs=0.03)
    assert kinds["worked"] / kinds["answer"] == pytest.approx(2, abs=0.5)


def test_the_pool_is_small_and_reaches_further():
    pairs = sums.corpus(20_000, CorpusMix(repeated=0.0), 0)
    asked = {pair.prompt.split("\n")[1] for pair in pairs}
    longer = [line for line in asked if len(line) > len("1 2 3 + 4 5 6")]
    assert {len(line) for line in longer} == {len("1 2 3 4 + 5 6 7 8"), len("1 2 3 4 5 + 6 7 8 9 0")}
    assert 50 < len(longer) <= 2 * sums.POOL


def test_tokens_are_the_text():
    tokenizer = sums.build_tokenizer()
    problem = Sum(90, 17, 2)
    for text in (sums.hinted_prompt(problem), sums.worked(problem), sums.question(problem, "Repeat:")):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    (pair,) = encode_pairs(tokenizer, [Document("", sums.worked(problem), sums.scratch_prompt(problem))])
    assert pair.prompt == len(tokenizer(sums.scratch_prompt(problem))["input_ids"])
    assert pair[-1] == tokenizer.eos_token_id
