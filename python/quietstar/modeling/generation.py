"""Generation that thinks before a token: the text's cache is kept, the thought's keys are dropped.

Each new token costs one ordinary decoding step and, if its row thinks, T + 1 more over the thinking rows
alone: one for the start token and each of the T sampled ones, the last of which the end token shares.
Where it is certain beforehand that all rows think, the new token and the start token share one as well;
on a CUDA device all of it is one graph then (:mod:`quietstar.thinking.cuda_graphs`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.utils import ModelOutput

from quietstar.config import QuietStarConfig
from quietstar.modeling.generation_checks import check_generation_config, check_loop, text_before_the_end
from quietstar.modeling.generation_state import FollowingThinking, SpokenThought, Thinking
from quietstar.modeling.input_checks import check_prompt, check_tensors
from quietstar.modeling.output import QuietStarOutput
from quietstar.modeling.text_cache import (
    CACHE_NAME,
    cache_argument,
    check_prompt_is_longer,
    holds_handed_keys,
    keep_keys,
    kept_keys,
    with_installed_name,
)
from quietstar.thinking.attention import check_layers
from quietstar.thinking.checkpointing import without_checkpointing
from quietstar.thinking.layout import HandedKeys
from quietstar.thinking.next_token import EndOfText, NewToken, NextToken
from quietstar.thinking.positions import check_length
from quietstar.thinking.slots import banned_ids
from quietstar.thinking.text_part import text_body

if TYPE_CHECKING:
    from quietstar.modeling.model import QuietStarForCausalLM

__all__ = ["SpokenThought", "Thinking", "ThinkingGenerationMixin", "next_token_logits"]


@torch.no_grad()
def next_token_logits(
    model: QuietStarForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache: Cache,
    thinking: Thinking,
    temperature: float,
) -> Tensor:
    """Logits of the token behind the text, [B, V]; meta tokens are impossible.

    Args:
        input_ids: [B, new], the tokens that the cache does not hold yet.
        attention_mask: [B, past + new], nonzero for text; padding at the left.
        cache: of the text; grows by ``new``, thoughts leave nothing in it.
        thinking: decides which rows think, once for this token; keeps count.
        temperature: of the thought's tokens; 0 takes the most likely.

    Raises:
        ValueError: for a mask that does not fit, or has padding anywhere but at the left.
    """
    past, new = cache.get_seq_length(), input_ids.shape[1]
    total = past + new
    if attention_mask is None:
        attention_mask = input_ids.new_ones(input_ids.shape[0], total)
    check_length(model.base, total)
    is_text, first = text_before_the_end(attention_mask, past, new, look=thinking.step == 0)
    together = new == 1 and thinking.cache_is_plain and thinking.foreseen() and model.config.thinks
    if together and (keys := kept_keys(cache)):
        token = NewToken(input_ids, first, keys, past)
        return _read_and_think(model, token, cache, thinking, temperature)
    hidden, handed = read_text(model, input_ids, is_text, cache, thinking.prefill_chunk_size)
    thinking.cache_is_plain = holds_handed_keys(cache, handed.keys)
    td = model.thought_decoder
    output = td.output
    logits = output.logits(hidden)
    banned = banned_ids(model.config, logits.device)
    logits[:, banned] = -torch.inf
    step = thinking.step
    rows = (thinking.decide(logits) & model.config.thinks).nonzero()[:, 0]
    if len(rows):
        check_layers(handed, model.base)
        end = EndOfText(handed, rows, first[rows], total, hidden[rows])
        made = td.next_token(end, temperature, seed=step)
        thought_logits = output.logits(made.mixed)
        thought_logits[:, banned] = -torch.inf
        logits[rows] = thought_logits
        _note(thinking, step, rows.tolist(), made)
    return logits


def _read_and_think(
    model: QuietStarForCausalLM, token: NewToken, cache: Cache, thinking: Thinking, temperature: float
) -> Tensor:
    """:func:`next_token_logits` where all rows think, whatever their base prediction is."""
    td, step = model.thought_decoder, thinking.step
    made = td.text_and_next_token(token, temperature, seed=step)
    keep_keys(cache, made.text_keys)
    logits = td.output.logits(made.mixed)
    logits[:, banned_ids(model.config, logits.device)] = -torch.inf
    thinking.decide(logits)  # which has been foreseen: of the logits it takes no more than their number
    _note(thinking, step, range(len(logits)), made)
    return logits


def _note(thinking: Thinking, step: int, rows: Iterable[int], made: NextToken) -> None:
    if made.ids is not None:
        for row, ids, weight in zip(rows, made.ids.tolist(), made.weight.tolist(), strict=True):
            thinking.thoughts.append(SpokenThought(row, step, tuple(ids), weight))


def read_text(
    model: QuietStarForCausalLM,
    input_ids: Tensor,
    is_text: Tensor,
    cache: Cache,
    chunk_size: int | None = None,
) -> tuple[Tensor, HandedKeys]:
    """Run the decoder over new text, which the cache keeps; final hidden states [B, d] of its end, and
    the keys and values of all text, as its layers were handed them.

    Args:
        input_ids: [B, new]; is_text: [B, past + new] bool.
        chunk_size: so many tokens at a time; None: all at once.
    """
    new = input_ids.shape[1]
    past = is_text.shape[1] - new
    positions = (is_text.long().cumsum(1) - 1).clamp(min=0)
    place = torch.arange(is_text.shape[1], device=is_text.device)
    row_start = torch.where(is_text, is_text.int().argmax(1, keepdim=True), place + 1)
    decoder, size = text_body(model.base), chunk_size or new
    for start in range(0, new, size):
        stop = min(start + size, new)
        begin = past + start
        handed = HandedKeys(row_start[:, begin : past + stop] - begin)
        hidden = decoder(
            input_ids=input_ids[:, start:stop],
            attention_mask=is_text[:, : past + stop].long(),
            position_ids=positions[:, past + start : past + stop],
            use_cache=True,
            thought_layout=handed,
            **cache_argument(decoder, cache),
        ).last_hidden_state[:, -1]
    return hidden, handed


class ThinkingGenerationMixin(GenerationMixin):
    """transformers' generation for a model that thinks before it speaks."""

    config: QuietStarConfig
    thoughts: list[SpokenThought]

    def generate(
        self,
        *args: Any,
        thinking: str | Thinking = "always",
        thinking_budget: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate``, thinking before the tokens that ``thinking`` says.

        The text's cache is kept and the thought's keys are dropped; meta tokens are never emitted.
        Greedy decoding, sampling and beam search, from prompts that are padded at the left.

        The state of a call is its own, so that several threads may generate from one model.
        ``self.thoughts`` holds every thought so far of the call that started last; with threads, hand
        over a :class:`Thinking` and look at its ``thoughts``, or at those of the result of
        ``return_dict_in_generate=True``.

        Args:
            thinking: ``"always"``, ``"never"``, ``"every:k"``, ``"entropy-nats:x"``, or a
                :class:`Thinking` of this call's own.
            thinking_budget: at most so many thoughts per row. Not with beams, which swap rows.

        Raises:
            ValueError: for an unknown rule, a budget with beam search, or a way of decoding that
                needs predictions at several positions (see :mod:`quietstar.modeling.generation_checks`).
        """
        self.config.check_thoughts()
        if not isinstance(thinking, Thinking):
            thinking = Thinking(thinking, thinking_budget)
        elif thinking_budget is not None:
            raise ValueError("`thinking_budget` and a Thinking cannot be combined, as it has its own")
        if thinking.taken:
            raise ValueError("thinking was used by another call; expected a new Thinking for each")
        bound = inspect.signature(GenerationMixin.generate).bind_partial(self, *args, **kwargs).arguments
        check_loop({**bound, **bound.get("kwargs", {})})
        kwargs = with_installed_name(kwargs)
        prompt = bound.get("inputs", kwargs.get("input_ids"))
        if prompt is not None:
            check_prompt("inputs" if "inputs" in bound else "input_ids", prompt)
        check_tensors(attention_mask=kwargs.get("attention_mask"))
        check_prompt_is_longer(kwargs.get(CACHE_NAME), prompt)
        thinking.taken = True
        self.thoughts = thinking.thoughts  # grows as they come, for streamers to look at
        try:
            made = super().generate(*args, thinking=thinking, **kwargs)
        except BaseException:
            thinking.taken = thinking.step > 0  # what was rejected has used nothing
            raise
        if isinstance(made, ModelOutput):
            made.thoughts = thinking.thoughts
        return made

    def generate_batch(self, *_: Any, **__: Any) -> NoReturn:
        """Not supported: continuous batching keeps the text in pages that thoughts cannot read."""
        raise NotImplementedError(
            "generate_batch (continuous batching) is not supported with thoughts; expected generate,"
            " which takes a batch of prompts that are padded at the left"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def _prepare_generation_config(
        self, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """The call's settings in one place: checked, and the prompt's chunks taken over.

        transformers would call the model once for every chunk, and each call predicts a token.
        """
        config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        check_generation_config(config)
        thinking = model_kwargs.get("thinking")
        if thinking is not None:
            beams = config.num_beams or 1
            if thinking.budget is not None and beams > 1:
                raise ValueError(f"`thinking_budget` and num_beams={beams} cannot be combined")
            thinking.prefill_chunk_size = config.prefill_chunk_size
            config.prefill_chunk_size = None
        return config, model_kwargs

    def prepare_inputs_for_generation(
        self, *args: Any, tokenizer: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers', less the tokenizer of ``stop_strings``, which no forward has a use for."""
        return dict(super().prepare_inputs_for_generation(*args, **kwargs))

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Guidance calls the model beside the generation: those passes think where the latter does."""
        processors = super()._get_logits_processor(*args, **kwargs)
        model_kwargs = kwargs.get("model_kwargs") or {}
        thinking = model_kwargs.get("thinking")
        made = LogitsProcessorList()
        for processor in processors:
            guides = isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
            if not guides or processor.model is not self or thinking is None:
                made.append(processor)
                continue
            processor = copy.copy(processor)
            processor.model = partial(
                self,
                thinking=FollowingThinking(thinking),
                thought_temperature=model_kwargs.get("thought_temperature"),
            )
            # The difference of two impossible tokens' scores is not a number.
            meta = [self.config.start_token_id, self.config.end_token_id]
            made.extend([processor, SuppressTokensLogitsProcessor(meta, device=self.device)])
        return made

    def _next(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        thinking: Thinking | None,
        temperature: float | None,
    ) -> QuietStarOutput:
        """Logits [B, 1, V] of the next token."""
        kept = cache if cache is not None else self._new_cache()
        with without_checkpointing(self.base):
            logits = next_token_logits(
                self, input_ids, attention_mask, kept, thinking or Thinking(), temperature or 0.0
            )
        return QuietStarOutput(logits=logits[:, None], **({CACHE_NAME: kept} if use_cache else {}))

    @torch.no_grad()
    def _text_cache(self, input_ids: Tensor, attention_mask: Tensor | None) -> Cache:
        """The keys of a text, for calls that go on from it."""
        cache = self._new_cache()
        is_text = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with without_checkpointing(self.base):
            read_text(self, input_ids, is_text != 0, cache)
        return cache

    def _new_cache(self) -> Cache:
        return DynamicCache(config=self.base.config)
