"""What ``quietstar demo words`` measures: answers of held-out problems, under several thoughts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from quietstar.evaluation.completions import CompletionThoughts, load_items, score_completions
from quietstar.files import write_json
from quietstar.plain_text import plain_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quietstar.modeling.model import QuietStarForCausalLM

EQUATION = "{Equation:equation} = {Answer:number}"
ANSWER = " {Answer:number}\n"
ASIDE = f" ({EQUATION}){ANSWER}"
# Problems are short; what is longer is left out.
TOKENS, ASIDE_TOKENS = 112, 18


def problem_items(
    tokenizer: PreTrainedTokenizerBase, file: Path, completion: str = ANSWER, limit: int | None = None
) -> list[dict[str, Any]]:
    """Prompts and completions of the problems of a file."""
    templates: dict[str, Any] = {"preset": "svamp", "completion": completion}
    return load_items(tokenizer, file, templates, 2 * TOKENS, limit)


class Look(TrainerCallback):
    """Scores a model on held-out problems before the first step and every so many steps.

    Args:
        score: plain data of a model; kept: where they go, a file for each step.
    """

    def __init__(self, score: Callable[[QuietStarForCausalLM], dict[str, Any]], kept: Path, every: int):
        self._score, self._kept, self._every = score, kept, every

    def _look(self, step: int, model: QuietStarForCausalLM) -> None:
        file = self._kept / f"step-{step}.json"
        if not file.is_file():
            self._kept.mkdir(parents=True, exist_ok=True)
            write_json(file, {"step": step, **self._score(model)})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._look(0, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self._look(state.global_step, kwargs["model"])


def scores_of(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict[str, Any]],
    batch: int = 16,
) -> dict[str, Any]:
    """Per problem the answer's probability, NLL and whether greedy decoding writes it: ``none`` (without
    a thought), and where the model thinks ``own``, ``drawn`` (a sampled thought) and ``other`` (the
    most likely thought of the next problem)."""
    found: dict[str, list[dict[str, Any]]] = {}
    device = model.device.type
    bf16 = torch.autocast(device, torch.bfloat16)
    thinks = model.config.thinks
    sampled = thinks and model.config.thought_kind == "sampled"

    def add(
        name: str, part: str, chosen: Sequence[dict[str, Any]], thoughts: CompletionThoughts
    ) -> None:
        with bf16:
            records = score_completions(model, tokenizer, chosen, thoughts)
        found.setdefault(name, []).extend(_of(record, part) for record in records)
        if part == "mixed" and name == "own":
            found.setdefault("none", []).extend(_of(record, "base") for record in records)

    ids: list[Tensor] = []
    for first, chosen in _batches(items, batch):
        thoughts = CompletionThoughts()
        add("own" if thinks else "none", "mixed" if thinks else "base", chosen, thoughts)
        if sampled:
            assert thoughts.ids is not None
            ids.append(thoughts.ids)
            add("drawn", "mixed", chosen, CompletionThoughts(temperature=1.0, seed=1 + first))
    result: dict[str, Any] = {}
    if sampled:
        others = torch.cat(ids).roll(-1, 0)
        for first, chosen in _batches(items, batch):
            given = CompletionThoughts(ids=others[first : first + len(chosen)])
            add("other", "mixed", chosen, given)
        result["thoughts"] = tokenizer.batch_decode(torch.cat(ids)[:8])
    return {**result, "scores": found}


def _batches(
    items: Sequence[dict[str, Any]], size: int
) -> Iterator[tuple[int, Sequence[dict[str, Any]]]]:
    for first in range(0, len(items), size):
        yield first, items[first : first + size]


def _of(record: dict[str, Any], part: str) -> dict[str, Any]:
    """Six digits are enough, and keep the files small."""
    kept = {key: record[f"{part}_{key}"] for key in ("probability", "nll", "correct")}
    return {k: v if isinstance(v, bool) else round(v, 6) for k, v in kept.items()}


@torch.no_grad()
def bounds_of(
    model: QuietStarForCausalLM, tokenizer: PreTrainedTokenizerBase, held_out: Path, limit: int | None
) -> dict[str, Any]:
    """What an aside in plain sight is worth before the answer: the right one, and the model's own."""
    items = problem_items(tokenizer, held_out, limit=limit)
    gold = [
        item["completion"].rpartition(")")[0] + ")"
        for item in problem_items(tokenizer, held_out, ASIDE, limit)
    ]
    own = []
    for item in items:
        ids = torch.tensor([plain_ids(tokenizer, item["prompt"] + " (")], device=model.device)
        made = model.base.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ASIDE_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        text = str(tokenizer.decode(made[0, ids.shape[1] :]))
        own.append(f" ({text.partition(')')[0]})")
    found: dict[str, Any] = {}
    for name, asides in (("gold aside", gold), ("own aside", own)):
        behind = [
            {**item, "prompt": item["prompt"] + aside} for item, aside in zip(items, asides, strict=True)
        ]
        found[name] = scores_of(model, tokenizer, behind)["scores"]["none"]
    return found


def mean_scores(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over problems."""
    keys = ("probability", "nll", "correct")
    return {key: sum(float(r[key]) for r in records) / len(records) for key in keys}


def best_look(looks: Sequence[dict[str, Any]], prediction: str) -> dict[str, Any]:
    """The look, behind the first step, at which the right answers were most probable."""
    trained = [look for look in looks if look["step"] > 0]
    return max(trained, key=lambda look: mean_scores(look["scores"][prediction])["probability"])


def paired(metrics: dict[str, Any], key: str) -> dict[str, Any]:
    """Full minus control, per problem averaged over the seeds: mean, standard error, and each seed's."""
    per_seed = []
    for seed, looks in metrics["arms"]["full"].items():
        ours = best_look(looks, "own")["scores"]["own"]
        theirs = best_look(metrics["arms"]["none"][seed], "none")["scores"]["none"]
        per_seed.append([float(a[key]) - float(b[key]) for a, b in zip(ours, theirs, strict=True)])
    differences = torch.tensor(per_seed, dtype=torch.float64)
    mean = differences.mean(0)
    error = float(mean.std() / len(mean) ** 0.5) if len(mean) > 1 else None
    return {
        "mean": float(mean.mean()),
        "standard_error": error,
        "by_seed": differences.mean(1).tolist(),
    }
