"""One thought at the end of a text whose keys are cached, before its next token.

The end of the text has been through the decoder (:func:`think_at_the_end`), or its last token has not
and goes together with the thought's start token (:func:`read_and_think`), which is a pass less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quietstar.thinking.attention import layer_keys
from quietstar.thinking.cuda_graphs import run_slots
from quietstar.thinking.layout import HandedKeys, ThoughtLayout
from quietstar.thinking.positions import check_length
from quietstar.thinking.slots import SlotResults, SlotRun, depth_of_end

if TYPE_CHECKING:
    from quietstar.thinking.decoder import ThoughtDecoder

KeysByLayer = dict[int, tuple[Tensor, Tensor]]


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


@dataclass
class NewToken:
    """The text's newest token in every row of a batch, all of which think.

    Attributes:
        ids: [B, 1]; first: [B] the rows' first text token, which lies before the new one.
        keys: by layer, as the layers hand them to their attention, of the text before it.
        length: of that text, with padding.
    """

    ids: Tensor
    first: Tensor
    keys: KeysByLayer
    length: int


@dataclass
class NextToken:
    """What a thought gives.

    Attributes:
        mixed: hidden states [r, d]; weight: mixing weights [r].
        ids: tokens [r, T] or None for pause tokens.
        text_keys: of a :class:`NewToken`, [B, Hkv, 1, D] by layer.
    """

    mixed: Tensor
    weight: Tensor
    ids: Tensor | None
    text_keys: KeysByLayer


def think_at_the_end(td: ThoughtDecoder, end: EndOfText, temperature: float, seed: int) -> NextToken:
    """One thought per row.

    Args:
        temperature: of its tokens; 0 takes the most likely. With another the seed comes from torch's
            generator.
    """
    rows, slots = end.rows, depth_of_end(td.config)
    check_length(td.decoder, end.length, slots)
    keys = end.handed.keys
    if any(len(rows) < len(kept) for kept, _ in keys.values()):
        keys = {i: (k.index_select(0, rows), v.index_select(0, rows)) for i, (k, v) in keys.items()}
    layout = _layout(end.first, end.length, slots, keys)
    layout.states = {i: states.of_rows(rows) for i, states in end.handed.states.items()}
    layout.goes_on_from_states = True
    no_text = rows[:, None]  # no talk slot is run, so none is needed
    made = _think(td, SlotRun(td.start_end_embeddings(), no_text, layout, slots, temperature, seed))
    return _mixed(td, end.hidden, made)


def read_and_think(td: ThoughtDecoder, new: NewToken, temperature: float, seed: int) -> NextToken:
    """The new token's step and one thought per row behind it; arguments as for
    :func:`think_at_the_end`."""
    slots = depth_of_end(td.config)
    check_length(td.decoder, new.length + 1, slots)
    layout = _layout(new.first, new.length, slots + 1, new.keys)
    run = SlotRun(td.start_end_embeddings(), new.ids, layout, slots, temperature, seed, new_text=True)
    made = _think(td, run)
    return _mixed(td, made.hidden[0][:, 0], made)


def _layout(first: Tensor, length: int, slots: int, kept: KeysByLayer) -> ThoughtLayout:
    """Of one column per row, behind the last of ``length`` text tokens."""
    # The text as one range per row: the layout needs no more of it than the last position.
    start = first[:, None].to(torch.int32)
    stop = torch.full_like(start, length)
    layout = ThoughtLayout(start, stop, torch.zeros_like(first)[:, None], slots, phase="slot")
    for index, (keys, values) in kept.items():
        # A sliding-window cache holds only the tail of the text.
        layout.keys[index] = layer_keys(keys, values, offset=length - keys.shape[2])
    return layout


def _think(td: ThoughtDecoder, run: SlotRun) -> SlotResults:
    if run.temperature:
        run.seed = int(torch.randint(2**62, ()))
    run.together = run.layout.num_slots
    return run_slots(td.decoder, td.config, run)


def _mixed(td: ThoughtDecoder, base: Tensor, made: SlotResults) -> NextToken:
    config = td.config
    mixed, weight = td.mixing_head(
        base, made.hidden[-1][:, 0], config.mixing_activation, floor=config.mixing_floor
    )
    ids = None if made.ids is None else made.ids[:, 0]
    return NextToken(mixed, weight[:, 0].float(), ids, made.text_keys)
