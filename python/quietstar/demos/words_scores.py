"""What ``quietstar demo words`` measures: answers of held-out problems, under several thoughts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from quietstar.data.plain_text import plain_ids
from quietstar.evaluation.completions import CompletionThoughts, load_items, score_completions
from quietstar.evaluation.perplexity import undisturbed
from quietstar.files import read_json, write_json
from quietstar.training.options import computes_bf16

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quietstar.modeling.model import QuietStarForCausalLM

PROMPT = "Question: {Body:sentence} {Question}\nAnswer:\n"
ANSWER = "{Answer:number}\n"
# A thought stands between the prompt and the answer's first digit, so that is where an aside stands. Its
# marks are tokens of their own whatever follows, as those of GSM8K's calculations are.
OPENS, CLOSES = "<", ">"
ASIDE = OPENS + "{Equation:equation} = {Answer:number}" + CLOSES + ANSWER
# Problems are short; what is longer is left out. The tokens of an aside.
TOKENS, ASIDE_TOKENS = 112, 28
BATCH = 20
# Drawn thoughts whose predictions are averaged.
SEVERAL = 8

Item = dict[str, Any]
# Per problem, by the way in which the answer was predicted: probability, NLL, whether greedy is right.
Scores = dict[str, list[dict[str, Any]]]


def problem_items(
    tokenizer: PreTrainedTokenizerBase, file: Path, limit: int | None = None
) -> list[Item]:
    """Prompts and completions of the problems of a file, each with its ``aside``, the gold one; those of
    like length together, since they are padded to the longest of a batch."""
    templates: dict[str, Any] = {"preset": "svamp", "prompt": PROMPT, "completion": ANSWER}
    items = load_items(tokenizer, file, templates, TOKENS, limit)
    with_asides = load_items(tokenizer, file, {**templates, "completion": ASIDE}, 2 * TOKENS)
    aside_of = {item["prompt"]: item["completion"] for item in with_asides}
    items = [item for item in items if item["prompt"] in aside_of]
    for item in items:
        item["aside"] = aside_of[item["prompt"]].rpartition(CLOSES)[0] + CLOSES
    return sorted(items, key=lambda item: len(plain_ids(tokenizer, item["prompt"])))


class Look(TrainerCallback):
    """Scores a model on held-out problems every so many steps, and after the last.

    Args:
        score: plain data of a model; kept: where they go, a file for each step; problems: a digest of
            what is scored, without which an older score does not count.
    """

    def __init__(
        self,
        score: Callable[[QuietStarForCausalLM], dict[str, Any]],
        kept: Path,
        every: int,
        problems: str,
    ):
        self._score, self._kept, self._every, self._problems = score, kept, every, problems

    def look(self, step: int, model: QuietStarForCausalLM) -> None:
        """Score it, unless that was done."""
        if not any(each["step"] == step for each in looks_in(self._kept, self._problems)):
            self._kept.mkdir(parents=True, exist_ok=True)
            content = {"step": step, "problems": self._problems, **self._score(model)}
            write_json(self._kept / f"step-{step}.json", content)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self.look(state.global_step, kwargs["model"])


def looks_in(kept: Path, problems: str) -> list[dict[str, Any]]:
    """The scores of a folder on these problems, by step."""
    looks = [read_json(file) for file in kept.glob("step-*.json")]
    return sorted(
        (each for each in looks if each["problems"] == problems), key=lambda each: each["step"]
    )


def digest_of(items: Sequence[Item]) -> str:
    """What tells whether scores are of these problems."""
    return hashlib.sha256(json.dumps(list(items)).encode()).hexdigest()[:16]


def scores_of(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], model: QuietStarForCausalLM
) -> dict[str, Any]:
    """Scores by way: ``none`` (without a thought), and where the model thinks ``own`` (its most likely
    thought), ``drawn`` (one as in training), ``several`` (the mean over ``SEVERAL`` of these), ``other``
    (the own thought of the next problem) and ``gold`` (the problem's equation in the thought's place,
    where it fits); some thoughts as text beside them."""
    scores: Scores = {}
    config = model.config
    if not config.thinks:
        return {"scores": {"none": _score(model, tokenizer, items, "base")}}
    own = CompletionThoughts()
    scores["own"], scores["none"] = _score_both(model, tokenizer, items, own)
    if own.ids is None:
        return {"scores": scores}
    drawn = CompletionThoughts(temperature=config.thought_temperature, seed=1)
    scores["drawn"] = _score_both(model, tokenizer, items, drawn)[0]
    several = CompletionThoughts(temperature=config.thought_temperature, seed=2, count=SEVERAL)
    scores["several"] = _score_both(model, tokenizer, items, several)[0]
    other = CompletionThoughts(ids=own.ids.roll(1, 0))
    scores["other"] = _score_both(model, tokenizer, items, other)[0]
    fitting, ids = _gold_thoughts(tokenizer, items, config.thought_length)
    if fitting:
        scores["gold"] = _score_both(model, tokenizer, fitting, CompletionThoughts(ids=ids[:, None]))[0]
    return {"scores": scores, "thoughts": tokenizer.batch_decode(own.ids[:8, 0])}


def _score_both(
    model: Any, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], thoughts: CompletionThoughts
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """With the thoughts, whose ids are left in them, and without."""
    mixed, base, ids = [], [], []
    for first, chosen in _batches(items):
        given = None if thoughts.ids is None else thoughts.ids[first : first + BATCH]
        part = replace(thoughts, seed=thoughts.seed + first, ids=given)
        with _autocast(model):
            records = score_completions(model, tokenizer, chosen, part)
        mixed += [_of(record, "mixed") for record in records]
        base += [_of(record, "base") for record in records]
        ids.append(part.ids)
    if all(part is not None for part in ids):
        thoughts.ids = torch.cat([part for part in ids if part is not None])
    return mixed, base


def _score(
    model: Any, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], part: str
) -> list[dict[str, Any]]:
    found = []
    for _, chosen in _batches(items):
        with _autocast(model):
            found += [_of(record, part) for record in score_completions(model, tokenizer, chosen)]
    return found


def _autocast(model: Any) -> torch.autocast:
    device = model.device
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_bf16(device))


def _batches(items: Sequence[Item]) -> Iterator[tuple[int, Sequence[Item]]]:
    for first in range(0, len(items), BATCH):
        yield first, items[first : first + BATCH]


def _of(record: dict[str, Any], part: str) -> dict[str, Any]:
    """Six digits are enough, and keep the files small."""
    kept = {key: record[f"{part}_{key}"] for key in ("probability", "nll", "correct")}
    return {k: v if isinstance(v, bool) else round(v, 6) for k, v in kept.items()}


def _gold_thoughts(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], length: int
) -> tuple[list[Item], Tensor]:
    """Problems whose aside fits into a thought, and the thoughts [n, length]: what stands behind the
    aside's first mark, and as in training the answer and end-of-text tokens behind it."""
    fitting, rows = [], []
    for item in items:
        aside = item["aside"].removeprefix(OPENS)
        if len(plain_ids(tokenizer, aside, add_special_tokens=False)) <= length:
            text = aside + item["completion"]
            ids = plain_ids(tokenizer, text, add_special_tokens=False)[:length]
            rows.append(ids + [tokenizer.eos_token_id] * (length - len(ids)))
            fitting.append(item)
    return fitting, torch.tensor(rows)


def own_asides(
    model: QuietStarForCausalLM, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
) -> list[str]:
    """The most likely aside before each answer, "<43 - 21 = 22>"."""
    asides = []
    for _, chosen in _batches(items):
        prompts = [plain_ids(tokenizer, item["prompt"] + OPENS) for item in chosen]
        longest = max(map(len, prompts))
        padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        with undisturbed(model), _autocast(model):
            made = model.base.generate(
                input_ids=padded.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=ASIDE_TOKENS,
                do_sample=False,
                use_cache=True,  # which training had switched off
                pad_token_id=tokenizer.eos_token_id,
            )
        for text in tokenizer.batch_decode(made[:, longest:]):
            asides.append(OPENS + text.partition(CLOSES)[0] + CLOSES)
    return asides


def visible_scores_of(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], model: QuietStarForCausalLM
) -> dict[str, Any]:
    """Chain of thought: answers directly (``none``), behind the model's own aside in plain sight
    (``own``), and behind the right one (``gold``)."""
    asides = own_asides(model, tokenizer, items)
    scores: Scores = {"none": _score(model, tokenizer, items, "base")}
    for name, texts in (("own", asides), ("gold", [item["aside"] for item in items])):
        behind = [
            {**item, "prompt": item["prompt"] + text} for item, text in zip(items, texts, strict=True)
        ]
        scores[name] = _score(model, tokenizer, behind, "base")
    return {"scores": scores, "thoughts": asides[:8]}


def mean_scores(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over problems."""
    keys = ("probability", "nll", "correct")
    return {key: sum(float(r[key]) for r in records) / len(records) for key in keys}


def best_scores(looks: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Without thoughts, at the look that is best by one measure."""
    sign = -1 if key == "nll" else 1
    records: list[list[dict[str, Any]]] = [look["scores"]["none"] for look in looks]
    return max(records, key=lambda each: sign * mean_scores(each)[key])


def paired(
    ours: Sequence[Sequence[dict[str, Any]]], theirs: Sequence[Sequence[dict[str, Any]]], key: str
) -> dict[str, Any]:
    """Ours minus theirs, per problem averaged over the seeds: mean, its standard error, each seed's.

    Args:
        ours, theirs: [seeds][problems] records of the same problems.
    """
    differences = torch.tensor(
        [
            [float(a[key]) - float(b[key]) for a, b in zip(one, other, strict=True)]
            for one, other in zip(ours, theirs, strict=True)
        ],
        dtype=torch.float64,
    )
    mean = differences.mean(0)
    error = float(mean.std() / len(mean) ** 0.5) if len(mean) > 1 else None
    return {
        "mean": float(mean.mean()),
        "standard_error": error,
        "by_seed": differences.mean(1).tolist(),
    }
