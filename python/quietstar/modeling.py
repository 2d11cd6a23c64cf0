"""The model: a Hugging Face decoder that thinks before it speaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .attention import check_supported, implementation_name
from .checks import check_baseline, check_ignored, check_meta_tokens, check_text
from .config import QuietStarConfig
from .generation import SpokenThought, Thinking, ThinkingGenerationMixin
from .layout import TextRanges, text_positions, text_ranges
from .learn import learn, reward_thoughts
from .output import QuietStarOutput
from .parts import WHOLE, BatchPart
from .sharding import decoder_gathered, output_layer_gathered
from .talk import MixingHead, base_nll, check_labels, mix_talk_steps, talk
from .think import (
    ThoughtEmbedding,
    Thoughts,
    check_head,
    choose_anchors,
    depth_of_end,
    output_head,
    packed_pass,
    rollout,
    run_decoder_plain,
    text_pass,
    text_with_layout,
)
from .tokens import add_meta_tokens, meta_token_ids


class QuietStarForCausalLM(PreTrainedModel, ThinkingGenerationMixin):
    """Wraps any supported Hugging Face decoder with thoughts (see :class:`QuietStarConfig`).

    The decoder is ``self.base``, unmodified; the model adds ``thought_embedding`` and ``mixing_head``.
    """

    config_class = QuietStarConfig
    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: QuietStarConfig, base: PreTrainedModel | None = None):
        super().__init__(config)
        if base is None:
            base = AutoModelForCausalLM.from_config(config.text_config)
        check_supported(base)
        check_meta_tokens(config, base.get_input_embeddings().num_embeddings)
        # The layers look their attention up in this very object at every call.
        base.config._attn_implementation = implementation_name(type(base))
        config.text_config = base.config
        self.base = base
        width = base.get_input_embeddings().embedding_dim
        self.thought_embedding = ThoughtEmbedding(width)
        self.mixing_head = MixingHead(width)
        self._head_checked = False
        self.post_init()
        # How the generation under way thinks; None outside of generate().
        self._thinking: Thinking | None = None
        self.thoughts: list[SpokenThought] = []

    # ---- building -------------------------------------------------------------------------------

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        init_embedding_from: str = "---",
        **fields: Any,
    ) -> QuietStarForCausalLM:
        """Give a decoder thoughts.

        Args:
            base: a causal language model, or its name or path.
            tokenizer: gets the two meta tokens if it lacks them, and the embeddings are resized to
                match. May be left out if ``start_token_id`` and ``end_token_id`` are given.
            init_embedding_from: the start and end embeddings begin as the mean embedding of this
                text's tokens (as in the paper); needs a tokenizer.
            fields: of :class:`QuietStarConfig`.

        Raises:
            ValueError: for a model family that cannot think, or meta tokens that are nowhere to be had.
        """
        if isinstance(base, str):
            base = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True)
        check_supported(base)
        if tokenizer is not None:
            add_meta_tokens(tokenizer)
            fields = {**meta_token_ids(tokenizer), **fields}
            # Vocabularies are often padded beyond the tokenizer; never shrink them.
            if len(tokenizer) > base.get_input_embeddings().num_embeddings:
                base.resize_token_embeddings(len(tokenizer))
        for name in ("start_token_id", "end_token_id"):
            if fields.get(name) is None:
                raise ValueError(f"{name} is missing; give it, or a tokenizer to add the meta tokens to")
        for module in base.modules():
            # Its weights are set: transformers must not initialise them again under the wrapper.
            module._is_hf_initialized = True
        model = cls(QuietStarConfig(text_config=base.config, **fields), base=base)
        embedding = base.get_input_embeddings().weight
        model.thought_embedding.to(device=embedding.device, dtype=embedding.dtype)
        model.mixing_head.to(device=embedding.device, dtype=embedding.dtype)
        if tokenizer is not None:
            ids = tokenizer(init_embedding_from, add_special_tokens=False)["input_ids"]
            if not ids:
                raise ValueError(
                    f"init_embedding_from is {init_embedding_from!r}; expected text with a token"
                )
            with torch.no_grad():
                mean = embedding[ids].mean(0) / model.config.embedding_scale
                model.thought_embedding.start.copy_(mean)
                model.thought_embedding.end.copy_(mean)
        return model

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, **options: Any) -> QuietStarForCausalLM:
        """As transformers', from safetensors alone: nothing that was downloaded is unpickled."""
        return super().from_pretrained(name, *args, **{"use_safetensors": True, **options})

    @classmethod
    def from_reference(cls, name: str | Path, **options: Any) -> QuietStarForCausalLM:
        """Read a checkpoint of the reference code; see :func:`quietstar.reference.from_reference`."""
        from .reference import from_reference

        return from_reference(name, **options)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MixingHead):
            module.reset_parameters()
        elif isinstance(module, ThoughtEmbedding):
            std = getattr(self.config.text_config, "initializer_range", 0.02)
            for parameter in (module.start, module.end):
                nn.init.normal_(parameter, std=std / self.config.embedding_scale)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.base.base_model

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Refused: the decoder's attention function is what lets it think."""
        raise ValueError(
            f"attn_implementation is {attn_implementation!r}; a Quiet-STaR model keeps its own attention"
            " function, which uses torch's fused attention for the text where that is exact"
        )

    # ---- thinking -------------------------------------------------------------------------------

    @output_layer_gathered
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        thought_ids: Tensor | None = None,
        anchors: Tensor | None = None,
        baseline_losses: Tensor | None = None,
        logits_to_keep: int = 0,
        thought_temperature: float | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        batch_part: BatchPart = WHOLE,
        **ignored: Any,
    ) -> QuietStarOutput:
        """Think at the anchors, then predict.

        Args:
            input_ids: [B, N] int64.
            attention_mask: [B, N], nonzero for text; padding at either end. Position ids follow from it.
            labels: [B, N] int64, -100 where a token does not count. With labels the result holds the
                losses; without, ``logits`` of the mixed prediction.
            thought_ids: [B, R, N, T] or [B, R, A, T] int64, thoughts to use instead of sampling
                (R = 1 without labels).
            anchors: [B, A] int64 ascending positions that think; default: ``config.think_at``.
            baseline_losses: [B, N-1] fp32, the losses that the reward ``information-gain`` measures
                against; :class:`~quietstar.QuietStarTrainer` takes them from its averaged copy. Required
                in training mode, where the reward counts; otherwise the model's own stand in.
            logits_to_keep: without labels, think and predict at the last so many positions only
                (0: all).
            past_key_values, use_cache: without labels, keep the text's keys between calls; then
                ``input_ids`` holds the new tokens only, and the last of them alone is predicted from.
            thought_temperature: default: the configuration's while training, 0 (the most likely
                thought, one rationale) in evaluation mode.
            document_ids: [B, N], several documents in a row: between neighbours with different numbers
                goes no attention, no talk and no prediction, and position ids start anew.
            batch_part: with labels, which part of a larger batch this is
                (:class:`~quietstar.parts.BatchPart`).

        Raises:
            ValueError: names the argument that cannot be used, before anything is computed.
        """
        config = self.config
        config.check_thoughts()
        check_ignored(ignored)
        check_text(config, input_ids, labels)
        check_baseline(config, baseline_losses, input_ids, labels is not None and self.training)
        if past_key_values is not None or self._thinking is not None:
            if labels is not None:
                raise ValueError("labels were given with past_key_values; expected one of them")
            if document_ids is not None:
                raise ValueError("document_ids were given with past_key_values; expected one of them")
            return self._next(input_ids, attention_mask, past_key_values, use_cache, thought_temperature)
        ranges = text_ranges(attention_mask, input_ids, document_ids)
        if labels is not None:
            labels = check_labels(labels, ranges)
        if not self._head_checked:
            check_head(self.base, self.get_input_embeddings()(input_ids[:1, :4]).detach())
            self._head_checked = True
        if not config.thinks:
            return self._plain(input_ids, attention_mask, ranges, labels, logits_to_keep, batch_part)
        temperature = thought_temperature
        if temperature is None:
            temperature = config.thought_temperature if self.training else 0.0
        if labels is None:
            if not 0 <= logits_to_keep <= input_ids.shape[1]:
                raise ValueError(
                    f"logits_to_keep is {logits_to_keep}; expected 0 to {input_ids.shape[1]}"
                )
            if thought_ids is not None and logits_to_keep:
                raise ValueError("logits_to_keep was given with thought_ids; expected one of them")
            return self._predict(input_ids, ranges, logits_to_keep, temperature, thought_ids, anchors)
        return self._learn(
            input_ids, ranges, labels, thought_ids, anchors, temperature, baseline_losses, batch_part
        )

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
        return QuietStarOutput(
            loss=loss, nll_loss=loss.detach(), base_losses=losses, base_loss=loss.detach()
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
        can_think = (ranges.start < ranges.stop).gather(1, anchors)
        total, policy = learn(config, head, talked.nll, slot_hidden, ids, earned, can_think, part)
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
            is_text = ranges.start < ranges.stop
            anchors = choose_anchors(config, input_ids, is_text, hidden, output_head(self.base), part)
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


AutoConfig.register("quietstar", QuietStarConfig, exist_ok=True)
AutoModelForCausalLM.register(QuietStarConfig, QuietStarForCausalLM, exist_ok=True)
