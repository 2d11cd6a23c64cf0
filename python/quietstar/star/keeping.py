"""Which completions are kept, and the rows that the next model learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from quietstar.recipes.star_section import StarSection
from quietstar.star.problems import Problem, Task
from quietstar.star.writing import Written

GENERATED, RATIONALIZED, DATA = "generated", "rationalized", "data"


@dataclass(frozen=True)
class Kept:
    """A completion to learn from, and where it came from: a line of ``kept.jsonl``.

    Attributes:
        source: ``generated`` by the model alone, ``rationalized`` with the answer as a hint, or from the
            ``data``; hint_left_in: whether the hint is in the prompt, which the algorithm leaves out;
            wrong_inside: whether a line of it is wrong although the answer is right; None: nobody knows.
    """

    problem: str
    prompt: str
    completion: str
    answer: str
    kind: str
    iteration: int
    source: str
    hint_left_in: bool = False
    wrong_inside: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def keep(
    task: Task, problems: Sequence[Problem], written: Sequence[Sequence[Written]], iteration: int
) -> tuple[list[Kept], list[Problem]]:
    """What the model solved alone, and the problems that it did not solve.

    Args:
        written: the completions of each problem; of equal ones the first is kept.
    """
    kept, failed = [], []
    for problem, samples in zip(problems, written, strict=True):
        right = list(dict.fromkeys(each.completion for each in samples if each.right))
        if not right:
            failed.append(problem)
        for completion in right:
            kept.append(_kept(task, problem, completion, iteration, GENERATED))
    return kept, failed


def keep_rationalized(
    task: Task,
    failed: Sequence[Problem],
    written: Sequence[Sequence[Written]],
    iteration: int,
    hints_left_in: float,
    seed: int,
) -> list[Kept]:
    """What reached the answer that it was given, for the problems that were not solved without."""
    rng, kept = np.random.default_rng([seed, 5, iteration]), []
    for problem, samples in zip(failed, written, strict=True):
        for each in samples:
            if each.right:
                shown = bool(rng.random() < hints_left_in)
                kept.append(
                    _kept(task, problem, each.completion, iteration, RATIONALIZED, hint_left_in=shown)
                )
    return kept


def keep_data(problems: Sequence[Problem], iteration: int) -> list[Kept]:
    """The data's own completions."""
    return [Kept(p.name, p.prompt, p.completion, p.answer, p.kind, iteration, DATA) for p in problems]


def _kept(
    task: Task,
    problem: Problem,
    completion: str,
    iteration: int,
    source: str,
    hint_left_in: bool = False,
) -> Kept:
    return Kept(
        problem=problem.name,
        prompt=task.hinted(problem) if hint_left_in else problem.prompt,
        completion=completion,
        answer=problem.answer,
        kind=problem.kind,
        iteration=iteration,
        source=source,
        hint_left_in=hint_left_in,
        wrong_inside=task.wrong_inside(problem, completion),
    )


def rows_to_learn(
    star: StarSection,
    kept: Sequence[dict[str, Any]],
    older: Sequence[dict[str, Any]],
    replay: Sequence[dict[str, Any]],
    shots: str,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Prompts and completions for a fine-tuning: what was kept, and the share of other training.

    Args:
        kept: of this iteration; older: of those before, the newest last; shots: what stands before every
            prompt if that is learnt from, too.
    """
    counts: dict[str, int] = {}
    rows = []
    # The newest of a problem count where there may not be all.
    for each in (*kept, *(reversed(older) if star.older_rationales else ())):
        counts[each["problem"]] = counts.get(each["problem"], 0) + 1
        if star.max_per_problem is None or counts[each["problem"]] <= star.max_per_problem:
            prompt = shots + each["prompt"] if star.shots_in_training else each["prompt"]
            rows.append({"prompt": prompt, "completion": each["completion"], "from": each["source"]})
    count = round(len(rows) * star.replay_share / (1 - star.replay_share)) if replay else 0
    # Each of them as often as any other.
    whole, rest = divmod(count, max(1, len(replay)))
    chosen = [*range(len(replay))] * whole
    if rest:
        chosen += np.sort(rng.choice(len(replay), size=rest, replace=False)).tolist()
    for index in chosen:
        row = replay[index]
        rows.append({"prompt": row["prompt"], "completion": row["completion"], "from": "replay"})
    return rows
