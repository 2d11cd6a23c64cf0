"""Sample a thought after every anchor, all of them in parallel and without gradients.

One pass over the text keeps every layer's keys and values; then one pass per slot, or per two whose
tokens are known, runs over all columns at once. :mod:`quietstar.thinking.packed` runs text and slots
together; with the same tokens its hidden states equal the rollout's.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quietstar.thinking.anchors import choose_anchors
from quietstar.thinking.cuda_graphs import run_slots
from quietstar.thinking.fsdp2 import decoder_gathered
from quietstar.thinking.kept_outputs import KeptOutputs, keeping, keeps_outputs
from quietstar.thinking.layout import ThoughtLayout
from quietstar.thinking.positions import check_length
from quietstar.thinking.slots import SlotRun
from quietstar.thinking.text_batch import TextBatch
from quietstar.thinking.text_pass import text_pass

if TYPE_CHECKING:
    from quietstar.thinking.decoder import ThoughtDecoder


@dataclass
class Thoughts:
    """Thoughts that were sampled or given, and what their rollout leaves behind.

    Attributes:
        anchors: [B, A], the text positions that thought.
        ids: [B, M, T] tokens, None for pause tokens.
        logprobs: [B, M, T] of the distribution sampled from, no gradient.
        text_hidden: [B, N, d].
        slot_hidden: [B, S, M, d] of the slots whose hidden states the rollout was asked for.
        kept: what linear layers gave for the text and the slots that tokens were drawn from.
    """

    anchors: Tensor
    ids: Tensor | None
    logprobs: Tensor | None = None
    text_hidden: Tensor | None = None
    slot_hidden: Tensor | None = None
    kept: KeptOutputs | None = None

    @property
    def hidden(self) -> tuple[Tensor, Tensor] | None:
        """Hidden states of text and slots, where the rollout has kept both."""
        if self.text_hidden is None or self.slot_hidden is None:
            return None
        return self.text_hidden, self.slot_hidden

    def of_rows(self, rows: slice) -> Thoughts:
        """What the packed pass needs for some texts of the batch."""
        ids, logprobs = (None if t is None else t[rows] for t in (self.ids, self.logprobs))
        kept = None if self.kept is None else self.kept.of_rows(rows)
        return Thoughts(self.anchors[rows], ids, logprobs, kept=kept)


@torch.no_grad()
def sample_thoughts(td: ThoughtDecoder, batch: TextBatch, keep_slots: int | None = None) -> Thoughts:
    """One thought per column. The same seed of the batch's shard gives the same thoughts.

    Args:
        keep_slots: run so many slots and keep their hidden states; None: sample only.
    """
    config = td.config
    slots = keep_slots or config.num_slots
    last = keep_slots or (config.thought_length if config.thought_kind == "sampled" else 0)
    with decoder_gathered(td.decoder):
        start_end, seed = td.start_end_embeddings(), batch.shard.seed()
        check_length(td.decoder, batch.input_ids.shape[1], slots)
        keeps = keep_slots is None and keeps_outputs(td.decoder)
        with keeping() if keeps else nullcontext() as record:
            text_hidden, text = text_pass(td.decoder, batch.input_ids, batch.ranges)
        batch = choose_anchors(batch, text_hidden, td.output)
        layout = ThoughtLayout.over(
            batch.ranges, batch.columns, slots, phase="slot", rationales=batch.rationales
        )
        layout.keys, layout.states = text.keys, text.states
        run = SlotRun(
            start_end,
            batch.input_ids,
            layout,
            last,
            temperature=batch.temperature,
            seed=seed,
            shard=batch.shard,
            keeps=keeps and last > 0,
        )
        made = run_slots(td.decoder, config, run)
    slot_hidden = torch.stack(made.hidden, dim=1) if keep_slots else None
    assert batch.anchors is not None
    kept = KeptOutputs.of(record, (batch.input_ids.shape[1],)) if record is not None else None
    if kept is not None and made.kept is not None:
        kept = kept.followed_by(made.kept)
    return Thoughts(batch.anchors, made.ids, made.logprobs, text_hidden, slot_hidden, kept)
