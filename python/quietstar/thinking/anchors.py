"""Which positions of a text think."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from quietstar.think_rules import follows_from_the_pass, loss_bounds
from quietstar.thinking.text_batch import TextBatch
from quietstar_ext.checks import check_index_range

if TYPE_CHECKING:
    from quietstar.thinking.output_layer import OutputLayer


def choose_anchors(
    batch: TextBatch, hidden: Tensor | None = None, output: OutputLayer | None = None
) -> TextBatch:
    """The batch with the positions that ``config.think_at`` chooses, [B, A] int64, ascending; as it is
    where it has anchors.

    What a row's text chooses does not depend on the padding around it. ``stride`` counts within each
    document; ``random`` and ``entropy`` take a share of a row's text tokens, at least one; ``loss``
    takes the positions whose target the base prediction gives a loss between two bounds, ``completion``
    the batch's ``completion_anchors``. A row that chooses fewer than A positions has the last one
    repeated, of which nothing can be predicted: these columns count nowhere.

    Args:
        batch: random positions are drawn for every part of the larger batch, and its shard's are taken.
        hidden: [B, N, d] of the text, and output: both for the rules that follow from the pass
            (``entropy``, ``loss``) alone.

    Raises:
        ValueError: if the batch has not what the rule goes by.
    """
    return batch if batch.anchors is not None else batch.thinking_at(_chosen(batch, hidden, output))


def _chosen(batch: TextBatch, hidden: Tensor | None, output: OutputLayer | None) -> Tensor:
    ranges, (rows, length) = batch.ranges, batch.input_ids.shape
    rule, number = batch.config.parse_think_at()
    everywhere = torch.arange(length, device=ranges.start.device)
    if rule == "all":
        return everywhere.expand(rows, -1)
    if rule == "completion":
        return _completions(batch)
    if follows_from_the_pass(rule) and (hidden is None or output is None):
        raise ValueError(f"think_at {rule!r} needs the text's hidden states")
    is_text = ranges.start < ranges.stop
    if rule == "stride":
        thinks = is_text & (ranges.positions() % int(number) == 0)
        # With one document in a row the padding decides nothing about the shape (graphs are kept by it).
        max_anchors = math.ceil(length / number) if ranges.end is None else int(thinks.sum(1).max())
    elif rule == "loss":
        assert hidden is not None and output is not None
        thinks = _within_bounds(batch, hidden, output)
        max_anchors = max(1, int(thinks.sum(1).max()))
    else:
        if rule == "random":
            drawn = batch.shard.uniform(rows, length).to(is_text.device)
            score = drawn.gather(1, (is_text.cumsum(1) - 1).clamp(min=0))
        else:
            assert hidden is not None and output is not None
            score = base_entropy(hidden, output)
        order = torch.where(is_text, score, -1.0).argsort(dim=1, descending=True, stable=True)
        share = (is_text.sum(1, keepdim=True).double() * number).round().clamp(min=1)
        thinks = is_text & (order.argsort(dim=1) < share)
        max_anchors = max(1, round(number * length))
    return torch.where(thinks, everywhere, length - 1).sort(1).values[:, :max_anchors]


def _completions(batch: TextBatch) -> Tensor:
    found = batch.completion_anchors
    if found is None:
        raise ValueError(
            "think_at is 'completion' and the batch has no completion_anchors; expected rows of prompts"
            " and completions (quietstar.data.pairs.encode_pair, or data.prompt and data.completion)"
        )
    rows, length = batch.input_ids.shape
    if found.dim() != 2 or len(found) != rows or not found.shape[1]:
        raise ValueError(
            f"completion_anchors has shape {list(found.shape)}; expected [{rows}, completions]"
        )
    check_index_range("completion_anchors", found, length)
    return found.sort(1).values


@torch.no_grad()
def _within_bounds(batch: TextBatch, hidden: Tensor, output: OutputLayer) -> Tensor:
    """[B, N] bool: where the base prediction's loss of the true next token is within bounds."""
    low, high = loss_bounds(batch.config.think_at)
    if batch.labels is None:
        raise ValueError(
            f"think_at is {batch.config.think_at!r} and there are no labels; expected them, as the rule"
            " goes by the true next token's loss (so in training alone)"
        )
    # Of the positions with a target alone: those of a prompt need no vocabulary product.
    where = pad(batch.is_target, (0, 1))
    losses = output.cross_entropy(hidden[where], batch.targets[batch.is_target])
    thinks = torch.zeros_like(where)
    thinks[where] = (losses >= low) & (losses <= high)
    return thinks


@torch.no_grad()
def base_entropy(hidden: Tensor, output: OutputLayer, rows_per_chunk: int = 256) -> Tensor:
    """Entropy in nats of the base prediction, [B, N] fp32, without holding all logits at once."""
    rows = hidden.flatten(0, 1)
    parts = []
    for chunk in rows.split(rows_per_chunk):
        logp = output.logits(chunk).float().log_softmax(-1)
        parts.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(parts).unflatten(0, hidden.shape[:2])
