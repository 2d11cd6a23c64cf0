"""Passes through the decoder's body: as it is, with a layout, and over the text alone."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.thinking.attention import check_layers
from quietstar.thinking.layout import TextRanges, ThoughtLayout
from quietstar.thinking.positions import check_length
from quietstar.thinking.text_part import text_body, text_config_of

# These multiply what they embed themselves (``embedding_multiplier``), and not embeddings that they are
# given; others with a setting of this name multiply both.
_MULTIPLIES_ITS_OWN = ("falcon_h1",)


def run_decoder(
    decoder: PreTrainedModel, embeds: Tensor, positions: Tensor, layout: ThoughtLayout
) -> Tensor:
    """One pass through the decoder's body with a layout; final hidden states [B, L, d]."""
    # A 4-D mask is handed through untouched, so that nothing of size L x L is ever built.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
    config = text_config_of(decoder.config)
    if config.model_type in _MULTIPLIES_ITS_OWN:
        embeds = embeds * config.embedding_multiplier
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


def text_pass(
    decoder: PreTrainedModel, input_ids: Tensor, ranges: TextRanges
) -> tuple[Tensor, ThoughtLayout]:
    """The text alone, each token seeing its range of it: hidden states [B, N, d], and every layer's keys
    and values or states in the layout of the pass."""
    check_length(decoder, input_ids.shape[1])
    no_columns = torch.empty(input_ids.shape[0], 0, dtype=torch.int64, device=input_ids.device)
    layout = ThoughtLayout.over(ranges, no_columns, 0, phase="text")
    embeds = decoder.get_input_embeddings()(input_ids)
    hidden = run_decoder(decoder, embeds, ranges.positions(), layout)
    return hidden, layout
