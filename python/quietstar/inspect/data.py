"""What a model thinks in a text: per token both predictions, the thoughts and what they gained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quietstar.errors import UserError
from quietstar.evaluation.perplexity import undisturbed

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
    seen: list[SeenToken] = []
    with undisturbed(model, seed):
        for number, row in enumerate(rows):
            if len(row) < shortest:
                raise UserError(
                    f"row {number} has {len(row)} tokens; expected at least {shortest} (talk_length + 2)"
                )
            ids = torch.tensor([list(row)], device=model.device)
            seen += _look_at_row(model, tokenizer, ids, number, samples, top)
    return seen


def _look_at_row(
    model: QuietStarForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    number: int,
    samples: int,
    top: int,
) -> Iterator[SeenToken]:
    config, text = model.config, ids[0].tolist()
    anchors = torch.arange(len(text), device=ids.device)[None]
    temperatures = [0.0]
    if config.thought_kind == "sampled":
        temperatures += [config.thought_temperature or 1.0] * samples
    runs = [model(ids, labels=ids, anchors=anchors, thought_temperature=t) for t in temperatures]
    first = runs[0]
    mixed_logits = model(ids, thought_ids=first.thought_ids, anchors=anchors).logits[0]
    with undisturbed(model, thought_kind="none"):
        base_logits = model(ids).logits[0]
    spelt, base = spell(tokenizer, text), first.base_losses[0].tolist()
    mixed, weight = (t[0, 0, 0].tolist() for t in (first.talk_losses, first.mixing_weight))
    top_base, top_mixed = (_top(tokenizer, t, text, top) for t in (base_logits, mixed_logits))
    thoughts = [
        _thoughts(tokenizer, run, base, "sampled" if i else "most likely") for i, run in enumerate(runs)
    ]
    yield SeenToken(spelt[0], number)
    for at in range(len(text) - 1):
        yield SeenToken(
            spelt[at + 1],
            number,
            base[at],
            mixed[at],
            weight[at],
            top_base[at],
            top_mixed[at],
            tuple(seen[at] for seen in thoughts if seen),
        )


def _thoughts(
    tokenizer: PreTrainedTokenizerBase, output: Any, base: list[float], kind: str
) -> list[SeenThought]:
    """The thought at every position that predicts; empty for pause tokens."""
    if output.thought_ids is None:
        return []
    columns = zip(
        base,
        output.thought_ids[0, 0].tolist(),
        output.talk_losses[0, 0, 0].tolist(),
        output.mixing_weight[0, 0, 0].tolist(),
        output.reward[0, 0].tolist(),
        output.rewarded[0].tolist(),
        strict=False,  # the last position predicts nothing
    )
    return [
        SeenThought(tokenizer.decode(ids), kind, loss - mixed, weight, reward if rewarded else None)
        for loss, ids, mixed, weight, reward, rewarded in columns
    ]


def _top(
    tokenizer: PreTrainedTokenizerBase, logits: Tensor, text: Sequence[int], count: int
) -> list[tuple[Prediction, ...]]:
    """The ``count`` most probable tokens of every row of logits [N, V] but the last, which are behind
    ``text`` [N]."""
    found = logits[:-1].float().softmax(-1).topk(min(count, logits.shape[-1]), dim=-1)
    rows = zip(found.indices.tolist(), found.values.tolist(), text[1:], strict=True)
    return [
        tuple(
            (tokenizer.decode([token]), chance, token == true)
            for token, chance in zip(tokens, chances, strict=True)
        )
        for tokens, chances, true in rows
    ]


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
