"""What is to be solved: problems of a recipe's data, or sums; their answers, hints and checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from quietstar.data import sums
from quietstar.data.left_out import LeftOut
from quietstar.data.readers import Fields, PairReader, TemplateReader
from quietstar.data.sources import open_documents
from quietstar.data.stdlib import Document
from quietstar.data.templates import Template
from quietstar.errors import UserError
from quietstar.recipes.recipe import Recipe
from quietstar.recipes.star_section import SUMS, Hint, StarSection
from quietstar.star.answers import Extractor, extractor
from quietstar.star.hints import hinted

NUM_SUMS = 1000
KIND = "class: "


@dataclass(frozen=True)
class Problem:
    """A prompt and its true answer.

    Attributes:
        name: where it is from; completion: what the data have behind the prompt; kind: the class by
            which accuracy is broken down; sum: of a sum.
    """

    name: str
    prompt: str
    completion: str
    answer: str
    kind: str = "all"
    sum: sums.Sum | None = None


class Task(ABC):
    """Problems to learn from and held-out ones.

    Attributes:
        answer: what finds the answer in a completion, as the recipe names it; find_answer: the function;
            hint: where the answer goes in a prompt; test: the held-out problems.
    """

    answer: str
    find_answer: Extractor
    hint: Hint
    test: list[Problem]

    @abstractmethod
    def problems(self, iteration: int) -> list[Problem]:
        """The problems of an iteration, from 1; the same each time for the same one."""

    def every_problem(self) -> list[Problem]:
        """The problems of all iterations; of those that are made up, as long ones."""
        return self.problems(1)

    def hinted(self, problem: Problem) -> str:
        """The problem's prompt with its answer as a hint."""
        return hinted(self.hint, problem.prompt, problem.answer)

    def hinted_shot(self, shot: Mapping[str, str]) -> str:
        """A solved example's prompt with its answer as a hint."""
        answer = self.find_answer(shot["completion"])
        if answer is None:
            raise UserError(
                f"star.shots has the completion {shot['completion']!r:.80}, in which star.answer finds"
                " no answer; expected one, which is the hint when a problem is tried again"
            )
        return hinted(self.hint, shot["prompt"], answer)

    def wrong_inside(self, problem: Problem, completion: str) -> bool | None:
        """Whether a rationale has a wrong line; None where nobody can tell."""
        return None


class Sums(Task):
    """Sums of up to ``star.digits`` digits: all of one digit, of more as many of each, which are new in
    every iteration."""

    def __init__(self, star: StarSection, seed: int):
        self._direct, self._digits, self._seed = star.learn_from == "answers", star.digits, seed
        self.hint = star.hint or "scratchpad"
        self.answer = star.answer or ("line" if self._direct else "scratch")
        self.find_answer = extractor(self.answer)
        self._each = -(-(star.problems or NUM_SUMS) // star.digits)
        each = -(-star.test_problems // star.digits)
        rng = np.random.default_rng([seed, 4])
        self.test = self._drawn(rng, each, test=True)

    def problems(self, iteration: int) -> list[Problem]:
        return self._drawn(np.random.default_rng([self._seed, 3, iteration]), self._each)

    def _drawn(self, rng: np.random.Generator, each: int, test: bool = False) -> list[Problem]:
        found: list[sums.Sum] = []
        for digits in range(1, self._digits + 1):
            if digits == 1:
                found += sums.all_of_one_digit()
                continue
            # No sum twice in an iteration, and at most half of those that there are.
            of_these: dict[sums.Sum, None] = {}
            count = min(each, (4 if test else 36) * 100 ** (digits - 1) // 10 * 10)
            while len(of_these) < count:
                drawn = sums.draw(rng, digits, count - len(of_these), test=test)
                of_these |= dict.fromkeys(drawn)
            found += of_these
        return [self._problem(problem) for problem in found]

    def _problem(self, problem: sums.Sum) -> Problem:
        prompt = (sums.question if self._direct else sums.scratch_prompt)(problem)
        completion = problem.answer if self._direct else sums.worked(problem)
        kind = f"{problem.digits} digit{'s' * (problem.digits > 1)}"
        return Problem(problem.name, prompt, completion, problem.answer, kind, problem)

    def wrong_inside(self, problem: Problem, completion: str) -> bool | None:
        if self._direct or problem.sum is None:
            return None
        return sums.wrong_line(problem.sum, completion) is not None


class _ClassReader(PairReader):
    """Reads a row's class as a completion, which may not be empty; a class may."""

    def __init__(self, template: str):
        super().__init__()
        self._template = Template(template, "star.problem_class")

    def fields(self, row: Mapping[str, Any], where: object) -> Fields:
        return KIND + self._template.fill(row), "", False


class OfData(Task):
    """The problems that the section ``data`` holds."""

    def __init__(self, recipe: Recipe, seed: int):
        star, data = recipe.star, recipe.data
        assert star.answer is not None  # checked with the recipe
        self.hint = star.hint or ("choice" if star.answer == "letter" else "question")
        self.answer, self.find_answer = star.answer, extractor(star.answer)
        self._seed, self._count = seed, star.problems
        separate = data.eval_files is not None or data.eval_split is not None
        if data.eval_split is not None and data.eval_files is None and data.name is None:
            raise UserError(
                f"data.eval_split is {data.eval_split!r} but the data are local files; set"
                " data.eval_files, or data.eval_split=null"
            )
        self._all = list(self._read(recipe, seed, data.split, None))
        if separate:
            split = data.split if data.eval_files is not None else str(data.eval_split)
            held_out = self._read(recipe, seed, split, data.eval_files)
            self.test = list(islice(held_out, star.test_problems))
        else:
            self.test, self._all = self._all[: star.test_problems], self._all[star.test_problems :]
            if not self._all:
                raise UserError(
                    f"the data have {len(self.test)} problems, of which star.test_problems,"
                    f" {star.test_problems}, are held out; expected more, or data.eval_files"
                )
        if star.learn_from == "rationales" and star.rationalize:
            for problem in self._all:
                self.hinted(problem)  # one that has no place for a hint is found now

    def problems(self, iteration: int) -> list[Problem]:
        if self._count is None or self._count >= len(self._all):
            return list(self._all)
        rng = np.random.default_rng([self._seed, 3, iteration])
        chosen = np.sort(rng.choice(len(self._all), size=self._count, replace=False))
        return [self._all[index] for index in chosen]

    def every_problem(self) -> list[Problem]:
        return list(self._all)

    def _read(self, recipe: Recipe, seed: int, split: str, files: list[str] | None) -> Iterator[Problem]:
        data, star = recipe.data, recipe.star
        shared = ("config_name", "revision", "txt_documents")
        options: dict[str, Any] = {key: getattr(data, key) for key in shared}
        name = None if files else data.name
        files = files or (data.files if name is None else None)

        def rows(reader: PairReader) -> Iterator[Document]:
            return open_documents(name=name, files=files, split=split, text_column=reader, **options)()

        kinds = rows(_ClassReader(star.problem_class)) if star.problem_class else None
        left_out = LeftOut()
        for document in rows(
            TemplateReader(data.prompt, data.completion, preset=data.preset, seed=seed)
        ):
            kind = "all" if kinds is None else next(kinds).text.removeprefix(KIND).strip() or "none"
            assert document.prompt is not None
            if not document.prompt.strip():
                left_out.add(f"problem {document.name}", "has an empty prompt; expected a question")
                continue
            answer = self.find_answer(document.text)
            if answer is None:
                why = f"has no answer that star.answer {star.answer!r} finds in {document.text!r:.80}"
                left_out.add(f"problem {document.name}", why)
                continue
            left_out.used()
            yield Problem(document.name, document.prompt, document.text, answer, kind)
        left_out.check(f"data {name or files}")


def build_task(recipe: Recipe) -> Task:
    """The problems of a recipe, those of the data read.

    Raises:
        UserError: for data that cannot be read, answers that are never found, hints without a place.
    """
    seed = int(recipe.training.get("seed", 42))
    if recipe.data.name == SUMS:
        return Sums(recipe.star, seed)
    if recipe.data.prompt is None and recipe.data.preset is None:
        raise UserError(
            "data.prompt is null; expected problems: data.prompt and data.completion, data.preset, or"
            " data.name=sums"
        )
    return OfData(recipe, seed)
