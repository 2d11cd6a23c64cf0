"""A decoder with what makes it think, and the passes that the method is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.config import QuietStarConfig
from quietstar.think_rules import follows_from_the_pass
from quietstar.thinking.anchors import choose_anchors
from quietstar.thinking.next_token import read_and_think, think_at_the_end
from quietstar.thinking.output_layer import OutputLayer, output_layer
from quietstar.thinking.packed import packed_pass
from quietstar.thinking.recurrent.mixers import hands_states_on
from quietstar.thinking.rollout import sample_thoughts
from quietstar.thinking.slots import StartEnd, banned_ids, depth_of_end
from quietstar.thinking.text_batch import TextBatch
from quietstar.thinking.text_pass import run_decoder_plain, text_pass


@dataclass(frozen=True, eq=False)
class ThoughtDecoder:
    """A decoder and what makes it think, for the time of one call; no module, so no state of its own.

    Attributes:
        decoder: the wrapped causal language model.
        thought_embedding: scale -> start and end embedding [d] at the size in which they are used
            (:class:`~quietstar.thinking.layers.ThoughtEmbedding`, perhaps inside an adapter's wrapper).
        mixing_head: :class:`~quietstar.thinking.layers.MixingHead`, perhaps wrapped as well.
    """

    decoder: PreTrainedModel
    config: QuietStarConfig
    thought_embedding: Callable[..., StartEnd]
    mixing_head: Callable[..., tuple[Tensor, Tensor]]

    @property
    def output(self) -> OutputLayer:
        """The decoder's output layer, read anew: gradients may be off now and on later."""
        return output_layer(self.decoder)

    def start_end_embeddings(self) -> StartEnd:
        """Both [d], at the size in which they are used."""
        return self.thought_embedding(self.config.embedding_scale)

    def thought_output(self, temperature: float, device: torch.device) -> OutputLayer:
        """The output layer as a thought's tokens are drawn from it: without the meta tokens."""
        return self.output.at(temperature, banned_ids(self.config, device))

    def text(self, batch: TextBatch) -> Tensor:
        """The text without thoughts, with gradients: hidden states [B, N, d]."""
        ranges = batch.ranges
        # On its own such a decoder would take padding at the left, and other documents, for text.
        own_way = ranges.end is not None or (not ranges.plain and hands_states_on(self.decoder))
        if own_way:
            return text_pass(self.decoder, batch.input_ids, ranges)[0]
        mask, positions = batch.attention_mask, ranges.positions()
        return run_decoder_plain(self.decoder, batch.input_ids, mask, positions)

    @torch.no_grad()
    def choose_anchors(self, batch: TextBatch) -> TextBatch:
        """The batch with the positions that ``config.think_at`` chooses, where it has none yet."""
        hidden = None
        if batch.anchors is None and follows_from_the_pass(self.config.parse_think_at()[0]):
            hidden, _ = text_pass(self.decoder, batch.input_ids, batch.ranges)
        return choose_anchors(batch, hidden, self.output)

    # The passes with thoughts, each in a module of its own.
    rollout = sample_thoughts
    packed = packed_pass
    next_token = think_at_the_end
    text_and_next_token = read_and_think

    def talk_hidden(self, slots: Tensor, steps: int) -> Tensor:
        """The slots [B, S, M, d] that the first talk steps read, [K, B, M, d]."""
        # Slot s has depth s + 1; talk step j reads the hidden state at depth T + 2 + j.
        first = depth_of_end(self.config) - 1
        return slots[:, first : first + steps].transpose(0, 1)

    def mix(
        self, batch: TextBatch, text: Tensor, slots: Tensor, steps: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mixed hidden states of the talk steps (all K of them, or the first ``steps``).

        Args:
            text: [B, N, d]; slots: [B, S, M, d].

        Returns:
            mixed [K, B, M, d] and weight [K, B, M].
        """
        rows, length, width = text.shape
        k, columns = steps or self.config.talk_length, batch.columns
        # A talk step speaks for the position that many tokens after its anchor.
        step = torch.arange(k, device=columns.device)[:, None, None]
        speaks_for = (columns[None] + step).clamp(max=length - 1)
        row = torch.arange(rows, device=columns.device)[None, :, None] * length
        mixed, weight = self.mixing_head(
            text.flatten(0, 1),
            self.talk_hidden(slots, k).flatten(0, 2),
            self.config.mixing_activation,
            (row + speaks_for).flatten(),
            self.config.mixing_floor,
        )
        shape = (k, rows, columns.shape[1])
        return mixed.view(*shape, width), weight.view(shape)
