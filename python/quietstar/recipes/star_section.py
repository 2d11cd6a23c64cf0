"""The section ``star`` of a recipe: learning from rationales of its own (:mod:`quietstar.star`)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from quietstar.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from quietstar.recipes.recipe import Recipe

# The data source that is made up as it is needed (quietstar.data.sums).
SUMS = "sums"
EXTRACTORS = ("final", "letter", "number", "line", "scratch")
REGEX = "regex:"
STEP_GROWTH, MAX_GROWTH = 1.2, 5
# Optimizer steps of an iteration; more would be a slip.
MAX_STEPS = 10**9
# Numbers that 64 bits hold.
MAX_DIGITS = 18
SHOT_KEYS = ("prompt", "completion")
Hint = Literal["choice", "question", "scratchpad"]


@dataclass
class StarSection:
    """How `quietstar star` bootstraps (Zelikman et al. 2022, arXiv 2203.14465); the defaults are theirs.

    The section ``data`` holds the problems: a prompt, and a completion in which ``answer`` finds the
    true answer. ``eval_files`` or ``eval_split`` are problems to be tested on.

    Args:
        iterations: so many times rationales are written and the model is fine-tuned on them.
        answer: what finds the answer in a completion, the data's or the model's: ``final`` (behind the
            last ``####``), ``letter`` (A to E), ``number`` (the last one), ``line`` (the last line),
            ``scratch`` (behind ``</scratch>``) or ``regex:`` and an expression with one group.
        learn_from: ``rationales`` that lead to the right answer, or the data's own completions
            (``answers``), the control.
        rationalize: problems that were not solved are tried again with the answer as a hint.
        hint: where the hint stands: ``choice`` ("(CORRECT)" at the right one), ``question`` (in brackets
            behind the question) or ``scratchpad`` (on a line before the prompt's last one).
        hints_left_in: share of rationalized problems whose hint stays in the prompt to learn from.
        restart: every iteration fine-tunes the original model, not that of the iteration before.
        first_steps: optimizer steps of the first iteration.
        step_growth: the steps of an iteration are those of the last one times this.
        steps_added: instead, so many more than those of the last one; null: ``step_growth`` counts.
        problems: how many an iteration has, drawn anew each time; null: all of a file, 1000 sums.
        samples_per_problem: completions written for a problem.
        sampling_temperature: 0: greedy, the most likely token each time.
        older_rationales: an iteration learns from those kept before, too.
        max_per_problem: rationales of one problem that are learnt from; null: all.
        replay_files: prompts and completions of other training, as jsonl with these two columns.
        replay_share: share of the rows to learn from that come from ``replay_files``.
        shots: solved examples, ``{prompt, completion}`` each, put before every prompt.
        shots_in_training: the shots stand before the prompts in the text to learn from, too.
        stop: text that ends a completion, beside the end-of-text token; with shots an empty line.
        max_new_tokens: tokens of a completion at most; one that has not ended by then is not used.
        generation_batch: completions written at a time.
        test_problems: so many problems are tested on after every iteration.
        problem_class: a template for what the accuracy is broken down by, e.g. ``{Type}``.
        digits: of ``data.name: sums``, how many digits the numbers have at most.
    """

    iterations: int = 16
    answer: str | None = None
    learn_from: Literal["rationales", "answers"] = "rationales"
    rationalize: bool = True
    hint: Hint | None = None
    hints_left_in: float = 0.0
    restart: bool = True
    first_steps: int = 40
    step_growth: float = STEP_GROWTH
    steps_added: int | None = None
    problems: int | None = None
    samples_per_problem: int = 1
    sampling_temperature: float = 0.0
    older_rationales: bool = False
    max_per_problem: int | None = None
    replay_files: list[str] | None = None
    replay_share: float = 0.0
    shots: list[Any] | None = None
    shots_in_training: bool = False
    stop: str | None = None
    max_new_tokens: int = 256
    generation_batch: int = 64
    test_problems: int = 200
    problem_class: str | None = None
    digits: int = 5

    # No key of the section: whether a recipe has it, were it with the defaults alone.
    given = False

    def is_given(self) -> bool:
        """Whether this is more than what a recipe has that says nothing of it."""
        return self.given or self != StarSection()

    def steps(self, iteration: int) -> int:
        """Optimizer steps of an iteration, from 1."""
        if self.steps_added is not None:
            return self.first_steps + self.steps_added * (iteration - 1)
        return max(1, round(self.first_steps * self.step_growth ** (iteration - 1)))


def check_star(recipe: Recipe) -> None:
    """Raise :class:`UserError` for a section ``star`` that is out of range or at odds with others."""
    star, data = recipe.star, recipe.data
    if not star.is_given():
        if data.name == SUMS:
            raise UserError(
                "data.name is sums, problems for `quietstar star`, and the recipe has no section star"
            )
        return
    if data.messages is not None:
        raise UserError(
            "data.messages is given with a section star; expected data.prompt and data.completion, or"
            " data.preset"
        )
    if data.streaming:
        raise UserError("data.streaming is true with a section star; expected problems in memory")
    if data.packing == "concat":
        raise UserError(
            "data.packing is 'concat' with a section star; expected 'document' or 'packed', which keep"
            " prompts and completions whole"
        )
    own = [k for k in ("files", "eval_files", "prompt", "completion", "preset") if getattr(data, k)]
    if data.name == SUMS and own:
        raise UserError(
            f"data.{own[0]} is given and data.name is sums, which are made up; expected null"
        )
    if recipe.training.get("dataloader_drop_last"):
        raise UserError(
            "training.dataloader_drop_last is true with a section star; expected false, as what is kept"
            " may be less than a batch"
        )
    _check_numbers(star)
    _check_answer(star, sums=data.name == SUMS)
    if data.name == SUMS and star.hint not in (None, "scratchpad"):
        raise UserError(f"star.hint is {star.hint!r} and the problems are sums; expected scratchpad")
    if star.digits > MAX_DIGITS:
        raise UserError(f"star.digits is {star.digits}; expected at most {MAX_DIGITS}")
    if star.samples_per_problem > 1 and star.sampling_temperature == 0:
        raise UserError(
            f"star.samples_per_problem is {star.samples_per_problem} and star.sampling_temperature 0,"
            " where all would be the same; expected 1, or a temperature above 0"
        )
    if (star.replay_share > 0) != bool(star.replay_files):
        raise UserError(
            f"star.replay_share is {star.replay_share} and star.replay_files {star.replay_files};"
            " expected both or neither"
        )
    if not star.restart and recipe.adapter.rank is not None:
        raise UserError(
            "star.restart is false and adapter.rank is given; expected one of them: adapters are trained"
            " on the original model"
        )
    if recipe.model.name is None:
        raise UserError("model.name is null with a section star; expected a model that can answer")
    for shot in star.shots or ():
        whole = isinstance(shot, Mapping) and sorted(shot) == sorted(SHOT_KEYS)
        if not whole or not all(isinstance(value, str) and value.strip() for value in shot.values()):
            raise UserError(f"star.shots has the entry {shot!r:.80}; expected {{prompt, completion}}")


def _check_numbers(star: StarSection) -> None:
    at_least_one = ("iterations", "first_steps", "samples_per_problem", "max_new_tokens", "digits")
    for name in (*at_least_one, "generation_batch", "test_problems", "problems", "max_per_problem"):
        value = getattr(star, name)
        if value is not None and value < 1:
            optional = ", or null" if name in ("problems", "max_per_problem") else ""
            raise UserError(f"star.{name} is {value}; expected a whole number >= 1{optional}")
    if not 0 <= star.hints_left_in <= 1:
        raise UserError(f"star.hints_left_in is {star.hints_left_in}; expected a share from 0 to 1")
    if not 0 <= star.replay_share < 1:
        raise UserError(f"star.replay_share is {star.replay_share}; expected a share from 0 to below 1")
    if not 0 <= star.sampling_temperature < math.inf:
        raise UserError(
            f"star.sampling_temperature is {star.sampling_temperature}; expected a number of at least 0"
        )
    if not 0 < star.step_growth <= MAX_GROWTH:
        raise UserError(
            f"star.step_growth is {star.step_growth}; expected a factor above 0 and at most"
            f" {MAX_GROWTH}; star.steps_added adds a number of steps"
        )
    # In logarithms, as a number may not hold it.
    growth = 1.0 if star.steps_added is not None else star.step_growth
    if math.log(star.first_steps) + math.log(growth) * (star.iterations - 1) > math.log(MAX_STEPS):
        raise UserError(
            f"star.first_steps is {star.first_steps}, star.step_growth {star.step_growth} and"
            f" star.iterations {star.iterations}; expected a last iteration of at most {MAX_STEPS} steps"
        )
    if star.steps_added is not None and star.steps_added < 0:
        raise UserError(f"star.steps_added is {star.steps_added}; expected a whole number >= 0, or null")
    if star.steps_added is not None and star.step_growth != STEP_GROWTH:
        raise UserError(
            f"star.steps_added is {star.steps_added} and star.step_growth {star.step_growth}; expected"
            " one of them"
        )


def _check_answer(star: StarSection, *, sums: bool) -> None:
    if star.answer is None:
        if not sums:
            raise UserError(
                f"star.answer is null; expected one of {', '.join(EXTRACTORS)}, or regex:..."
            )
        return
    if star.answer.startswith(REGEX):
        try:
            groups = re.compile(star.answer.removeprefix(REGEX)).groups
        except re.error as error:
            raise UserError(f"star.answer is {star.answer!r}, no regular expression: {error}") from None
        if groups != 1:
            raise UserError(f"star.answer is {star.answer!r} with {groups} groups; expected one")
    elif star.answer not in EXTRACTORS:
        raise UserError(
            f"star.answer is {star.answer!r}; expected one of {', '.join(EXTRACTORS)}, or regex:..."
            f"{did_you_mean(star.answer, EXTRACTORS)}"
        )
