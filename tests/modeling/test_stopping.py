"""Generation that ends at a text, whatever the tokenizer's pieces are."""

import pytest
import torch
from transformers import StoppingCriteria
from transformers.generation.stopping_criteria import StopStringCriteria

from quietstar.data import sums
from quietstar.data.lookup import build_tokenizer as lookup_tokenizer
from quietstar.modeling.stopping import StopAtText


def first_step(criterion: StoppingCriteria, ids: list[int], start: int) -> int | None:
    """How many tokens a row has when it is done."""
    for length in range(start + 1, len(ids) + 1):
        if criterion(torch.tensor([ids[:length]]), None)[0]:
            return length
    return None


@pytest.mark.parametrize("stop", ["\n", "8 3", "</scratch>", "8 8 3 C: 0\n0"])
def test_tokens_of_whole_words(stop: str):
    tokenizer = sums.build_tokenizer()
    prompt, text = sums.scratch_prompt(sums.Sum(624, 259, 3)), sums.worked(sums.Sum(624, 259, 3))
    before = tokenizer(prompt)["input_ids"]
    ids = [*before, *tokenizer(text)["input_ids"]]
    length = first_step(StopAtText(tokenizer, [stop], len(before)), ids, len(before))
    assert length is not None
    assert stop in tokenizer.decode(ids[len(before) : length])
    assert stop not in tokenizer.decode(ids[len(before) : length - 1])
    with pytest.raises(ValueError, match="substring not found"):
        StopStringCriteria(tokenizer, [stop])  # why this one is not used


def test_a_text_in_the_prompt_ends_nothing():
    tokenizer = lookup_tokenizer()
    ids = tokenizer("a b c d")["input_ids"]
    criterion = StopAtText(tokenizer, [tokenizer.decode(ids[:2])], len(ids))
    rows = torch.tensor([ids + ids[2:4], ids + ids[:2]])
    assert criterion(rows, None).tolist() == [False, True]
