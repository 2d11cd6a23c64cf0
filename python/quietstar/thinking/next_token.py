"""One thought at the end of a text whose keys are cached, before its next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quietstar.thinking.attention import layer_keys
from quietstar.thinking.cuda_graphs import run_slots
from quietstar.thinking.layout import HandedKeys, ThoughtLayout
from quietstar.thinking.positions import check_length
from quietstar.thinking.slots import SlotRun, depth_of_end

if TYPE_CHECKING:
    from quietstar.thinking.decoder import ThoughtDecoder


@dataclass
class EndOfText:
    """The end of the text in those rows of a batch that think.

    Attributes:
        handed: all rows' keys and values, as the layers handed them to their attention.
        rows: [r] rows of the batch; first: [r] their first text token.
        length: of the text, with padding.
        hidden: [r, d] of the rows' last tokens.
    """

    handed: HandedKeys
    rows: Tensor
    first: Tensor
    length: int
    hidden: Tensor


def think_at_the_end(
    td: ThoughtDecoder, end: EndOfText, temperature: float, seed: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One thought per row.

    Args:
        temperature: of its tokens; 0 takes the most likely. With another the seed comes from torch's
            generator.

    Returns:
        mixed hidden states [r, d], mixing weights [r], tokens [r, T] or None for pause tokens.
    """
    config, rows = td.config, end.rows
    slots = depth_of_end(config)
    check_length(td.decoder, end.length, slots)
    # The text as one range per row: the layout needs no more of it than the last position.
    first = end.first[:, None].to(torch.int32)
    stop = torch.full_like(first, end.length)
    layout = ThoughtLayout(first, stop, torch.zeros_like(rows)[:, None], slots, phase="slot")
    for index, (keys, values) in end.handed.keys.items():
        if len(rows) < len(keys):
            keys, values = keys.index_select(0, rows), values.index_select(0, rows)
        # A sliding-window cache holds only the tail of the text.
        layout.keys[index] = layer_keys(keys, values, offset=end.length - keys.shape[2])
    if temperature:
        seed = int(torch.randint(2**62, ()))
    no_text = rows[:, None]  # no talk slot is run, so none is needed
    run = SlotRun(td.start_end_embeddings(), no_text, layout, slots, temperature, seed, together=slots)
    made = run_slots(td.decoder, config, run)
    mixed, weight = td.mixing_head(
        end.hidden, made.hidden[-1][:, 0], config.mixing_activation, floor=config.mixing_floor
    )
    return mixed, weight[:, 0].float(), None if made.ids is None else made.ids[:, 0]
