"""What one call of the model does: without thoughts, with them to predict, or with them to learn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.config import QuietStarConfig
from quietstar.losses.language_model import IGNORE, MixingHead, base_nll, mix_talk_steps, talk
from quietstar.losses.policy import learn, reward_thoughts
from quietstar.modeling.output import QuietStarOutput
from quietstar.thinking.anchors import choose_anchors
from quietstar.thinking.batch_share import WHOLE, BatchPart
from quietstar.thinking.fsdp2 import decoder_gathered
from quietstar.thinking.layout import TextRanges, text_positions
from quietstar.thinking.think import (
    ThoughtEmbedding,
    Thoughts,
    depth_of_end,
    output_head,
    packed_pass,
    rollout,
    run_decoder_plain,
    text_pass,
    text_with_layout,
)


class ThinkingPasses:
    """The passes of :class:`~quietstar.QuietStarForCausalLM`, whose ``forward`` checks the arguments."""

    if TYPE_CHECKING:
        base: PreTrainedModel
        config: QuietStarConfig
        thought_embedding: ThoughtEmbedding
        mixing_head: MixingHead
        training: bool

    def _plain(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        ranges: TextRanges,
        labels: Tensor | None,
        logits_to_keep: int,
        part: BatchPart,
    ) -> QuietStarOutput:
        """The decoder without thoughts (``thought_kind="none"``)."""
        if ranges.end is None:
            positions = text_positions(ranges.start, ranges.stop)
            hidden = run_decoder_plain(self.base, input_ids, attention_mask, positions)
        else:
            hidden = text_with_layout(self.base, input_ids, ranges)[0]
        head = output_head(self.base)
        if labels is None:
            return QuietStarOutput(logits=head.logits(hidden[:, -logits_to_keep:]))
        loss, losses = base_nll(head, hidden, labels, 1.0, part)
        is_target = labels[:, 1:] != IGNORE
        return QuietStarOutput(
            loss=loss,
            nll_loss=loss.detach(),
            base_losses=losses,
            base_loss=losses.sum() / is_target.sum().clamp(min=1),
            is_target=is_target,
        )

    def _predict(
        self,
        input_ids: Tensor,
        ranges: TextRanges,
        logits_to_keep: int,
        temperature: float,
        thought_ids: Tensor | None,
        anchors: Tensor | None,
    ) -> QuietStarOutput:
        """Mixed logits after one thought per position: the slots end with the end token."""
        config, head = self.config, output_head(self.base)
        batch, length = input_ids.shape
        slots = depth_of_end(config)
        logprobs = None
        if anchors is None:
            kept = logits_to_keep or length
            anchors = torch.arange(length - kept, length, device=input_ids.device).expand(batch, -1)
        if thought_ids is not None:
            if thought_ids.dim() == 4 and thought_ids.shape[1] != 1:
                raise ValueError(
                    f"thought_ids has {thought_ids.shape[1]} rationales; expected 1 without labels"
                )
            anchors, ids = self._forced(input_ids, ranges, thought_ids, anchors)
            meta = self.thought_embedding(config.embedding_scale)
            text_hidden, slot_hidden = packed_pass(
                self.base, config, meta, input_ids, ranges, anchors, ids, num_slots=slots
            )
        else:
            thoughts = self._rollout(
                input_ids,
                ranges,
                anchors=anchors,
                temperature=temperature,
                to_the_end=True,
                num_slots=slots,
            )
            ids, logprobs, text_hidden = thoughts.ids, thoughts.logprobs, thoughts.text_hidden
            assert thoughts.slot_hidden is not None
            slot_hidden = thoughts.slot_hidden
        mixed, weight = mix_talk_steps(
            config, self.mixing_head, text_hidden, slot_hidden, anchors, steps=1
        )
        return QuietStarOutput(
            logits=head.logits(mixed[0]),
            mixing_weight=weight[:, :, None].detach(),
            anchors=anchors,
            thought_ids=_by_rationale(ids, 1),
            thought_logprobs=_by_rationale(logprobs, 1),
        )

    def _learn(
        self,
        input_ids: Tensor,
        ranges: TextRanges,
        labels: Tensor,
        thought_ids: Tensor | None,
        anchors: Tensor | None,
        temperature: float,
        baseline_losses: Tensor | None,
        part: BatchPart,
    ) -> QuietStarOutput:
        """Losses, rewards and the policy term for one batch."""
        config, head = self.config, output_head(self.base)
        meta = self.thought_embedding(config.embedding_scale)
        with_grad = torch.is_grad_enabled()
        rationales = config.num_rationales if self.training else 1
        if config.thought_kind == "pause":
            rationales = 1
        thoughts = None
        if thought_ids is None:
            thoughts = self._rollout(
                input_ids,
                ranges,
                anchors=anchors,
                rationales=rationales,
                temperature=temperature,
                to_the_end=not with_grad,
                part=part,
            )
            columns, ids, logprobs = thoughts.anchors, thoughts.ids, thoughts.logprobs
        else:
            columns, ids = self._forced(input_ids, ranges, thought_ids, anchors, part)
            logprobs, rationales = None, thought_ids.shape[1]
        if thoughts is not None and thoughts.slot_hidden is not None:
            text_hidden, slot_hidden = thoughts.text_hidden, thoughts.slot_hidden
        else:
            text_hidden, slot_hidden = packed_pass(
                self.base,
                config,
                meta,
                input_ids,
                ranges,
                columns,
                ids,
                every_position=anchors is None and config.parse_think_at()[0] == "all",
            )
        anchors = columns[:, ::rationales]
        talked = talk(
            config,
            head,
            self.mixing_head,
            text_hidden,
            slot_hidden,
            labels,
            ranges,
            anchors,
            rationales,
            part,
        )
        earned = reward_thoughts(config, head, talked, slot_hidden, anchors, ranges, baseline_losses)
        total, policy = learn(config, head, talked.nll, slot_hidden, ids, earned, part)
        return QuietStarOutput(
            loss=total.loss,
            language_loss=total.language_loss,
            thinking_loss=total.thinking_loss,
            nll_loss=talked.nll.detach(),
            base_losses=talked.base_losses,
            base_loss=talked.base_loss,
            talk_losses=talked.talk_losses.transpose(2, 3),
            talk_loss=talked.talk_loss,
            reward=earned.reward.transpose(1, 2),
            advantage=earned.advantage.transpose(1, 2),
            policy_loss=policy,
            mixing_weight=talked.mixing_weight.transpose(2, 3),
            anchors=anchors,
            has_target=talked.has_target,
            rewarded=earned.rewarded,
            is_target=labels[:, 1:] != IGNORE,
            thought_ids=_by_rationale(ids, rationales),
            thought_logprobs=_by_rationale(logprobs, rationales),
        )

    def _rollout(
        self, input_ids: Tensor, ranges: TextRanges, part: BatchPart = WHOLE, **options: Any
    ) -> Thoughts:
        meta = self.thought_embedding(self.config.embedding_scale)
        seed = part.seed()
        with decoder_gathered(self.base):
            return rollout(
                self.base, self.config, meta, input_ids, ranges, seed=seed, part=part, **options
            )

    def _forced(
        self,
        input_ids: Tensor,
        ranges: TextRanges,
        thought_ids: Tensor,
        anchors: Tensor | None,
        part: BatchPart = WHOLE,
    ) -> tuple[Tensor, Tensor | None]:
        """Columns [B, A*R] and tokens [B, A*R, T] from given thoughts."""
        config = self.config
        batch, length = input_ids.shape
        if anchors is None:
            hidden = None
            if config.parse_think_at()[0] == "entropy":
                hidden, _ = text_pass(self.base, input_ids, ranges)
            anchors = choose_anchors(config, ranges, hidden, output_head(self.base), part)
        count = anchors.shape[1]
        given = tuple(thought_ids.shape)
        fits = len(given) == 4 and given[0] == batch and given[2] in (length, count)
        if not fits or given[1] < 1 or given[3] != config.thought_length:
            raise ValueError(
                f"thought_ids has shape {list(given)}; expected [{batch}, rationales, {length},"
                f" {config.thought_length}] (rows, rationales, positions, thought_length)"
            )
        if given[2] != count:
            index = anchors[:, None, :, None].expand(-1, given[1], -1, given[3])
            thought_ids = thought_ids.gather(2, index)
        columns = anchors.repeat_interleave(given[1], dim=1)
        return columns, thought_ids.transpose(1, 2).flatten(1, 2)


def _by_rationale(columns: Tensor | None, rationales: int) -> Tensor | None:
    """[B, A*R, T] -> [B, R, A, T]."""
    if columns is None:
        return None
    return columns.unflatten(1, (-1, rationales)).transpose(1, 2)
