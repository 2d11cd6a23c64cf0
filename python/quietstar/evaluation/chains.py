"""Zero-shot chain of thought with a majority vote (maj@k), as the paper measures GSM8K.

Two steps, as Kojima et al. 2022 (arXiv 2205.11916): the model reasons behind "Let's think step by
step.", then is asked for the number. k chains are sampled per question and the most frequent number
is the answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteriaList

from quietstar.data.collator import PaddingCollator
from quietstar.data.pause_tokens import pause_ids
from quietstar.errors import UserError
from quietstar.evaluation.reasoning import token_ids
from quietstar.modeling.stopping import StopAtText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASON = "\nA: Let's think step by step."
CONCLUDE = "\nTherefore, the answer (arabic numerals) is"
# A chain ends where the model goes on to a question of its own.
END_MARKS = ("Q:", "\n\n\n")
CONCLUSION_TOKENS = 12
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class ChainSettings:
    """How chains are sampled. ``thinking`` is that of ``generate`` (``"never"``: without thoughts)."""

    votes: int = 8
    temperature: float = 0.9
    max_new_tokens: int = 384
    thinking: str = "always"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("votes", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected a whole number >= 1")
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}; expected a number >= 0")
        if self.votes > 1 and self.temperature == 0:
            raise UserError(f"votes is {self.votes} at temperature 0; the chains would all be the same")


def find_number(text: str) -> float | None:
    """The first number of a text: sign, thousands separators and decimals are understood."""
    match = _NUMBER.search(text)
    return float(match.group().replace(",", "")) if match else None


def majority(numbers: Sequence[float | None]) -> float | None:
    """The most frequent number, the earliest of equals; chains without a number do not vote."""
    counts = Counter(n for n in numbers if n is not None)
    return counts.most_common(1)[0][0] if counts else None


def cut_chain(text: str) -> str:
    """A chain up to the first mark that ends it."""
    for mark in END_MARKS:
        text = text.split(mark, 1)[0]
    return text.rstrip()


def _generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    settings: ChainSettings,
    max_new_tokens: int,
) -> list[str]:
    """The new text of each prompt, all sampled in one batch (padded at the left)."""
    rows = [{"input_ids": token_ids(tokenizer, p) + pause_ids(tokenizer)} for p in prompts]
    batch = PaddingCollator(padding_side="left")(rows)
    longest = batch["input_ids"].shape[1]
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        # 0 and 1 mean "all tokens": a checkpoint's own defaults must not decide.
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    if getattr(model.config, "model_type", None) == "quietstar":
        sampling["thinking"] = settings.thinking
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    new = model.generate(
        batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        stopping_criteria=StoppingCriteriaList([StopAtText(tokenizer, END_MARKS, longest)]),
        **sampling,
    )[:, longest:]
    return list(tokenizer.batch_decode(new, skip_special_tokens=True))


def vote(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    gold: float,
    settings: ChainSettings,
    seed: int,
) -> dict[str, Any]:
    """Sample the chains of one question and count their votes.

    Torch's generators are left as they were. Returns ``numbers`` (one per chain, None where a chain
    has none), ``answer``, ``correct``, ``share`` of the chains that are right, and ``chains``.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        prompts = [f"Q: {question}{REASON}"] * settings.votes
        chains = _generate(model, tokenizer, prompts, settings, settings.max_new_tokens)
        chains = [cut_chain(chain) for chain in chains]
        asked = [prompt + chain + CONCLUDE for prompt, chain in zip(prompts, chains, strict=True)]
        ends = _generate(model, tokenizer, asked, settings, CONCLUSION_TOKENS)
    numbers = [find_number(end) for end in ends]
    answer = majority(numbers)
    return {
        "gold": gold,
        "answer": answer,
        "correct": answer == gold,
        "share": sum(n == gold for n in numbers) / len(numbers),
        "numbers": numbers,
        "chains": [chain + CONCLUDE + end for chain, end in zip(chains, ends, strict=True)],
    }
