"""Perplexity of any text with thoughts and with the controls that tell what the thoughts are worth.

Each token's negative log-likelihood, nats, under five predictions of the same weights:

- ``base``: without thoughts (the control "no thought": it is the text pass, whatever follows it);
- ``mixed``: after the thought at the position before;
- ``thought``: the thought's prediction alone, unmixed;
- ``shuffled``: mixed, each position with the thought of another position of the same block;
- ``pause``: mixed, the start embedding in every slot of the thought instead of sampled tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from quietstar.config import QuietStarConfig
from quietstar.data.collator import PaddingCollator
from quietstar.evaluation.perplexity import by_decile, means, undisturbed
from quietstar.thinking.batch_share import BatchShard
from quietstar.thinking.layout import text_ranges
from quietstar.thinking.output_layer import OutputLayer
from quietstar.thinking.rollout import Thoughts
from quietstar.thinking.slots import depth_of_end
from quietstar.thinking.text_batch import TextBatch

if TYPE_CHECKING:
    from quietstar.modeling.model import QuietStarForCausalLM

PAUSE: dict[str, Any] = {"thought_kind": "pause"}
PREDICTIONS = ("base", "mixed", "thought", "shuffled", "pause")


def cut(token_lists: Iterable[list[int]], size: int, limit: int | None = None) -> list[list[int]]:
    """Rows of ``size`` ids from documents that follow one another; the last row may be shorter.

    ``limit`` rows at most. A rest of one token, which nothing could be predicted of, is dropped.
    """
    rows: list[list[int]] = []
    rest: list[int] = []
    for ids in token_lists:
        rest += ids
        while len(rest) >= size:
            rows.append(rest[:size])
            rest = rest[size:]
            if len(rows) == limit:
                return rows
    return rows + [rest] if len(rest) > 1 else rows


def moved(count: int, seed: int) -> list[int]:
    """For every position another one, at random (its own only where there is no other)."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return [following[place] for place in range(count)]


def block_losses(
    model: QuietStarForCausalLM | PreTrainedModel, blocks: Sequence[Sequence[int]]
) -> list[dict[str, list[float]]]:
    """Losses of every token of ``blocks`` (lists of ids) but each block's first.

    Per block a list of ``len(block) - 1`` losses for each of :data:`PREDICTIONS` that the model has:
    one with pause tokens cannot shuffle, one without thoughts has ``base`` alone, and so has a plain
    decoder. Thoughts are the
    most likely ones at every position; a block's result does not depend on the blocks beside it but
    for rounding.
    """
    rows = [{"input_ids": b, "attention_mask": [1] * len(b), "labels": list(b)} for b in blocks]
    batch = {key: value.to(model.device) for key, value in PaddingCollator()(rows).items()}
    ids, config = batch["input_ids"], model.config
    targets = batch["labels"][:, 1:]
    if not isinstance(config, QuietStarConfig):
        return _split({"base": _decoder_losses(model, ids, batch["attention_mask"], targets)}, blocks)
    # The last position has nothing to predict, so it need not think.
    anchors = torch.arange(ids.shape[1] - 1, device=ids.device).expand(len(ids), -1)
    td, slots = model.thought_decoder, depth_of_end(config)
    ranges = text_ranges(batch["attention_mask"], ids)
    text_batch = TextBatch(
        config, ids, ranges, anchors=anchors, temperature=0.0, shard=BatchShard(seed=0)
    )

    def mixed_losses(text: Tensor, slot_hidden: Tensor) -> Tensor:
        mixed, _ = td.mix(text_batch, text, slot_hidden, steps=1)
        return _losses(td.output, mixed[0], targets)

    found: dict[str, Tensor] = {}
    # Of a model without thoughts the text pass alone is wanted; pause tokens think the cheapest way.
    thinks = config.thinks
    with undisturbed(model, **({} if thinks else PAUSE)):
        own = td.rollout(text_batch, slots)
        text, slot_hidden = _kept(own)
        found["base"] = _losses(td.output, text[:, :-1], targets)
        if thinks:
            found["mixed"] = mixed_losses(text, slot_hidden)
            found["thought"] = _losses(td.output, slot_hidden[:, slots - 1], targets)
        if own.ids is not None:
            partner = _partners(blocks, ids.shape[1] - 1).to(ids.device)
            shuffled = own.ids.gather(1, partner[:, :, None].expand_as(own.ids))
            others = Thoughts(anchors, shuffled)
            found["shuffled"] = mixed_losses(*td.packed(text_batch, others, slots))
    if "shuffled" in found:
        with undisturbed(model, **PAUSE):
            found["pause"] = mixed_losses(*_kept(td.rollout(text_batch, slots)))
    return _split(found, blocks)


def _split(found: dict[str, Tensor], blocks: Sequence[Sequence[int]]) -> list[dict[str, list[float]]]:
    """Losses [B, n] of each prediction, block by block."""
    return [
        {name: losses[row, : len(block) - 1].tolist() for name, losses in found.items()}
        for row, block in enumerate(blocks)
    ]


def _decoder_losses(decoder: PreTrainedModel, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """[B, N-1] fp32 of a decoder without thoughts; padding at the right."""
    rows = []
    with undisturbed(decoder):
        for row, text in enumerate(mask.bool()):  # logits of one row at a time
            logits = decoder(ids[row : row + 1, text], use_cache=False).logits[0, :-1].float()
            nll = torch.zeros_like(targets[row], dtype=torch.float32)
            nll[: len(logits)] = cross_entropy(logits, targets[row, : len(logits)], reduction="none")
            rows.append(nll)
    return torch.stack(rows)


def _kept(thoughts: Thoughts) -> tuple[Tensor, Tensor]:
    hidden = thoughts.hidden
    assert hidden is not None
    return hidden


def _losses(output: OutputLayer, hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden [B, n, d], targets [B, n] -> [B, n] fp32."""
    return output.cross_entropy(hidden.flatten(0, 1), targets.flatten()).view_as(targets)


def _partners(blocks: Sequence[Sequence[int]], length: int) -> Tensor:
    """[B, length] int64; positions of padding keep their own thought."""
    partner = torch.arange(length).repeat(len(blocks), 1)
    for row, block in enumerate(blocks):
        count = len(block) - 1
        # The seed comes from the block, so that the control is the same in any batch and order.
        partner[row, :count] = torch.tensor(moved(count, seed=sum(block)))
    return partner


def summarize_controls(records: Sequence[dict[str, list[float]]]) -> dict[str, Any]:
    """Means with standard errors over blocks, the gain of each prediction over ``base``, and means by
    decile of the base loss (easiest first), as plain data."""
    length = max(len(record["base"]) for record in records)
    names = [name for name in PREDICTIONS if name in records[0]]
    counted = np.zeros((len(records), length), dtype=bool)
    values = {name: np.zeros((len(records), length)) for name in names}
    for row, record in enumerate(records):
        counted[row, : len(record["base"])] = True
        for name in names:
            values[name][row, : len(record[name])] = record[name]
    gains = {name: values["base"] - values[name] for name in names[1:]}
    return {
        "tokens": int(counted.sum()),
        "blocks": len(records),
        "nll": means(values, counted),
        "gain": means(gains, counted),
        "nll_by_decile": by_decile(values, values["base"], counted),
    }
