"""Think: sample a thought after every anchor, all of them in parallel, and build the packed pass.

The rollout runs without gradients and keeps every layer's keys and values in its layout: one pass over
the text, then one pass per slot over all columns at once. The packed pass runs text and slots together,
once, with gradients; with the same tokens its hidden states equal the rollout's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.config import QuietStarConfig
from quietstar.thinking.anchors import choose_anchors
from quietstar.thinking.attention import check_layers
from quietstar.thinking.batch_share import WHOLE, BatchPart
from quietstar.thinking.cuda_graphs import run_slots
from quietstar.thinking.layout import LayerKeys, TextRanges, ThoughtLayout, text_positions
from quietstar.thinking.noise import evaluation_mode
from quietstar.thinking.output_layer import output_head
from quietstar.thinking.positions import check_length
from quietstar.thinking.text_part import text_body, text_config_of


class ThoughtEmbedding(nn.Module):
    """The embeddings of the two meta tokens, stored divided by ``embedding_scale``.

    A module of its own, so that adapters can save it whole (peft's ``modules_to_save``).
    ``start``, ``end``: [d].
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(hidden_size))
        self.end = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, scale: float) -> tuple[Tensor, Tensor]:
        """Both embeddings at the size in which they are used."""
        return self.start * scale, self.end * scale


def run_decoder(
    decoder: PreTrainedModel, embeds: Tensor, positions: Tensor, layout: ThoughtLayout
) -> Tensor:
    """One pass through the decoder's body with a layout; final hidden states [B, L, d]."""
    # A 4-D mask is handed through untouched, so that nothing of size L x L is ever built.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
    hidden = text_body(decoder)(
        # In memory of its own: some decoders scale it in place, which an expanded tensor cannot be.
        inputs_embeds=embeds.contiguous(),
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        thought_layout=layout,
    ).last_hidden_state
    check_layers(layout, decoder)
    return hidden


def run_decoder_plain(
    decoder: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor
) -> Tensor:
    """The decoder as it is, without thoughts: final hidden states [B, N, d]."""
    check_length(decoder, input_ids.shape[1])
    return text_body(decoder)(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
    ).last_hidden_state


def depth_of_end(config: QuietStarConfig) -> int:
    """Depth of the end token in a column: start is 1, the sampled tokens 2 .. T+1."""
    return config.thought_length + 2


def slot_embeds(
    config: QuietStarConfig,
    embed: nn.Module,
    meta: tuple[Tensor, Tensor],
    input_ids: Tensor,
    anchors: Tensor,
    thought_ids: Tensor | None,
    slot: int,
) -> Tensor:
    """What is fed into one slot of every column, [B, M, d].

    Args:
        meta: start and end embedding at their size in use.
        anchors: [B, M].
        thought_ids: [B, M, T], or None where pause tokens stand in the thought.
        slot: from 0: start, T thought tokens, end, K - 1 talk tokens.
    """
    batch, columns = anchors.shape
    start, end = meta
    depth = slot + 1
    k = depth - depth_of_end(config)
    if depth == 1 or (k < 0 and thought_ids is None):
        return start.expand(batch, columns, -1)
    if k < 0:
        assert thought_ids is not None
        return embed(thought_ids[:, :, depth - 2])
    if k == 0:
        return end.expand(batch, columns, -1)
    # Past the end of the text anything may stand here: those rows carry no loss.
    ahead = (anchors + k).clamp(max=input_ids.shape[1] - 1)
    return embed(input_ids.gather(1, ahead))


@dataclass
class Thoughts:
    """What a rollout leaves behind.

    Attributes:
        anchors: [B, M] columns' text positions; rationales of a position are neighbours.
        ids: [B, M, T] sampled tokens, None for pause tokens.
        logprobs: [B, M, T] of the distribution sampled from, no gradient.
        text_hidden: [B, N, d].
        slot_hidden: [B, S, M, d] if the rollout ran to the end, otherwise None.
    """

    anchors: Tensor
    ids: Tensor | None
    logprobs: Tensor | None
    text_hidden: Tensor
    slot_hidden: Tensor | None


@torch.no_grad()
def text_pass(
    decoder: PreTrainedModel, input_ids: Tensor, ranges: TextRanges
) -> tuple[Tensor, dict[int, LayerKeys]]:
    """The rollout's first pass: hidden states [B, N, d] and every layer's keys and values."""
    return text_with_layout(decoder, input_ids, ranges)


def text_with_layout(
    decoder: PreTrainedModel, input_ids: Tensor, ranges: TextRanges
) -> tuple[Tensor, dict[int, LayerKeys]]:
    """The text alone, each token seeing its range of it; with gradients where they are on."""
    row_start, row_stop, plain = ranges
    check_length(decoder, input_ids.shape[1])
    no_columns = torch.empty(input_ids.shape[0], 0, dtype=torch.int64, device=input_ids.device)
    layout = ThoughtLayout(row_start, row_stop, no_columns, 0, phase="text", plain_text=plain)
    embeds = decoder.get_input_embeddings()(input_ids)
    hidden = run_decoder(decoder, embeds, text_positions(row_start, row_stop), layout)
    return hidden, layout.keys


@torch.no_grad()
def rollout(
    decoder: PreTrainedModel,
    config: QuietStarConfig,
    meta: tuple[Tensor, Tensor],
    input_ids: Tensor,
    ranges: TextRanges,
    *,
    anchors: Tensor | None = None,
    rationales: int = 1,
    temperature: float = 1.0,
    seed: int | Tensor = 0,
    to_the_end: bool = False,
    num_slots: int | None = None,
    part: BatchPart = WHOLE,
) -> Thoughts:
    """Sample one thought per column.

    Args:
        input_ids: [B, N].
        ranges: what each text token sees (:func:`quietstar.thinking.layout.text_ranges`).
        anchors: [B, A] positions that think; None: what ``config.think_at`` says.
        rationales: R, columns per anchor; they share the text's keys.
        temperature: 0 takes the most likely token.
        seed: of the counter-based generator; the same seed gives the same thoughts. A number, or an
            int64 tensor of one element on the device of the text, which is read there.
        to_the_end: also run the end and talk slots and keep all hidden states.
        num_slots: run no further than this many slots (default: all, with ``to_the_end``).
        part: which part of a larger batch this is; it draws what the larger one would have drawn.
    """
    row_start, row_stop, _ = ranges
    slots = config.num_slots if num_slots is None else num_slots
    check_length(decoder, input_ids.shape[1], slots)
    text_hidden, keys = text_pass(decoder, input_ids, ranges)
    if anchors is None:
        head = output_head(decoder)
        anchors = choose_anchors(config, ranges, text_hidden, head, part)
    anchors = anchors.repeat_interleave(rationales, dim=1)
    steps = ThoughtLayout(row_start, row_stop, anchors, slots, phase="slot")
    steps.keys = keys
    sampled = config.thought_kind == "sampled"
    last = slots if to_the_end else (config.thought_length if sampled else 0)
    ids, logprobs, kept = run_slots(
        slot_steps,
        decoder,
        config,
        meta,
        input_ids,
        steps,
        temperature=temperature,
        seed=seed,
        last=last,
        part=part,
    )
    slot_hidden = torch.stack(kept, dim=1) if to_the_end else None
    return Thoughts(anchors, ids, logprobs, text_hidden, slot_hidden)


@torch.no_grad()
def slot_steps(
    decoder: PreTrainedModel,
    config: QuietStarConfig,
    meta: tuple[Tensor, Tensor],
    input_ids: Tensor,
    steps: ThoughtLayout,
    *,
    temperature: float,
    seed: int | Tensor,
    last: int,
    part: BatchPart = WHOLE,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Run the first ``last`` slots of every column, sampling what they hold.

    Args:
        input_ids: [B, N], for the talk slots.
        steps: a layout in phase ``"slot"`` that has the text's keys.
        seed: a number, or an int64 tensor [1] on the device.
        banned: the meta tokens on the device, where the caller has them there already.

    Returns:
        tokens and log-probabilities [B, M, T] (None for pause tokens), hidden states [B, M, d] per slot.
    """
    embed, head = decoder.get_input_embeddings(), output_head(decoder)
    anchors = steps.anchors
    batch, columns = anchors.shape
    # Asked of the layer itself: a wrapper's weight may be another, or packed.
    dtype = embed(input_ids[:1, :1]).dtype
    ids = logprobs = None
    if config.thought_kind == "sampled":
        shape = (batch, columns, config.thought_length)
        ids = torch.empty(shape, dtype=torch.int64, device=anchors.device)
        logprobs = torch.empty(shape, dtype=torch.float32, device=anchors.device)
    banned = banned_ids(config, anchors.device)
    if not isinstance(seed, Tensor):
        seed = torch.full((1,), seed, dtype=torch.int64, device=anchors.device)
    kept: list[Tensor] = []
    for slot in range(last):
        steps.slot = slot
        embeds = slot_embeds(config, embed, meta, input_ids, anchors, ids, slot)
        hidden = run_decoder(decoder, embeds.to(dtype), steps.slot_positions(), steps)
        kept.append(hidden)
        if ids is not None and logprobs is not None and slot < config.thought_length:
            tokens, logp = head.sample(
                hidden.flatten(0, 1),
                temperature=temperature,
                banned=banned,
                seed=seed,
                # Rows are numbered over the whole batch: every part draws its own numbers.
                offset=(slot * part.count + part.index) * batch * columns,
            )
            ids[:, :, slot] = tokens.view(batch, columns)
            logprobs[:, :, slot] = logp.view(batch, columns)
    return ids, logprobs, kept


def packed_pass(
    decoder: PreTrainedModel,
    config: QuietStarConfig,
    meta: tuple[Tensor, Tensor],
    input_ids: Tensor,
    ranges: TextRanges,
    anchors: Tensor,
    thought_ids: Tensor | None,
    num_slots: int | None = None,
    every_position: bool = False,
) -> tuple[Tensor, Tensor]:
    """Text and slots in one differentiable pass: hidden states [B, N, d] and [B, S, M, d].

    ``num_slots`` stops the columns early (default: all S slots). ``every_position`` is the caller's word
    that the anchors are all positions in order, the same number of times each.
    """
    row_start, row_stop, plain = ranges
    count = config.num_slots if num_slots is None else num_slots
    embed = decoder.get_input_embeddings()
    check_length(decoder, input_ids.shape[1], count)
    layout = ThoughtLayout(
        row_start, row_stop, anchors, count, plain_text=plain, every_position=every_position
    )
    text = embed(input_ids)
    slots = [
        slot_embeds(config, embed, meta, input_ids, anchors, thought_ids, slot).to(text.dtype)
        for slot in range(count)
    ]
    hidden = run_decoder(decoder, torch.cat([text, *slots], dim=1), layout.packed_positions(), layout)
    n = input_ids.shape[1]
    return hidden[:, :n], hidden[:, n:].unflatten(1, (count, layout.num_columns))


def banned_ids(config: QuietStarConfig, device: torch.device) -> Tensor:
    """The meta tokens, which no thought may contain."""
    ids = [i for i in (config.start_token_id, config.end_token_id) if i is not None]
    # Filled on the device: a copy from a list would wait for it.
    banned = torch.empty(len(ids), dtype=torch.int64, device=device)
    for place, token in enumerate(ids):
        banned[place].fill_(token)
    return banned


@torch.no_grad()
def check_head(decoder: PreTrainedModel, input_ids: Tensor) -> None:
    """Compare the model's own logits with :func:`output_head`'s reading of them, once.

    Args:
        input_ids: [1, N], any text.

    Raises:
        ValueError: if a family does something to its logits that is not known here.
    """
    with evaluation_mode(decoder):  # two passes with dropout would differ
        own = decoder(input_ids=input_ids, use_cache=False).logits
        body = text_body(decoder)(input_ids=input_ids, use_cache=False).last_hidden_state
    ours = output_head(decoder).logits(body)
    error = (own.float() - ours.float()).abs().max() / own.float().abs().max().clamp(min=1e-6)
    if not error < 2e-2:
        kind = text_config_of(decoder.config).model_type
        raise ValueError(
            f"model type {kind!r} computes its logits in a way that is not supported (relative"
            f" difference {float(error):.2g})"
        )
