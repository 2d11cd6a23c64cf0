"""What there is to see in a text: per token, both predictions, the thoughts and what they were worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quietstar.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quietstar.modeling.model import QuietStarForCausalLM

Prediction = tuple[str, float, bool]

# Tokens that a character can be spread over (bytes of UTF-8).
_LONGEST_CHARACTER = 4


@dataclass(frozen=True)
class SeenThought:
    """One thought before a token.

    Attributes:
        text: its tokens; kind: "most likely" or "sampled".
        gain: base less mixed loss of the token, nats; weight: the mixing weight.
        reward: what REINFORCE would see, summed over the talk steps (None where the thought does not
            count).
    """

    text: str
    kind: str
    gain: float
    weight: float
    reward: float | None


@dataclass(frozen=True)
class SeenToken:
    """A token of the text.

    Attributes:
        text: how it is spelt at its place. For the first token of a row nothing more is known.
        base, mixed: losses without and with the most likely thought, nats.
        weight: mixing weight of that thought.
        top_base, top_mixed: the most probable tokens, their probabilities, whether one is this token.
        thoughts: the most likely one first, then samples.
    """

    text: str
    row: int
    base: float | None = None
    mixed: float | None = None
    weight: float | None = None
    top_base: tuple[Prediction, ...] = ()
    top_mixed: tuple[Prediction, ...] = ()
    thoughts: tuple[SeenThought, ...] = field(default=())

    @property
    def gain(self) -> float | None:
        """What thinking gained, nats; None where nothing was predicted."""
        return None if self.base is None or self.mixed is None else self.base - self.mixed


def split_rows(ids: Sequence[int], context: int, shortest: int) -> list[list[int]]:
    """Cut a text into rows of up to ``context`` tokens that overlap by one, so that all but the very
    first token are predicted; an end of fewer than ``shortest`` tokens is joined to the row before.
    """
    rows = []
    start = 0
    while start < len(ids) - 1:
        stop = start + context
        if len(ids) - (stop - 1) < shortest:
            stop = len(ids)
        rows.append(list(ids[start:stop]))
        start = stop - 1
    return rows


@torch.no_grad()
def look(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    *,
    samples: int = 3,
    top: int = 5,
    seed: int = 0,
) -> list[SeenToken]:
    """Look at every token of ``rows``, each a text of its own, one row at a time.

    The model's mode and torch's generator are left as they were.

    Raises:
        UserError: for a model without thoughts, or a row with too few tokens to look at.
    """
    config = model.config
    if not config.thinks:
        raise UserError("this model has no thoughts to look at (thought_kind is 'none')")
    shortest = config.talk_length + 2
    training, state = model.training, torch.get_rng_state()
    model.eval()
    torch.manual_seed(seed)
    seen: list[SeenToken] = []
    try:
        for number, row in enumerate(rows):
            if len(row) < shortest:
                raise UserError(
                    f"row {number} has {len(row)} tokens; expected at least {shortest} (talk_length + 2)"
                )
            ids = torch.tensor([list(row)], device=model.device)
            seen += _look_at_row(model, tokenizer, ids, number, samples, top)
    finally:
        torch.set_rng_state(state)
        model.train(training)
    return seen


def _look_at_row(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    number: int,
    samples: int,
    top: int,
) -> Iterator[SeenToken]:
    length = ids.shape[1]
    anchors = torch.arange(length, device=ids.device)[None]
    sampled = model.config.thought_kind == "sampled"
    temperature = model.config.thought_temperature or 1.0
    runs = []
    for run in range(1 + (samples if sampled else 0)):
        runs.append(
            model(ids, labels=ids, anchors=anchors, thought_temperature=temperature if run else 0.0)
        )
    first = runs[0]
    mixed_top = _top(model(ids, thought_ids=first.thought_ids, anchors=anchors).logits[0], top)
    with _without_thoughts(model):
        base_top = _top(model(ids).logits[0], top)
    base = first.base_losses[0].tolist()
    columns = [_columns(output, tokenizer, length) for output in runs]
    spelt = spell(tokenizer, ids[0].tolist())
    yield SeenToken(spelt[0], number)
    rewarded = first.rewarded[0].tolist()
    for at in range(length - 1):
        thoughts = []
        for run, (mixed, weight, reward, texts) in enumerate(columns):
            if texts is None:
                continue
            thoughts.append(
                SeenThought(
                    texts[at],
                    "sampled" if run else "most likely",
                    base[at] - mixed[at],
                    weight[at],
                    reward[at] if rewarded[at] else None,
                )
            )
        yield SeenToken(
            spelt[at + 1],
            number,
            base[at],
            columns[0][0][at],
            columns[0][1][at],
            _named(tokenizer, base_top[at], int(ids[0, at + 1])),
            _named(tokenizer, mixed_top[at], int(ids[0, at + 1])),
            tuple(thoughts),
        )


def _columns(
    output: Any, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[list[float], list[float], list[float], list[str] | None]:
    """Mixed loss, weight, reward and thought of every position that predicts."""
    kept = slice(0, length - 1)
    texts = None
    if output.thought_ids is not None:
        texts = [tokenizer.decode(chain) for chain in output.thought_ids[0, 0, kept].tolist()]
    return (
        output.talk_losses[0, 0, 0, kept].tolist(),
        output.mixing_weight[0, 0, 0, kept].tolist(),
        output.reward[0, 0, kept].tolist(),
        texts,
    )


def _top(logits: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """The ``count`` most probable tokens of every row of [N, V]."""
    found = logits.float().softmax(-1).topk(min(count, logits.shape[-1]), dim=-1)
    return [
        list(zip(tokens, chances, strict=True))
        for tokens, chances in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]


def _named(
    tokenizer: PreTrainedTokenizerBase, found: list[tuple[int, float]], true: int
) -> tuple[Prediction, ...]:
    return tuple((tokenizer.decode([token]), chance, token == true) for token, chance in found)


@contextmanager
def _without_thoughts(model: QuietStarForCausalLM) -> Iterator[None]:
    kind = model.config.thought_kind
    model.config.thought_kind = "none"
    try:
        yield
    finally:
        model.config.thought_kind = kind


def spell(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """How every token is spelt at its place; together they are the text.

    Parts of a character spell nothing until the last one, which spells it all.
    """
    pieces: list[str] = []
    # Decoded from the token before on, because a tokenizer may drop the space that opens a text.
    start = read = 0
    for at in range(len(ids)):
        before = tokenizer.decode(ids[start:read]) if read else ""
        whole = tokenizer.decode(ids[start : at + 1])
        if whole.endswith("\ufffd") and at + 1 < len(ids) and at - read < _LONGEST_CHARACTER:
            pieces.append("")
            continue
        pieces.append(whole[len(before) :])
        start, read = read, at + 1
    return pieces
