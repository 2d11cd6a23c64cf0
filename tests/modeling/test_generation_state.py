"""What a call of generate keeps is its own: threads, prompts in chunks, guidance, forwards beside it."""

import threading

import pytest
import torch
from generation_cases import NEW, build, options, prompt
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from quietstar import QuietStarForCausalLM
from quietstar.modeling.generation import SpokenThought, Thinking
from quietstar.thinking.cuda_graphs import use_graphs

META = [39, 40]


def told(thoughts: list[SpokenThought]) -> list[tuple]:
    return [(t.row, t.step, t.ids) for t in thoughts]


@pytest.mark.parametrize("graphs", ["off", "buffers"])
def test_threads_keep_their_own_rules_and_thoughts(model, ids, graphs: str):
    rules = [("always", None), ("never", None), ("every:2", None), ("always", 2)]
    alone = []
    for rule, budget in rules:
        tokens = model.generate(ids, thinking=rule, thinking_budget=budget, **options())
        alone.append((tokens, told(model.thoughts)))
    assert len({len(thoughts) for _, thoughts in alone}) == 4
    found: dict[tuple[int, int], tuple] = {}

    def work(number: int) -> None:
        for turn in range(3):
            thinking = Thinking(*rules[number])
            tokens = model.generate(ids, thinking=thinking, **options())
            found[number, turn] = (tokens, told(thinking.thoughts))

    with use_graphs(graphs):
        workers = [threading.Thread(target=work, args=(number,)) for number in range(len(rules))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert len(found) == 3 * len(rules)
    for (number, _), (tokens, thoughts) in found.items():
        assert torch.equal(tokens, alone[number][0]) and thoughts == alone[number][1]


def test_the_thoughts_of_a_call_come_with_its_result(model, ids):
    made = model.generate(ids, return_dict_in_generate=True, **options())
    assert made.thoughts is model.thoughts and len(made.thoughts) == 3 * NEW
    thinking = Thinking("every:2")
    model.generate(ids, thinking=thinking, **options())
    assert model.thoughts is thinking.thoughts
    assert len(thinking.thoughts) == 9 and thinking.step == NEW and len(made.thoughts) == 3 * NEW
    with pytest.raises(ValueError, match="thinking was used by another call"):
        model.generate(ids, thinking=thinking, **options())
    with pytest.raises(ValueError, match="`thinking_budget` and a Thinking cannot be combined"):
        model.generate(ids, thinking=Thinking(), thinking_budget=2, **options())


class Beside(BaseStreamer, LogitsProcessor, StoppingCriteria):
    """Calls the model while it generates."""

    def __init__(self, model: QuietStarForCausalLM):
        self.model, self.seen = model, []

    def look(self) -> None:
        ids, mask = prompt()
        with torch.no_grad():
            whole = self.model(ids, attention_mask=mask, logits_to_keep=2).logits
            loss = self.model(ids, attention_mask=mask, labels=ids).loss
        self.seen.append((whole, loss))

    def put(self, value: torch.Tensor) -> None:
        self.look()

    def end(self) -> None:
        self.look()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor):
        self.look()
        if self.stops:
            return torch.zeros(len(input_ids), dtype=torch.bool)
        return scores

    stops = False


@pytest.mark.parametrize("place", ["streamer", "processor", "criterion"])
def test_a_forward_beside_a_generation_is_a_forward(model, ids, place: str):
    ids, rule = ids[1:], {"thinking": "every:2", "thinking_budget": 2}
    more = {"max_new_tokens": NEW, "do_sample": False, **rule}
    quiet = model.generate(ids, **more)
    thoughts = told(model.thoughts)
    beside = Beside(model)
    beside.look()
    beside.stops = place == "criterion"
    if place == "streamer":
        ids, quiet = ids[:1], quiet[:1]
        thoughts = [t for t in thoughts if t[0] == 0]
        more["streamer"] = beside
    elif place == "processor":
        more["logits_processor"] = LogitsProcessorList([beside])
    else:
        more["stopping_criteria"] = StoppingCriteriaList([beside])
    assert torch.equal(model.generate(ids, **more), quiet) and told(model.thoughts) == thoughts
    assert len(beside.seen) > NEW
    for whole, loss in beside.seen[1:]:
        assert torch.equal(whole, beside.seen[0][0]) and torch.equal(loss, beside.seen[0][1])


@pytest.mark.parametrize("chunk", [1, 5, 12])
@pytest.mark.parametrize("rule", [{}, {"thinking": "every:2"}, {"thinking_budget": 1}])
def test_a_prompt_in_chunks_is_one_decision(ids, chunk: int, rule: dict):
    """Chunks of 1 hold nothing but padding at first; windows of 7 end inside chunks of 5."""
    model = build("gemma2")
    whole = model.generate(ids, **options(**rule))
    thoughts = told(model.thoughts)
    assert torch.equal(model.generate(ids, prefill_chunk_size=chunk, **options(**rule)), whole)
    assert told(model.thoughts) == thoughts


def guided(model: QuietStarForCausalLM, ids, mask, negative, scale: float, rule: str) -> torch.Tensor:
    """Guidance without any cache: both branches from the start for every token, by their definition."""
    with torch.no_grad():
        for step in range(NEW):
            thinks = rule == "always" or (rule == "every:2" and step % 2 == 0)
            model.config.thought_kind = "sampled" if thinks else "none"
            scores = []
            for text, seen in ((ids, mask), (negative, torch.ones_like(negative))):
                logits = model(text, attention_mask=seen, logits_to_keep=1).logits[:, -1].clone()
                logits[:, META] = -1e9
                scores.append(logits.log_softmax(-1))
            mixed = scale * (scores[0] - scores[1]) + scores[1]
            mixed[:, META] = -torch.inf
            token = mixed.argmax(-1, keepdim=True)
            ids, negative = torch.cat([ids, token], 1), torch.cat([negative, token], 1)
            mask = torch.cat([mask, torch.ones_like(token)], 1)
    model.config.thought_kind = "sampled"
    return ids


@pytest.mark.parametrize("rule", ["always", "never", "every:2"])
@pytest.mark.parametrize("scale", [1.7, 0.0])
def test_guidance_thinks_where_the_generation_does(model, ids, mask, rule: str, scale: float):
    negative = ids.flip(0)[:, 3:9]
    expected = guided(model, ids, mask, negative, scale, rule)
    more = options(thinking=rule, guidance_scale=scale, negative_prompt_ids=negative)
    made = model.generate(ids, **more)
    assert torch.equal(made, expected)
    steps = {"always": range(NEW), "never": (), "every:2": range(0, NEW, 2)}[rule]
    assert [(t.row, t.step) for t in model.thoughts] == [(r, s) for s in steps for r in range(3)]
    if scale:
        own = UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, model, unconditional_ids=negative)
        more = options(thinking=rule, logits_processor=LogitsProcessorList([own]))
        assert torch.equal(model.generate(ids, **more), expected)


def test_guidance_spends_no_budget_and_follows_entropies(model, ids):
    model.generate(ids, guidance_scale=1.5, thinking_budget=3, **options())
    assert [(t.row, t.step) for t in model.thoughts] == [(r, s) for s in range(3) for r in range(3)]
    model.generate(ids, thinking="entropy:3.9", **options())
    assert 0 < len(model.thoughts) < 3 * NEW
    model.generate(ids, thinking="entropy:3.9", guidance_scale=1.5, **options())
    first = {t.row for t in model.thoughts if t.step == 0}
    model.generate(ids, thinking="entropy:3.9", **options())
    assert first == {t.row for t in model.thoughts if t.step == 0}
    with pytest.raises(ValueError, match="negative_prompt_ids has 1 rows; expected 3"):
        model.generate(ids, guidance_scale=1.5, negative_prompt_ids=ids[:1], **options())
    with pytest.raises(ValueError, match="`guidance_scale` and num_beams=2 cannot be combined"):
        model.generate(ids, guidance_scale=1.5, num_beams=2, **options())


def test_several_sequences_of_a_prompt_are_rows_of_their_own(model, ids, mask):
    more = options(do_sample=True, thinking="every:2", thinking_budget=2)
    torch.manual_seed(5)
    made = model.generate(ids, num_return_sequences=2, **more)
    thoughts = told(model.thoughts)
    assert [(row, step) for row, step, _ in thoughts] == [(r, s) for s in (0, 2) for r in range(6)]
    more["attention_mask"] = mask.repeat_interleave(2, 0)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids.repeat_interleave(2, 0), **more), made)
    assert told(model.thoughts) == thoughts


@pytest.mark.parametrize("rule", ["every:2", "entropy:3.9"])
def test_beams_decide_by_the_rule(model, ids, rule: str):
    more = options(num_beams=3, num_return_sequences=2, thinking=rule)
    cached = model.generate(ids, **more)
    thoughts = told(model.thoughts)
    assert cached.shape[0] == 6 and 0 < len(thoughts) < 9 * NEW
    assert torch.equal(model.generate(ids, use_cache=False, **more), cached)
    assert told(model.thoughts) == thoughts
