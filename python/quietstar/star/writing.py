"""Completions of problems, written by a model in batches, and judged by their answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import StoppingCriteriaList

from quietstar.data.collator import PaddingCollator
from quietstar.data.pairs import encode_pairs
from quietstar.data.pause_tokens import pause_ids
from quietstar.data.plain_text import plain_ids
from quietstar.data.stdlib import Document
from quietstar.errors import UserError, blaming, reason
from quietstar.files import write_whole
from quietstar.modeling.stopping import StopAtText
from quietstar.recipes.star_section import StarSection
from quietstar.star.problems import Problem, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BETWEEN_SHOTS = "\n\n"
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Written:
    """A completion that a model wrote.

    Attributes:
        problem: its name; ended: whether it came to an end; right: whether it did, with the true answer.
    """

    problem: str
    completion: str
    answer: str | None
    ended: bool
    right: bool


def shots_text(star: StarSection, hinted: Task | None = None) -> str:
    """The solved examples that stand before every prompt.

    Args:
        hinted: whose hints are in their prompts, as where rationalization is asked for.
    """
    prompts = [hinted.hinted_shot(shot) if hinted else shot["prompt"] for shot in star.shots or ()]
    shots = [
        f"{prompt}{shot['completion']}".rstrip()
        for prompt, shot in zip(prompts, star.shots or (), strict=True)
    ]
    return "".join(shot + BETWEEN_SHOTS for shot in shots)


def stop_text(star: StarSection) -> str | None:
    """What ends a completion beside the end-of-text token."""
    return star.stop or (BETWEEN_SHOTS if star.shots else None)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """A prompt's tokens, as they are when it is learnt from."""
    ids = list(plain_ids(tokenizer, prompt))
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    return [*ids, *pause_ids(tokenizer)]


class Writer:
    """Writes completions with one model.

    Args:
        model: a decoder, or a model with thoughts; seed: of what is sampled.
        autocast: the type that products are computed in; None: that of the weights.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        star: StarSection,
        seed: int,
        autocast: torch.dtype | None = None,
    ):
        self._autocast = autocast
        self._thinks = bool(getattr(model.config, "thinks", False))
        config, self._meta = model.config, []
        if config.model_type == "quietstar":
            self._meta = [config.start_token_id, config.end_token_id]
            model = model if self._thinks else model.base
        self._model, self._tokenizer, self._task, self._star = model.eval(), tokenizer, task, star
        self._meta += pause_ids(tokenizer)[:1]
        self._seed, self._shots = seed, shots_text(star)
        self._rationalizes = star.rationalize and star.learn_from == "rationales"
        self._hinted_shots = shots_text(star, task) if self._rationalizes else ""
        self._stop = stop_text(star)

    def check_lengths(self, block_size: int) -> None:
        """Raise :class:`UserError` for prompts that leave no room in the model's context, or in a row.

        Args:
            block_size: tokens of a row to learn from.
        """
        star, config = self._star, self._model.config.get_text_config()
        if self._stop is None and self._tokenizer.eos_token_id is None:
            raise UserError(
                "star.stop is null and the tokenizer has no end-of-text token; expected a text that ends"
                " a completion"
            )
        context = getattr(config, "max_position_embeddings", None)
        problems = self._task.every_problem()
        plain = [p.prompt for p in (*problems, *self._task.test)]
        asked = [(self._shots, plain)]
        if self._rationalizes:
            asked.append((self._hinted_shots, [self._task.hinted(p) for p in problems]))
        for before, prompts in asked:
            shots = len(prompt_ids(self._tokenizer, before)) if before else 0
            longest = max(len(prompt_ids(self._tokenizer, prompt)) for prompt in prompts)
            if isinstance(context, int) and shots + longest + star.max_new_tokens > context:
                named = f"star.shots has {shots} tokens, " if before else ""
                hint = " with its hint" if prompts is not plain else ""
                raise UserError(
                    f"{named}the longest problem{hint} has {longest} tokens and star.max_new_tokens is"
                    f" {star.max_new_tokens}; expected at most {context} together, the model's context"
                )
        lengths = [len(prompt_ids(self._tokenizer, p.prompt)) for p in problems]
        shots = len(prompt_ids(self._tokenizer, self._shots)) if self._shots else 0
        learnt = min(lengths) + (shots if star.shots_in_training else 0)
        if learnt >= block_size:
            raise UserError(
                f"data.block_size is {block_size} and the shortest prompt to learn from has {learnt}"
                " tokens; expected more than that"
            )

    def lengths(self, rows: Sequence[Mapping[str, str]]) -> list[int]:
        """How many tokens prompts and completions have when they are learnt from."""
        pairs = [Document("", row["completion"], prompt=row["prompt"]) for row in rows]
        return [len(ids) for ids in encode_pairs(self._tokenizer, pairs)]

    def write(
        self,
        problems: Sequence[Problem],
        path: Path,
        *,
        hinted: bool = False,
        samples: int = 0,
        bar: str = "",
    ) -> list[list[Written]]:
        """Completions of problems, in their order; from ``path`` what it holds, and there what is new.

        A batch is in the file as a whole or not at all, so that a run that was killed goes on behind the
        last one and ends with the same file.

        Args:
            hinted: the answers stand in the prompts; samples: of each problem, 0: one, greedily.
            bar: what a progress bar says; empty: none.
        """
        # Not transformers', whose bars for loading files are switched off.
        from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

        temperature = self._star.sampling_temperature if samples else 0.0
        prompts = [
            self._hinted_shots + self._task.hinted(problem) if hinted else self._shots + problem.prompt
            for problem in problems
        ]
        ids = [prompt_ids(self._tokenizer, prompt) for prompt in prompts]
        # Of like length, so that there is little padding.
        order = sorted(range(len(problems)), key=lambda n: (len(ids[n]), n))
        order = [n for n in order for _ in range(max(1, samples))]
        size = self._star.generation_batch
        batches = [order[first : first + size] for first in range(0, len(order), size)]
        done = _whole_batches(path, [len(batch) for batch in batches])
        with tqdm(total=len(order), initial=len(done), desc=bar, disable=not bar) as progress:
            ready = 0
            for number, batch in enumerate(batches):
                ready += len(batch)
                if ready <= len(done):
                    continue
                seed = hash((self._seed, hinted, number)) % 2**63
                texts = self._texts([ids[n] for n in batch], temperature, seed)
                new = [self._judged(problems[n], *text) for n, text in zip(batch, texts, strict=True)]
                with path.open("a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(asdict(each)) + "\n" for each in new))
                done += new
                progress.update(len(batch))
        found: list[list[Written]] = [[] for _ in problems]
        for n, each in zip(order, done, strict=True):
            found[n].append(each)
        return found

    def _judged(self, problem: Problem, text: str, ended: bool) -> Written:
        answer = self._task.find_answer(text)
        return Written(problem.name, text, answer, ended, ended and answer == problem.answer)

    @torch.no_grad()
    def _texts(self, prompts: list[list[int]], temperature: float, seed: int) -> list[tuple[str, bool]]:
        """What the model writes behind prompts, and whether it came to an end."""
        tokenizer, model = self._tokenizer, self._model
        batch = PaddingCollator(padding_side="left")([{"input_ids": ids} for ids in prompts])
        longest = batch["input_ids"].shape[1]
        # A checkpoint's own defaults must not decide. 0 and 1 mean "all tokens".
        how: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0, "use_cache": True}
        if temperature:
            how |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if self._stop:
            stop = StopAtText(tokenizer, [self._stop], longest)
            how["stopping_criteria"] = StoppingCriteriaList([stop])
        if self._meta:
            how["suppress_tokens"] = self._meta
        end = tokenizer.eos_token_id
        device, dtype = model.device, self._autocast
        computing = torch.autocast(device.type, dtype, enabled=dtype is not None)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), computing:
            torch.manual_seed(seed)
            new = model.generate(
                batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                max_new_tokens=self._star.max_new_tokens,
                eos_token_id=end,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end or 0,
                **how,
            )[:, longest:]
        return [self._text(ids[-1:], row) for ids, row in zip(prompts, new.tolist(), strict=True)]

    def _text(self, before: list[int], row: list[int]) -> tuple[str, bool]:
        end = self._tokenizer.eos_token_id
        ended = end in row
        ids = row[: row.index(end)] if ended else row
        # Behind the prompt's last token, as some tokenizers drop a first space.
        decode = self._tokenizer.decode
        text = decode([*before, *ids])[len(decode(before)) :]
        if self._stop and self._stop in text:
            text, ended = text[: text.index(self._stop)], True
        return text, ended


def _whole_batches(path: Path, sizes: Sequence[int]) -> list[Written]:
    """What a file holds of batches that are complete; the file has these alone afterwards."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines = [line for line in lines if line.endswith("\n")]
    whole = 0
    for size in sizes:
        if whole + size > len(lines):
            break
        whole += size
    write_whole(path, "".join(lines[:whole]))
    return records(path, Written)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file that this package wrote."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        with blaming(f"{path}, line {number} is not as it was written; remove the file"):
            rows.append(dict(json.loads(line)))
    return rows


def records(path: Path, kind: type[_Record]) -> list[_Record]:
    """The lines of such a file as records of a kind."""
    rows = read_lines(path)
    try:
        return [kind(**row) for row in rows]
    except TypeError as error:
        raise UserError(f"{path} is not as it was written; remove the file: {reason(error)}") from error


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A jsonl file, whole or not at all."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
