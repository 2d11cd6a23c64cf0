"""A STaR run within seconds: a tiny decoder that is really trained, and completions by a script."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import tiny_decoder
from small_recipes import content

from quietstar.data import sums
from quietstar.data.sums import Sum
from quietstar.star import writing
from quietstar.star.writing import Writer


class Prompt(list[int]):
    """A prompt's tokens, which remember their text."""

    def __init__(self, text: str, ids: list[int]):
        super().__init__(ids)
        self.text = text


Script = Callable[[str], tuple[str, bool]]


def save_base(folder: Path, **changes: Any) -> Path:
    """A tiny decoder and the tokenizer of sums."""
    tokenizer = sums.build_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, **changes}
    tiny_decoder("llama", **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_content(base: Path, **star: Any) -> dict[str, Any]:
    """A recipe on sums of one and two digits."""
    made = content(
        training={"max_steps": -1, "save_strategy": "no", "save_steps": 500, "learning_rate": 1e-3},
        thoughts={"thought_kind": "none"},
    )
    made["model"] = {"name": str(base)}
    made["data"] = {"name": "sums", "packing": "packed", "block_size": 128}
    settings = {"iterations": 2, "first_steps": 2, "problems": 20, "test_problems": 10, "digits": 2}
    made["star"] = {**settings, "max_new_tokens": 60, "generation_batch": 32, **star}
    return made


def scripted(monkeypatch: pytest.MonkeyPatch, script: Script) -> list[str]:
    """Let every model write what the script says behind a prompt; returns the prompts as they come."""
    asked: list[str] = []
    ids_of = writing.prompt_ids

    def remembered(tokenizer: Any, prompt: str) -> Prompt:
        return Prompt(prompt, ids_of(tokenizer, prompt))

    def texts(self: Writer, prompts: list[Prompt], temperature: float, seed: int) -> Any:
        asked.extend(prompt.text for prompt in prompts)
        return [script(prompt.text) for prompt in prompts]

    monkeypatch.setattr(writing, "prompt_ids", remembered)
    monkeypatch.setattr(Writer, "_texts", texts)
    return asked


def sum_of(prompt: str) -> tuple[Sum, bool]:
    """The sum that a prompt asks for, and whether it has a hint."""
    found = re.search(r"Input:\n([\d ]+) \+ ([\d ]+)\nTarget:\n([\d ]+\n)?", prompt)
    assert found, prompt
    a, b = (found[n].replace(" ", "") for n in (1, 2))
    return Sum(int(a), int(b), len(a)), found[3] is not None


def solves_even_sums(prompt: str) -> tuple[str, bool]:
    """Solves even sums alone; with a hint the others, but for those that end in 9, and with a wrong line
    where a sum ends in 1."""
    problem, has_hint = sum_of(prompt)
    total, right = problem.a + problem.b, sums.worked(problem)
    if total % 2 == 0:
        return right, True
    if not has_hint or total % 10 == 9:
        return right[:-1] + "?", True
    return (right.replace("C: 0", "C: 1", 1) if total % 10 == 1 else right), True
