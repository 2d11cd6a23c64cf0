"""Generation: the cache changes nothing, rows do not notice each other, thinking follows its rule."""

import pytest
import torch
from families import FAMILIES
from generation_cases import build
from transformers import StaticCache, TextStreamer, pipeline

from quietstar.data.lookup import build_tokenizer
from quietstar.modeling.generation import Thinking

NEW = 6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_changes_nothing(ids, mask, family: str):
    """Greedy, windows of 7 active: with the cache, without it, and by the mixed logits themselves."""
    model = build(family)
    options = {"max_new_tokens": NEW, "do_sample": False}
    cached = model.generate(ids, attention_mask=mask, **options)
    thoughts = list(model.thoughts)
    fresh = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, fresh)
    assert [t.ids for t in thoughts] == [t.ids for t in model.thoughts]
    assert len(thoughts) == 3 * NEW
    grown, seen = ids, mask
    with torch.no_grad():
        for step in range(NEW):
            output = model(grown, attention_mask=seen, logits_to_keep=1)
            logits = output.logits[:, -1].clone()
            logits[:, [39, 40]] = -torch.inf
            # Far apart enough for rounding not to decide.
            top = logits.topk(2, dim=-1).values
            assert (top[:, 0] - top[:, 1] > 1e-4).all()
            mine = [t.ids for t in thoughts if t.step == step]
            assert mine == [tuple(row) for row in output.thought_ids[:, 0, 0].tolist()]
            grown = torch.cat([grown, logits.argmax(-1, keepdim=True)], 1)
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
    assert torch.equal(cached, grown)


@pytest.mark.parametrize("rule", ["always", "every:2", "entropy:2.5"])
def test_a_batch_is_its_single_rows(model, ids, mask, rule: str):
    options = {"max_new_tokens": NEW, "do_sample": False, "thinking": rule}
    together = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    for row, padding in enumerate((3, 0, 0)):
        alone = model.generate(ids[row : row + 1, padding:], **options)
        assert torch.equal(alone[0, ids.shape[1] - padding :], together[row])


def test_rules_and_budget(model, ids, mask):

    def thinks(**how) -> list[tuple[int, int]]:
        model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **how)
        return [(t.row, t.step) for t in model.thoughts]

    assert thinks(thinking="never") == []
    assert thinks(thinking="every:4") == [(r, s) for s in (0, 4) for r in range(3)]
    assert thinks(thinking_budget=2) == [(r, s) for s in (0, 1) for r in range(3)]
    assert thinks(thinking="entropy:0") == [(r, s) for s in range(NEW) for r in range(3)]
    assert thinks(thinking="entropy:99") == []
    with torch.no_grad():
        logits = model.base(ids, attention_mask=mask).logits[:, -1]
    logits[:, [39, 40]] = -torch.inf
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).nan_to_num().sum(-1)
    middle = entropy.sort().values[:2].mean().item()
    assert {r for r, s in thinks(thinking=f"entropy:{middle}") if s == 0} == set(
        (entropy > middle).nonzero()[:, 0].tolist()
    )


def test_without_thinking_it_is_the_base_model(model, ids, mask):
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    ours = model.generate(ids, thinking="never", **options)
    theirs = model.base.generate(ids, suppress_tokens=[39, 40], eos_token_id=None, **options)
    assert torch.equal(ours, theirs)


def test_meta_tokens_are_never_emitted(model, ids, mask):
    with torch.no_grad():  # both would win every time
        model.get_output_embeddings().weight[[39, 40]] *= 50
    for options in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3, "do_sample": False}):
        made = model.generate(ids, attention_mask=mask, max_new_tokens=8, **options)
        assert not torch.isin(made[:, ids.shape[1] :], torch.tensor([39, 40])).any()


def test_sampling_repeats_with_torchs_seed(model, ids, mask):
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=True))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_beams_are_the_same_with_and_without_the_cache(model, ids, mask):
    options = {"attention_mask": mask, "max_new_tokens": NEW, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_pipeline_and_streaming(capsys):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = ";"
    model = build(vocabulary=48)
    with torch.no_grad():
        model.get_output_embeddings().weight[41:] = 0.0
        model.get_output_embeddings().weight[41:, 0] = -50.0
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (found,) = made("A u v w x ?", max_new_tokens=4, do_sample=False)
    assert found["generated_text"].startswith("A u v w x ?")
    ids = tokenizer("A u v w x ?", return_tensors="pt")["input_ids"]
    text = model.generate(
        ids, streamer=TextStreamer(tokenizer, skip_prompt=True), max_new_tokens=4, do_sample=False
    )
    assert capsys.readouterr().out.split() == tokenizer.decode(text[0, 6:]).split()


@pytest.mark.parametrize(
    "rule",
    ["sometimes", "every:0", "every", "every:1.5", "entropy", "entropy:x", "entropy-share:0.5", "all"],
)
def test_rules_that_are_none_are_refused(rule: str):
    with pytest.raises(ValueError, match="thinking is '" + rule):
        Thinking(rule)


def test_what_cannot_work_is_refused(model, ids, mask):
    with pytest.raises(ValueError, match="`thinking_budget` and num_beams=2 cannot be combined"):
        model.generate(ids, num_beams=2, thinking_budget=3)
    with pytest.raises(ValueError, match="thinking_budget is -1"):
        model.generate(ids, thinking_budget=-1)
    cache = StaticCache(config=model.base.config, max_cache_len=32)
    with pytest.raises(ValueError, match="expected a cache that grows"):
        model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="`labels` and `past_key_values` cannot be combined"):
        model(ids, labels=ids, past_key_values=cache)
