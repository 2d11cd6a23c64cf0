"""The model: a Hugging Face decoder that thinks before it speaks."""

from __future__ import annotations

from dataclasses import replace
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

from quietstar.config import QuietStarConfig, check_fields, check_mixing_weight
from quietstar.modeling.forward import (
    given_thoughts,
    plain_forward,
    prediction_forward,
    thinking_forward,
    training_forward,
)
from quietstar.modeling.generation import ThinkingGenerationMixin
from quietstar.modeling.generation_checks import check_kept, check_outputs, inherited_settings
from quietstar.modeling.generation_state import SpokenThought, Thinking
from quietstar.modeling.input_checks import (
    check_baseline,
    check_ignored,
    check_meta_tokens,
    check_tensors,
    check_text,
    check_tokens,
)
from quietstar.modeling.loading import (
    check_folder,
    keep_4bit_differentiable,
    keep_read_weights,
    keep_weights,
    load_whole,
)
from quietstar.modeling.meta_tokens import add_meta_tokens, init_tokens, meta_token_ids
from quietstar.modeling.output import QuietStarOutput
from quietstar.modeling.pretrained import load_decoder
from quietstar.modeling.speed_options import SpeedOptionsMixin
from quietstar.modeling.text_cache import CACHE_NAME, check_alone, check_grows, one_cache
from quietstar.thinking.attention import take_layouts
from quietstar.thinking.batch_share import WHOLE_BATCH, BatchShard
from quietstar.thinking.decoder import ThoughtDecoder
from quietstar.thinking.documents import DESCRIPTIONS, batch_ranges, check_new_positions
from quietstar.thinking.fsdp2 import output_layer_gathered
from quietstar.thinking.layers import MixingHead, ThoughtEmbedding
from quietstar.thinking.linear_layers import input_device
from quietstar.thinking.noise import settle_noise
from quietstar.thinking.self_check import check_decoder
from quietstar.thinking.supported import check_reopens, check_supported
from quietstar.thinking.text_batch import TextBatch, check_labels, num_rationales, target_labels
from quietstar.thinking.text_part import freeze_other_parts, text_body, text_config_of


class QuietStarForCausalLM(SpeedOptionsMixin, PreTrainedModel, ThinkingGenerationMixin):
    """Wraps any supported Hugging Face decoder with thoughts (see :class:`QuietStarConfig`).

    The decoder is ``self.base``, unmodified; the model adds ``thought_embedding`` and ``mixing_head``.
    """

    config_class = QuietStarConfig
    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_attention_backend = True
    # What transformers' quantisers leave as it is, too: a small network that weighs every prediction.
    _keep_in_fp32_modules = ["mixing_head"]

    def __init__(self, config: QuietStarConfig, base: PreTrainedModel | None = None):
        if not isinstance(config, QuietStarConfig):
            raise TypeError(f"config is a {type(config).__name__}; expected a QuietStarConfig")
        if base is None and config.text_config is None:
            raise ValueError(
                "the configuration has no text_config; expected that of a decoder, or a decoder itself"
                " (QuietStarForCausalLM.from_base)"
            )
        super().__init__(config)
        if base is None:
            base = AutoModelForCausalLM.from_config(config.text_config)
        check_supported(base)
        check_meta_tokens(config, base.get_input_embeddings().num_embeddings)
        take_layouts(base)
        config.text_config = base.config
        freeze_other_parts(base)
        self.base = base
        tied = getattr(base, "_tied_weights_keys", None)
        if isinstance(tied, dict):
            # Under the names that they have here, where peft looks for them.
            self._tied_weights_keys = {f"base.{name}": f"base.{source}" for name, source in tied.items()}
        width = base.get_input_embeddings().embedding_dim
        self.thought_embedding = ThoughtEmbedding(width)
        self.mixing_head = MixingHead(width)
        self._checked: set[str] = set()
        self._noise_probed = 0
        self._routers_reported = 0
        self.post_init()
        # A class of models for several modalities names those of all parts, which may not be there: FSDP
        # would look for them.
        self._no_split_modules &= {type(module).__name__ for module in base.modules()}
        if base.generation_config is not None:
            self.generation_config = inherited_settings(base.generation_config)
        self.thoughts: list[SpokenThought] = []

    # ---- building -------------------------------------------------------------------------------

    @classmethod
    @torch.no_grad()
    def from_base(
        cls,
        base: PreTrainedModel | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        init_embedding_from: str = "---",
        init_start_from: str | None = None,
        init_end_from: str | None = None,
        init_mixing_weight: float | None = None,
        **fields: Any,
    ) -> QuietStarForCausalLM:
        """Give a decoder thoughts.

        Args:
            base: a causal language model, or its name or path (of a folder or a GGUF file).
            tokenizer: gets the two meta tokens if it lacks them, and the embeddings are resized to
                match. May be left out if ``start_token_id`` and ``end_token_id`` are given.
            init_embedding_from: the start and end embeddings begin as the mean embedding of this
                text's tokens (as in the paper); needs a tokenizer.
            init_start_from, init_end_from: the same for one of them; None: ``init_embedding_from``.
            init_mixing_weight: the first mixing weight of every thought (:meth:`MixingHead.start_at`).
            fields: of :class:`QuietStarConfig`.

        Raises:
            ValueError: for a model family that cannot think or could not be opened again after saving,
                meta tokens that are not given, or a folder that lacks weights.
            TypeError: if base is no model of transformers.
        """
        check_fields(fields)
        check_mixing_weight(init_mixing_weight, fields.get("mixing_activation", "identity"))
        if isinstance(base, str | Path):
            base = load_decoder(base)
        _check_base(base)
        keep_4bit_differentiable(base)
        check_supported(base)
        check_reopens(base)
        if tokenizer is not None:
            add_meta_tokens(tokenizer)
            fields = {**meta_token_ids(tokenizer), **fields}
        first = init_tokens(tokenizer, init_embedding_from, init_start_from, init_end_from)
        # Vocabularies are often padded beyond the tokenizer; never shrink them.
        if tokenizer is not None and len(tokenizer) > base.get_input_embeddings().num_embeddings:
            base.resize_token_embeddings(len(tokenizer))
        for name in ("start_token_id", "end_token_id"):
            if fields.get(name) is None:
                raise ValueError(f"{name} is missing; give it, or a tokenizer to add the meta tokens to")
        keep_weights(base)
        # The layer is asked, not its weight, which a wrapper or a quantiser may have put elsewhere.
        embed, device = base.get_input_embeddings(), input_device(base)
        like = embed(torch.zeros(1, 1, dtype=torch.int64, device=device))
        with torch.device(like.device):  # whatever device a block around this call names
            model = cls(QuietStarConfig(text_config=base.config, **fields), base=base)
        model.thought_embedding.to(like.dtype)
        model.mixing_head.to(like.dtype)
        model.mixing_head.start_at(init_mixing_weight, model.config.mixing_activation)
        for part, ids in first.items():
            mean = embed(torch.tensor([ids], device=device))[0].mean(0)
            getattr(model.thought_embedding, part).copy_(mean / model.config.embedding_scale)
        return model

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, **options: Any) -> QuietStarForCausalLM:
        """As transformers', from safetensors alone: nothing that was downloaded is unpickled.

        Raises:
            ValueError: for a checkpoint of another kind of model, one that lacks weights or has them in
                other sizes, or an adapter's folder.
            OSError: if there is no checkpoint, or its weights file is damaged.
        """
        check_folder(name)
        wants_info = options.pop("output_loading_info", False)
        options.setdefault("use_safetensors", True)
        model, info = load_whole(super().from_pretrained, name, *args, **options)
        keep_4bit_differentiable(model)
        return (model, info) if wants_info else model  # type: ignore[return-value]

    @classmethod
    def from_reference(cls, name: str | Path, **options: Any) -> QuietStarForCausalLM:
        """Read a checkpoint of the reference code (:mod:`quietstar.checkpoints.upstream`)."""
        from quietstar.checkpoints.upstream import from_reference

        return from_reference(name, **options)

    def initialize_weights(self) -> None:
        """What no checkpoint holds."""
        # By the decoder's own rules: here transformers would pass over modules that have no weights, and
        # falcon_h1's body fills buffers of its layers.
        keep_read_weights(self.base)
        self.base.initialize_weights()
        super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MixingHead):
            module.reset_parameters()
        elif isinstance(module, ThoughtEmbedding):
            std = getattr(text_config_of(self.config), "initializer_range", 0.02)
            module.reset_parameters(std / self.config.embedding_scale)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return text_body(self.base)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Not supported: the decoder's attention function is what lets it think."""
        raise ValueError(
            f"attn_implementation is {attn_implementation!r}; a Quiet-STaR model keeps its own attention"
            " function (load it with attn_implementation 'sdpa' or 'eager' to choose its text's)"
        )

    # ---- thinking -------------------------------------------------------------------------------

    @property
    def thought_decoder(self) -> ThoughtDecoder:
        """What the method is told of the model, for one call."""
        return ThoughtDecoder(self.base, self.config, self.thought_embedding, self.mixing_head)

    @output_layer_gathered
    def forward(
        self,
        input_ids: Tensor | None = None,
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
        completion_anchors: Tensor | None = None,
        batch_part: BatchShard = WHOLE_BATCH,
        cache: Cache | None = None,
        thinking: Thinking | None = None,
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
            anchors: [B, A] int64 ascending positions that think (one repeated counts once); default:
                ``config.think_at``, for whose rule ``completion`` completion_anchors [B, C] are.
            baseline_losses: [B, N-1] fp32, the losses that the reward ``information-gain`` measures
                against; :class:`~quietstar.QuietStarTrainer` takes them from its averaged copy. Required
                in training mode, where the reward counts; otherwise the model's own stand in.
            logits_to_keep: without labels, think and predict at the last so many positions only
                (0: all).
            past_key_values, cache: two names of one argument, the text's keys from an earlier call
                (``use_cache=True``); then ``input_ids`` holds the new tokens only, and the last of them
                alone is predicted from. Padding at the left.
            use_cache: without labels, hand the text's keys back (the text is read once more for them).
            thought_temperature: default: the configuration's while training, 0 (the most likely
                thought, one rationale) in evaluation mode.
            document_ids: [B, N], several documents in a row: between neighbours with different numbers
                goes no attention, no talk and no prediction, and position ids start anew. Flattened
                batches may have ``position_ids``, ``seq_idx`` or ``cu_seq_lens_q`` to the same end
                (:func:`~quietstar.thinking.documents.batch_ranges`).
            batch_part: with labels, which part of a larger batch this is
                (:class:`~quietstar.thinking.batch_share.BatchShard`). Such a part may have no target at
                all.
            thinking: the state of a call of ``generate``, which decides here whether to think before
                the next token.

        Raises:
            ValueError: names the argument that cannot be used, before anything is computed.
        """
        config = self.config
        config.check_thoughts()
        check_ignored(ignored)
        if input_ids is None:
            raise ValueError("input_ids is missing; expected tokens [rows, tokens]")
        alone = batch_part is WHOLE_BATCH  # a part of a larger one may have nothing to learn from
        check_tensors(attention_mask=attention_mask, labels=labels, document_ids=document_ids)
        check_text(config, input_ids, labels, alone)
        check_tokens(input_ids, self.get_input_embeddings())
        learns = labels is not None and self.training
        check_baseline(config, baseline_losses, input_ids, learns and not batch_part.only_thinks)
        check_outputs(ignored)
        name, past = one_cache(past_key_values, cache)
        if use_cache:
            check_alone("use_cache", labels=labels, document_ids=document_ids)
        if self.training:
            settle_noise(self, input_ids)
        self._check_once(input_ids.device)
        if past is not None or thinking is not None:
            given = {"labels": labels, "document_ids": document_ids, "thought_ids": thought_ids}
            given |= {"anchors": anchors, "completion_anchors": completion_anchors}
            given |= {key: ignored.get(key) for key in DESCRIPTIONS if key != "position_ids"}
            check_alone(name, **given)
            check_grows(name, past)
            check_kept(
                logits_to_keep, 1, f" with {name}, since only the end of the text is predicted from"
            )
            if thinking is None or thinking.step == 0:  # to look at them waits for the device
                check_new_positions(ignored.get("position_ids"), attention_mask, input_ids, past)
            return self._next(input_ids, attention_mask, past, use_cache, thinking, thought_temperature)
        text = {"input_ids": input_ids, "attention_mask": attention_mask, "document_ids": document_ids}
        ranges = batch_ranges({**ignored, **text})
        if use_cache and ranges.end is not None:
            raise ValueError("`use_cache` and several documents in a row cannot be combined")
        if labels is not None:
            labels = (check_labels if alone else target_labels)(labels, ranges)
        else:
            check_kept(logits_to_keep, input_ids.shape[1])
        if thought_temperature is None:
            thought_temperature = config.thought_temperature if self.training else 0.0
        batch = TextBatch(
            config,
            input_ids,
            ranges,
            attention_mask,
            labels,
            baseline_losses,
            anchors,
            rationales=num_rationales(config, learns),
            temperature=thought_temperature,
            shard=batch_part,
            completion_anchors=completion_anchors,
        )
        output = self._think_and_predict(batch, thought_ids, logits_to_keep)
        if use_cache:
            output[CACHE_NAME] = self._text_cache(input_ids, attention_mask)
        return output

    def _think_and_predict(
        self, batch: TextBatch, thought_ids: Tensor | None, logits_to_keep: int
    ) -> QuietStarOutput:
        td = self.thought_decoder
        if not self.config.thinks:
            return plain_forward(td, batch, logits_to_keep)
        if batch.labels is None:
            if thought_ids is not None and logits_to_keep:
                raise ValueError("`logits_to_keep` and `thought_ids` cannot be combined")
            return prediction_forward(td, batch, thought_ids, logits_to_keep)
        thoughts = batch.shard.thoughts
        if thoughts is None and thought_ids is not None:
            batch, thoughts = given_thoughts(td, batch, thought_ids)
        elif thought_ids is not None:  # those are of the batch that this is a part of
            batch = replace(batch, rationales=thought_ids.shape[1])
        step = thinking_forward if batch.shard.only_thinks else training_forward
        return step(td, batch, thoughts)

    def _check_once(self, device: torch.device) -> None:
        """Run the checks that are due before the first pass, and before the first with thoughts."""
        wanted = {"logits", "thoughts"} if self.config.thinks and self.config.self_check else {"logits"}
        if missing := wanted - self._checked:
            check_decoder(self.base, device, logits="logits" in missing, thoughts="thoughts" in missing)
            self._checked |= missing


def _check_base(base: Any) -> None:
    """Reject what is not a plain decoder of transformers."""
    if isinstance(base, QuietStarForCausalLM):
        raise ValueError("base has thoughts already; expected a decoder without (its own is model.base)")
    if isinstance(base, PreTrainedModel):
        return
    kind = type(base).__name__
    if hasattr(base, "peft_config"):
        raise TypeError(
            f"base is a {kind}, a decoder inside an adapter; expected base.merge_and_unload(), or give"
            " adapters to the model with thoughts instead"
        )
    raise TypeError(f"base is a {kind}; expected a causal language model of transformers, or its name")


AutoConfig.register("quietstar", QuietStarConfig, exist_ok=True)
AutoModelForCausalLM.register(QuietStarConfig, QuietStarForCausalLM, exist_ok=True)
