"""What stands in the slots of a thought, and running them one after the other.

A slot whose token is drawn waits for the slot before it. The others do not: the last thought token, the
end token and the talk tokens (and all slots of a pause) run together, as neighbours in one pass. So does
the start token with the text's newest token, where that one has not been through the decoder yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.config import QuietStarConfig
from quietstar.thinking.batch_share import WHOLE_BATCH, BatchShard
from quietstar.thinking.kept_outputs import KeptOutputs, keeping
from quietstar.thinking.layout import ThoughtLayout, first_keys
from quietstar.thinking.output_layer import output_layer
from quietstar.thinking.text_pass import run_decoder
from quietstar_ext.native import takes_cuda_path

StartEnd = tuple[Tensor, Tensor]
# Slots of a rollout that run together: one pass less for the two that every prediction needs, and rows
# (so memory) no more than twice those of one slot. Never by the batch's size: the processes of a sharded
# decoder must run equally many passes.
SLOTS_TOGETHER = 2


def depth_of_end(config: QuietStarConfig) -> int:
    """Depth of the end token in a column: start is 1, the sampled tokens 2 .. T+1."""
    return config.thought_length + 2


def banned_ids(config: QuietStarConfig, device: torch.device) -> Tensor:
    """The meta tokens, which no thought may contain."""
    ids = [i for i in (config.start_token_id, config.end_token_id) if i is not None]
    # Filled on the device: a copy from a list would wait for it.
    banned = torch.empty(len(ids), dtype=torch.int64, device=device)
    for place, token in enumerate(ids):
        banned[place].fill_(token)
    return banned


@dataclass
class SlotInputs:
    """What the slots of a batch of columns are made of.

    Attributes:
        embed: the decoder's input embeddings.
        start_end: start and end embedding [d] at their size in use.
        input_ids: [B, N], for the talk slots.
        anchors: [B, M], the columns' text positions.
        rationales: R, columns that share a start slot.
    """

    config: QuietStarConfig
    embed: nn.Module
    start_end: StartEnd
    input_ids: Tensor
    anchors: Tensor
    rationales: int = 1

    def embeds(self, slot: int, thought_ids: Tensor | None) -> Tensor:
        """What is fed into one slot of every column, [B, M, d]; into the start slot of every anchor,
        [B, A, d].

        Args:
            slot: from 0: start, T thought tokens, end, K - 1 talk tokens; -1: the text's newest token.
            thought_ids: [B, M, T], or None where pause tokens stand in the thought.
        """
        rows, columns = self.anchors.shape
        start, end = (embedding.expand(rows, columns, -1) for embedding in self.start_end)
        behind_end = slot + 1 - depth_of_end(self.config)
        if behind_end == 0:
            return end
        if behind_end > 0:
            # Past the end of the text anything may stand here: those rows carry no loss.
            ahead = (self.anchors + behind_end).clamp(max=self.input_ids.shape[1] - 1)
            return self.embed(self.input_ids.gather(1, ahead))
        if slot < 0:
            return self.embed(self.input_ids[:, :1])
        if slot == 0:
            return start[:, : columns // self.rationales]
        if thought_ids is None:
            return start
        return self.embed(thought_ids[:, :, slot - 1])

    def embeds_from(self, slot: int, count: int, thought_ids: Tensor | None) -> Tensor:
        """What is fed into several slots of every column, slot after slot: [B, count * M, d]."""
        embeds = [self.embeds(each, thought_ids) for each in range(slot, slot + count)]
        return embeds[0] if count == 1 else torch.cat(embeds, dim=1)

    def packed(self, count: int, thought_ids: Tensor | None) -> Tensor:
        """The text's embeddings and those of the first ``count`` slots, [B, N + A + (count-1)·M, d].

        All tokens are looked up at once: each look-up has a gradient as large as the table, and these
        would be added up one by one. A CPU's 16-bit table is looked up slot by slot all the same: the
        longer a token's sum, the more of it is rounded away there.
        """
        (rows, columns), length = self.anchors.shape, self.input_ids.shape[1]
        drawn = min(count - 1, self.config.thought_length)
        talk = max(count - depth_of_end(self.config), 0)
        behind_end = torch.arange(1, talk + 1, device=self.anchors.device)[:, None]
        # Past the end of the text anything may stand there: those rows carry no loss.
        ahead = (self.anchors[:, None] + behind_end).clamp(max=length - 1).flatten(1)
        ids = [self.input_ids]
        if thought_ids is not None:
            ids += thought_ids[:, :, :drawn].unbind(2)
        before_end = len(ids)
        ids += self.input_ids.gather(1, ahead).split(columns, dim=1) if talk else ()
        found = self._looked_up(ids)
        start, end = (embedding.to(found[0].dtype) for embedding in self.start_end)
        starts = columns // self.rationales + (drawn * columns if thought_ids is None else 0)
        ends = columns if count > drawn + 1 else 0
        pieces = [
            found[0],
            start.expand(rows, starts, -1),
            *found[1:before_end],
            end.expand(rows, ends, -1),
            *found[before_end:],
        ]
        return torch.cat(pieces, dim=1)

    def _looked_up(self, ids: list[Tensor]) -> Sequence[Tensor]:
        """The embeddings of tokens [B, n] each."""
        table = getattr(self.embed, "weight", None)
        if isinstance(table, Tensor) and table.dtype.itemsize == 2 and not takes_cuda_path(table):
            return [self.embed(each) for each in ids]
        found: Tensor = self.embed(torch.cat(ids, dim=1))
        return found.split([each.shape[1] for each in ids], dim=1)


@dataclass
class SlotRun:
    """The first ``last`` slots of every column, to be run one after the other.

    Attributes:
        start_end: start and end embedding [d] at their size in use.
        input_ids: [B, N], for the talk slots.
        layout: in phase ``"slot"``, with the text's keys.
        temperature: of the sampled tokens; 0 takes the most likely.
        seed: a number, or an int64 tensor [1] on the device.
        shard: which part of a larger batch this is.
        keeps: whether outputs of linear layers are kept for a packed pass.
        together: so many slots may run in one pass, where their tokens are known.
        new_text: the text's newest token, ``input_ids`` [B, 1], is not among its keys and runs first, as
            if it were a slot. The layout has one slot more than there are, and one column per row, which
            hangs from the token before that one.
    """

    start_end: StartEnd
    input_ids: Tensor
    layout: ThoughtLayout
    last: int
    temperature: float
    seed: int | Tensor
    shard: BatchShard = WHOLE_BATCH
    keeps: bool = False
    together: int = SLOTS_TOGETHER
    new_text: bool = False

    def passes(self, drawn: int) -> Iterator[tuple[int, int]]:
        """First slot and number of slots of each pass, where the first ``drawn`` draw a token each."""
        slot = -1 if self.new_text else 0
        while slot < self.last:
            drawing = max(slot, 0)
            count = min(self.together, self.last - slot)
            if drawing < drawn:
                count = drawing + 1 - slot
            yield slot, count
            slot += count


@dataclass
class SlotResults:
    """What the slots held and gave.

    Attributes:
        ids, logprobs: [B, M, T], None for pause tokens; hidden: [B, M, d] of every slot, and before
            them of a new text token.
        text_keys: of a new text token, by layer: keys and values [B, Hkv, 1, D].
        kept: what linear layers gave, if the run was to keep it.
    """

    ids: Tensor | None
    logprobs: Tensor | None
    hidden: list[Tensor]
    text_keys: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    kept: KeptOutputs | None = None


@torch.no_grad()
def run_slots_singly(decoder: PreTrainedModel, config: QuietStarConfig, run: SlotRun) -> SlotResults:
    """Run the slots, sampling what they hold."""
    if not run.keeps:
        return _run_slots(decoder, config, run)
    with keeping() as record:
        made = _run_slots(decoder, config, run)
    return replace(made, kept=KeptOutputs.of(record, run.layout.slot_rows(run.last)))


def _run_slots(decoder: PreTrainedModel, config: QuietStarConfig, run: SlotRun) -> SlotResults:
    embed, output, layout = decoder.get_input_embeddings(), output_layer(decoder), run.layout
    anchors = layout.anchors
    batch, columns = anchors.shape
    inputs = SlotInputs(config, embed, run.start_end, run.input_ids, anchors, layout.rationales)
    # Asked of the layer itself: a wrapper's weight may be another, or packed.
    dtype = embed(run.input_ids[:1, :1]).dtype
    ids = logprobs = None
    if config.thought_kind == "sampled":
        shape = (batch, columns, config.thought_length)
        ids = torch.empty(shape, dtype=torch.int64, device=anchors.device)
        logprobs = torch.empty(shape, dtype=torch.float32, device=anchors.device)
    # Made here, so in a graph as well: every replay casts the weights anew, and nothing stays behind.
    output = output.at(run.temperature, banned_ids(config, anchors.device))
    if ids is not None:
        output = output.for_draws()
    seed = run.seed
    if not isinstance(seed, Tensor):
        seed = torch.full((1,), seed, dtype=torch.int64, device=anchors.device)
    kept: list[Tensor] = []
    drawn = 0 if ids is None else config.thought_length
    for slot, count in run.passes(drawn):
        layout.slot, layout.at_once = slot + run.new_text, count
        embeds = inputs.embeds_from(slot, count, ids)
        hidden = run_decoder(decoder, embeds.to(dtype), layout.slot_positions(), layout)
        if layout.repeats > 1:
            hidden = hidden.repeat_interleave(layout.repeats, dim=1)
        kept.extend(hidden.unflatten(1, (count, columns)).unbind(1))
        slot += count - 1
        if ids is not None and logprobs is not None and slot < drawn:
            # Rows are numbered over the whole batch: every part draws its own numbers.
            offset = (slot * run.shard.count + run.shard.index) * batch * columns
            tokens, logp = output.sample(kept[-1].flatten(0, 1), seed, offset)
            ids[:, :, slot] = tokens.view(batch, columns)
            logprobs[:, :, slot] = logp.view(batch, columns)
    return SlotResults(ids, logprobs, kept, first_keys(layout) if run.new_text else {})
