"""Text and thoughts in one differentiable pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from quietstar.thinking.kept_outputs import taking
from quietstar.thinking.layout import ThoughtLayout
from quietstar.thinking.positions import check_length
from quietstar.thinking.rollout import Thoughts
from quietstar.thinking.shared_start import start_repeated
from quietstar.thinking.slots import SlotInputs
from quietstar.thinking.text_batch import TextBatch
from quietstar.thinking.text_pass import run_decoder

if TYPE_CHECKING:
    from quietstar.thinking.decoder import ThoughtDecoder


def packed_pass(
    td: ThoughtDecoder, batch: TextBatch, thoughts: Thoughts, num_slots: int | None = None
) -> tuple[Tensor, Tensor]:
    """Hidden states of the text [B, N, d] and of the slots [B, S, M, d], with gradients.

    Args:
        batch: with its anchors.
        num_slots: stops the columns early (default: all S slots).
    """
    count = num_slots or td.config.num_slots
    embed, n = td.decoder.get_input_embeddings(), batch.input_ids.shape[1]
    check_length(td.decoder, n, count)
    options = {"every_position": batch.every_position, "rationales": batch.rationales}
    layout = ThoughtLayout.over(batch.ranges, batch.columns, count, **options)
    start_end = td.start_end_embeddings()
    inputs = SlotInputs(td.config, embed, start_end, batch.input_ids, batch.columns, batch.rationales)
    embeds = inputs.packed(count, thoughts.ids)
    with taking(thoughts.kept):
        hidden = run_decoder(td.decoder, embeds, layout.packed_positions(), layout)
    return hidden[:, :n], start_repeated(hidden[:, n:], layout.columns)
