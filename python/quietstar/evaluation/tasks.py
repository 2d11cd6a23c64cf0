"""What ``quietstar eval`` can measure by itself: each task loads items, scores and summarizes them, and
renders its table.

``gsm8k``, ``csqa``, ``svamp``   zero-shot answer probability and accuracy (reasoning.py)
``gsm8k-cot``                    zero-shot chain of thought, majority of k (chains.py)
``completions``                  any prompts and completions: probability, accuracy (completions.py)
``perplexity``                   any text, by difficulty, with controls (controls.py)
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quietstar.errors import UserError
from quietstar.evaluation import chains, completions, controls, reasoning
from quietstar.evaluation.items import load_rows
from quietstar.evaluation.perplexity import spread
from quietstar.evaluation.statistics import bootstrap
from quietstar.evaluation.table import COLUMNS, grid, interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("quietstar")

Item = dict[str, Any]
Record = dict[str, Any]
# Their rows: of the hub's data set, or of a local file.
GSM8K = partial(
    load_rows, ("question", "answer"), hub_name="openai/gsm8k", hub_config="main", split="test"
)
# The test split of CommonsenseQA has no answers.
CSQA = partial(
    load_rows,
    ("question", "choices", "answerKey"),
    hub_name="tau/commonsense_qa",
    hub_config=None,
    split="validation",
    as_on_hub=reasoning.csqa_row,
)
SVAMP = partial(
    load_rows, ("Body", "Question", "Answer"), hub_name="ChilleD/SVAMP", hub_config=None, split="test"
)


@dataclass(frozen=True)
class Settings:
    """What the command line sets. ``data``: a local file for this task instead of its data set;
    ``templates``: ``prompt``, ``completion`` and ``preset`` of the task completions; ``thoughts``: how
    many are drawn there before each (None: the most likely one), from ``seed``."""

    data: Path | None = None
    limit: int | None = None
    max_length: int = 256
    block_size: int = 256
    templates: dict[str, Any] = field(default_factory=dict)
    chains: chains.ChainSettings = field(default_factory=chains.ChainSettings)
    thoughts: int | None = None
    seed: int = 0


@dataclass
class Task(ABC):
    """One benchmark. Items and records are plain data, so that they can be written as JSON."""

    name: str
    settings: Settings

    def identity(self) -> dict[str, Any]:
        """What a record depends on, besides the model and its item."""
        return {}

    @abstractmethod
    def items(self, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
        """The items, with everything checked that can be checked without the model."""

    @abstractmethod
    def score(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
    ) -> list[Record]:
        """A record for each item of a batch."""

    @abstractmethod
    def summarize(self, records: Sequence[Record]) -> dict[str, Any]:
        """Plain data for the output file."""

    @abstractmethod
    def render(self, result: dict[str, Any]) -> str:
        """The plain data of :meth:`summarize` as a table."""


@dataclass
class AnswerTask(Task):
    """Zero-shot probability of the gold answer; ``letters``: a choice, else a number."""

    load: Callable[..., list[Item]]
    text: Callable[[Item], tuple[str, str]]
    letters: bool
    _valid: reasoning.ValidTokens | None = None

    def identity(self) -> dict[str, Any]:
        return {"max_length": self.settings.max_length}

    def items(self, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
        find = reasoning.letter_tokens if self.letters else reasoning.number_tokens
        self._valid = find(tokenizer)

        def check(row: Item) -> None:
            reasoning.encode(tokenizer, *self.text(row), self.settings.max_length)

        return self.load(data=self.settings.data, limit=self.settings.limit, check=check)

    def score(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
    ) -> list[Record]:
        assert self._valid is not None
        encoded = [reasoning.encode(tokenizer, *self.text(i), self.settings.max_length) for i in items]
        choices = [len(item["choices"]["label"]) for item in items] if self.letters else None
        return reasoning.score_answers(model, encoded, self._valid, choices)

    def summarize(self, records: Sequence[Record]) -> dict[str, Any]:
        accuracy = "accuracy" if self.letters else "exact_match"
        counts = {"items": len(records), "cut": sum(r["cut"] for r in records)}
        return counts | _measured(records, {"probability": "probability", accuracy: "correct"})

    def render(self, result: dict[str, Any]) -> str:
        title = f"{self.name}: {result['items']} items, zero-shot, mean [95% interval]"
        if result["cut"]:
            title += f"; {result['cut']} were cut at the front to fit"
        return _measures(title, result)


@dataclass
class CompletionTask(Task):
    """The probability of any completions, by templates over the rows of a file."""

    def identity(self) -> dict[str, Any]:
        drawn = self.settings.thoughts
        return {} if drawn is None else {"thoughts": drawn, "seed": self.settings.seed}

    def items(self, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
        s = self.settings
        if s.thoughts is not None and s.thoughts < 1:
            raise UserError(f"--thoughts is {s.thoughts}; expected a whole number >= 1")
        return completions.load_items(tokenizer, s.data, s.templates, s.max_length, s.limit)

    def score(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
    ) -> list[Record]:
        return completions.score_completions(model, tokenizer, items, self._drawn(model, items))

    def _drawn(self, model: Any, items: Sequence[Item]) -> completions.CompletionThoughts | None:
        """What is drawn before these items, and again before the same ones together."""
        count = self.settings.thoughts
        if count is None:
            return None
        if not completions.thinks_once(model):
            raise UserError(
                f"--thoughts is {count}, of a model that does not think at completions alone; expected"
                " one that was trained with think_at: completion"
            )
        temperature = model.config.thought_temperature
        if temperature == 0 and count > 1:
            raise UserError(
                f"--thoughts is {count}, of a model whose thought_temperature is 0; its thoughts would"
                " all be the same"
            )
        seed = int(digest([self.settings.seed, *items])[:12], 16)
        return completions.CompletionThoughts(temperature, seed, count=count)

    def summarize(self, records: Sequence[Record]) -> dict[str, Any]:
        measures = {"probability": "probability", "exact_match": "correct", "nll": "nll"}
        drawn = {} if self.settings.thoughts is None else {"thoughts": self.settings.thoughts}
        return {"items": len(records), **drawn, **_measured(records, measures)}

    def render(self, result: dict[str, Any]) -> str:
        drawn = f", {result['thoughts']} drawn thoughts" if "thoughts" in result else ""
        return _measures(f"{self.name}: {result['items']} items{drawn}, mean [95% interval]", result)


def _measured(records: Sequence[Record], measures: dict[str, str]) -> dict[str, Any]:
    """Means over records, without thoughts and with them and their difference, by a measure's label;
    ``measures``: its key in a record."""
    result: dict[str, Any] = {}
    for label, key in measures.items():
        values = {
            name: [float(r[f"{name}_{key}"]) for r in records]
            for name in ("base", "mixed")
            if f"{name}_{key}" in records[0]
        }
        if "mixed" in values:
            pairs = zip(values["mixed"], values["base"], strict=True)
            values["gain"] = [mixed - base for mixed, base in pairs]
        result[label] = {name: bootstrap(found).to_dict() for name, found in values.items()}
    return result


def _measures(title: str, result: dict[str, Any]) -> str:
    """The table of what :func:`_measured` gave."""
    measures = [m for m in ("probability", "accuracy", "exact_match", "nll") if m in result]
    names = list(result["probability"])
    rows = [[m.replace("_", " "), *(interval(result[m][n]) for n in names)] for m in measures]
    return grid(title, ["", *(COLUMNS[n] for n in names)], rows)


@dataclass
class ChainTask(Task):
    """Chain of thought with a majority vote."""

    def identity(self) -> dict[str, Any]:
        return asdict(self.settings.chains)

    def items(self, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
        return GSM8K(data=self.settings.data, limit=self.settings.limit, check=_gold)

    def score(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
    ) -> list[Record]:
        records = []
        for item in items:
            gold = _gold(item)
            settings = self.settings.chains
            # From the item, so that a resumed run samples what an uninterrupted one would.
            seed = int(digest([settings.seed, item])[:12], 16)
            records.append(chains.vote(model, tokenizer, item["question"], gold, settings, seed))
        return records

    def summarize(self, records: Sequence[Record]) -> dict[str, Any]:
        settings = self.settings.chains
        return {
            "items": len(records),
            "thinking": settings.thinking,
            "votes": settings.votes,
            "majority": bootstrap([float(r["correct"]) for r in records]).to_dict(),
            "single_chain": bootstrap([r["share"] for r in records]).to_dict(),
            "without_number": sum(n is None for r in records for n in r["numbers"])
            / sum(len(r["numbers"]) for r in records),
        }

    def render(self, result: dict[str, Any]) -> str:
        title = (
            f"{self.name}: {result['items']} items, thinking {result['thinking']}, mean [95% interval]"
        )
        rows = [
            [f"maj@{result['votes']}", interval(result["majority"])],
            ["one chain", interval(result["single_chain"])],
            ["chains without a number", f"{result['without_number']:.4f}"],
        ]
        return grid(title, ["", "share that is right"], rows)


def _gold(item: Item) -> float:
    """The number that a chain should come to."""
    answer = reasoning.gsm8k_text(item)[1]
    number = chains.find_number(answer)
    if number is None:
        raise UserError(f"answer {answer.strip()!r:.80} has no number; expected one behind '####'")
    return number


@dataclass
class PerplexityTask(Task):
    """Losses per token of a text file (default: the standard library's held-out files)."""

    def items(self, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
        from quietstar.data.blocks import tokenize
        from quietstar.data.left_out import LeftOut
        from quietstar.data.sources import local_documents
        from quietstar.data.stdlib import Document, load_stdlib

        size, limit, data = self.settings.block_size, self.settings.limit, self.settings.data
        if size < 2:
            raise UserError(f"--block-size is {size}; expected a whole number >= 2")
        if limit is not None and limit < 1:
            raise UserError(f"--limit is {limit}; expected a whole number >= 1")
        documents = load_stdlib("heldout") if data is None else local_documents(str(data))
        left_out = LeftOut()

        def with_text() -> Iterator[Document]:
            for document in documents:
                if document.text:
                    left_out.used()
                    yield document
                else:
                    left_out.add(f"document {document.name}", "has no text")

        blocks = controls.cut(tokenize(with_text(), tokenizer), size, limit)
        if not blocks:
            raise UserError(f"data file {data} has fewer than two tokens; expected text")
        return [{"ids": block} for block in blocks]

    def score(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
    ) -> list[Record]:
        found = controls.block_losses(model, [item["ids"] for item in items])
        # Six digits are more than fp32 losses hold, and keep the journal small.
        return [
            {name: [round(value, 6) for value in losses] for name, losses in record.items()}
            for record in found
        ]

    def summarize(self, records: Sequence[Record]) -> dict[str, Any]:
        return controls.summarize_controls(records)

    def render(self, result: dict[str, Any]) -> str:
        names = list(result["nll"])
        rows = [["all tokens", *(spread(result["nll"][n], ".4f") for n in names)]]
        if result["gain"]:
            gains = [spread(result["gain"][n], ".4f") for n in names[1:]]
            rows.append(["gain over no thought", "", *gains])
        for number, decile in enumerate(result["nll_by_decile"], start=1):
            rows.append([f"decile {number}", *(f"{decile[n]['mean']:.4f}" for n in names)])
        title = (
            f"{self.name}: {result['tokens']} tokens in {result['blocks']} blocks; nats per token ±"
            " standard error, by decile of the loss without thought (1 easiest)"
        )
        return grid(title, ["", *(COLUMNS[n] for n in names)], rows)


OWN: dict[str, Callable[[str, Settings], Task]] = {
    "gsm8k": lambda name, s: AnswerTask(name, s, GSM8K, reasoning.gsm8k_text, letters=False),
    "csqa": lambda name, s: AnswerTask(name, s, CSQA, reasoning.csqa_text, letters=True),
    "svamp": lambda name, s: AnswerTask(name, s, SVAMP, reasoning.svamp_text, letters=False),
    "gsm8k-cot": ChainTask,
    "completions": CompletionTask,
    "perplexity": PerplexityTask,
}


def digest(content: Any) -> str:
    """A name for plain data, 64 hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
