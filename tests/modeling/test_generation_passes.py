"""A new token together with its thought's start: fewer passes, the same tokens, thoughts and cache."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from generation_cases import NEW, build, options
from passes import counted
from transformers import DynamicCache

from quietstar.modeling.generation import Thinking
from quietstar.modeling.text_cache import CACHE_NAME, holds_handed_keys, kept_keys
from quietstar.thinking.cuda_graphs import use_graphs

T = 3  # thought tokens of these models
APART, TOGETHER = [1, *[1] * T, 2], [2, *[1] * (T - 1), 2]
# Their cache has a form of its own (compressed, by experts), to which only the layers can add.
OWN_FORM = ("deepseek_v3", "jetmoe")


@pytest.fixture
def apart(monkeypatch):
    """Every text token in a step of its own from here on."""
    return lambda: monkeypatch.setattr(Thinking, "foreseen", lambda self: None)


@pytest.mark.parametrize("graphs", ["off", "buffers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_passes_of_a_token(ids, mask, family: str, graphs: str):
    """The prompt is read first, windows of 7 or not; from then on text and thought go together."""
    model = build(family)
    model(ids)  # the checks before the first pass
    with use_graphs(graphs), counted(model) as passes:
        model.generate(ids, **options())
    each = APART if family in OWN_FORM else TOGETHER
    assert passes == [12, *APART[1:]] + each * (NEW - 1)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"thinking": "every:2"}, [*APART[1:], 1, *TOGETHER, 1, *TOGETHER]),
        ({"thinking_budget": 2}, [*APART[1:], *TOGETHER, 1, 1, 1]),
        ({"thinking": "entropy:0"}, [*APART[1:], *APART * (NEW - 1)]),
        ({"thinking": "never"}, [1] * (NEW - 1)),
        ({"prefill_chunk_size": 7}, [*APART[1:], *TOGETHER * (NEW - 1)]),
    ],
    ids=str,
)
def test_only_where_it_is_certain_that_all_rows_think(model, ids, how, expected):
    model(ids)
    with counted(model) as passes:
        model.generate(ids, **options(**how))
    prompt = [7, 5] if "prefill_chunk_size" in how else [12]
    assert passes == prompt + expected


def test_pauses_take_one_pass_with_their_text(ids):
    model = build(thought_kind="pause")
    model(ids)
    with counted(model) as passes:
        model.generate(ids, **options())
    assert passes == [12, T + 2] + [1 + T + 2] * (NEW - 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampled", [False, True])
def test_together_they_are_what_they_are_apart(apart, ids, mask, family: str, sampled: bool):
    """Left padding, windows of 7, thoughts of the same seed; the cache that comes back as well."""
    model = build(family)
    found = []
    for way in (None, apart):
        if way is not None:
            way()
        torch.manual_seed(5)
        more = {"do_sample": sampled, "thought_temperature": float(sampled), "max_new_tokens": 8}
        made = model.generate(ids, return_dict_in_generate=True, **options(**more))
        found.append((made.sequences, made.thoughts, made[CACHE_NAME]))
    (tokens, thoughts, cache), (others, told, other) = found
    assert torch.equal(tokens, others)
    assert [(t.row, t.step, t.ids) for t in thoughts] == [(t.row, t.step, t.ids) for t in told]
    weights = torch.tensor([[t.mixing_weight for t in each] for each in (thoughts, told)])
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == other.get_seq_length() == 12 + 7
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["every:2", "always"])
@pytest.mark.parametrize(
    "more", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str
)
def test_rows_that_are_swapped_or_repeated(apart, ids, mask, rule: str, more: dict):
    model, found = build("mistral"), []
    for way in (None, apart):
        if way is not None:
            way()
        torch.manual_seed(5)
        found.append(model.generate(ids, **options(thinking=rule, **more)))
    assert torch.equal(*found)


@pytest.mark.parametrize("graphs", ["off", "buffers"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_cache_that_was_handed_in(ids, mask, family: str, graphs: str):
    """It grows with the text and is gone on from; what somebody took out of it stays as it was."""
    model, cache = build(family), DynamicCache(config=build(family).base.config)
    whole = model.generate(ids, **options(max_new_tokens=2 * NEW))
    with use_graphs(graphs):
        first = model.generate(ids, **options(**{CACHE_NAME: cache}))
        assert cache.get_seq_length() == 12 + NEW - 1
        taken = [tensor for pair in kept_keys(cache).values() for tensor in pair]
        copies = [tensor.clone() for tensor in taken]
        longer = torch.cat([mask, torch.ones(3, NEW, dtype=torch.int64)], 1)
        more = options(attention_mask=longer, **{CACHE_NAME: cache})
        assert torch.equal(model.generate(first, **more), whole)
    assert all(torch.equal(a, b) for a, b in zip(taken, copies, strict=True))


class Own(DynamicCache):
    """Might do anything with what it is given."""


def test_caches_that_are_not_known_are_left_to_their_layers(model, ids, mask):
    with counted(model) as passes:
        model.generate(ids, **options(**{CACHE_NAME: Own()}))
    assert passes[-len(APART) :] == APART
    text = torch.randn(2, 1, 2, 5, 8)
    cache = DynamicCache()
    assert kept_keys(cache) == {} and not holds_handed_keys(cache, {0: tuple(text)})
    handed = cache.update(*text, 0)
    assert holds_handed_keys(cache, {0: handed})
    assert not holds_handed_keys(cache, {0: (handed[0].clone(), handed[1])})
    assert not holds_handed_keys(cache, {0: (handed[0][:, :, :3], handed[1])})
    assert not holds_handed_keys(cache, {0: handed, 1: handed})
