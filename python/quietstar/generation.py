"""The next token, thought about first: the text's cache is kept, the thought's keys are dropped.

Each new token costs one ordinary decoding step and, if its row thinks, one step per slot of the thought
(start, T sampled tokens, end) over the thinking rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin

from .attention import check_layers, layer_keys
from .config import QuietStarConfig
from .graphs import run_slots
from .layout import HandedKeys, LayerKeys, ThoughtLayout, text_ranges
from .output import QuietStarOutput
from .positions import check_length
from .text_part import text_body
from .think import banned_ids, depth_of_end, output_head, slot_steps

if TYPE_CHECKING:
    from .modeling import QuietStarForCausalLM

RULES = ("always", "never", "every", "entropy")


@dataclass(frozen=True)
class SpokenThought:
    """A thought behind a generated token.

    Attributes:
        row: of the batch; step: which new token it was for, from 0.
        ids: [T] tokens; mixing_weight: how much the prediction listened to it.
    """

    row: int
    step: int
    ids: tuple[int, ...]
    mixing_weight: float


@dataclass
class Thinking:
    """When a generating model thinks.

    Args:
        rule: ``"always"``, ``"never"``, ``"every:k"`` (at every k-th new token) or ``"entropy:x"``
            (where the base prediction's entropy exceeds x nats; each row decides for itself).
        budget: at most so many thoughts per row; None: no limit.
    """

    rule: str = "always"
    budget: int | None = None
    step: int = 0
    spent: Tensor | None = None
    thoughts: list[SpokenThought] = field(default_factory=list)

    def __post_init__(self) -> None:
        name, _, number = str(self.rule).partition(":")
        try:
            self._value = float(number) if number else 0.0
        except ValueError:
            self._value = -1.0
        plain = self.rule in ("always", "never")
        every = name == "every" and self._value >= 1 and self._value == int(self._value)
        entropy = name == "entropy" and bool(number) and self._value >= 0
        if not (plain or every or entropy):
            raise ValueError(
                f"thinking is {self.rule!r}; expected 'always', 'never', 'every:k' with a whole number"
                " k >= 1 or 'entropy:x' with x >= 0 nats"
            )
        if self.budget is not None and self.budget < 0:
            raise ValueError(f"thinking_budget is {self.budget}; expected a whole number >= 0")
        self._name = name

    def decide(self, logits: Tensor) -> Tensor:
        """Which rows think now, [rows] bool, from the base prediction's logits [rows, V]."""
        rows = logits.shape[0]
        if self.spent is None:
            self.spent = torch.zeros(rows, dtype=torch.int64, device=logits.device)
        if self._name == "entropy":
            # entr(0) is 0, which the banned meta tokens need.
            chosen = torch.special.entr(logits.float().softmax(-1)).sum(-1) > self._value
        else:
            now = self._name == "always" or (self._name == "every" and self.step % int(self._value) == 0)
            chosen = torch.full((rows,), now, device=logits.device)
        if self.budget is not None:
            chosen &= self.spent < self.budget
        self.spent += chosen
        self.step += 1
        return chosen


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
        thinking: decides which rows think; keeps count.
        temperature: of the thought's tokens; 0 takes the most likely.

    Raises:
        ValueError: for a cache of fixed size, or a mask that does not fit.
    """
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; expected a cache that grows (static caches"
            " are not supported with thoughts)"
        )
    past = cache.get_seq_length()
    total = past + input_ids.shape[1]
    if attention_mask is None:
        attention_mask = input_ids.new_ones(input_ids.shape[0], total)
    elif past == 0:
        text_ranges(attention_mask, input_ids)
    if attention_mask.shape[1] != total:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns; expected {total} (cached and new"
            " tokens)"
        )
    is_text = attention_mask != 0
    positions = (is_text.long().cumsum(1) - 1).clamp(min=0)[:, past:]
    check_length(model.base, total)
    handed = HandedKeys()
    hidden = text_body(model.base)(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        thought_layout=handed,
    ).last_hidden_state[:, -1]
    head = output_head(model.base)
    logits = head.logits(hidden)
    banned = banned_ids(model.config, logits.device)
    logits[:, banned] = -torch.inf
    step = thinking.step
    chosen = thinking.decide(logits)
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        check_layers(handed, model.base)
        first = is_text.int().argmax(1)
        mixed, weight, ids = _think(
            model, handed, rows, first[rows], total, hidden[rows], temperature, seed=step
        )
        thought_logits = head.logits(mixed)
        thought_logits[:, banned] = -torch.inf
        logits[rows] = thought_logits
        if ids is not None:
            for row, chain, share in zip(rows.tolist(), ids.tolist(), weight.tolist(), strict=True):
                thinking.thoughts.append(SpokenThought(row, step, tuple(chain), share))
    return logits


def _think(
    model: QuietStarForCausalLM,
    handed: HandedKeys,
    rows: Tensor,
    first: Tensor,
    total: int,
    base_hidden: Tensor,
    temperature: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One thought per chosen row at the end of its text.

    Args:
        handed: the text's keys and values, as the layers handed them to their attention.
        rows: [r] rows of the batch; first: [r] their first text token; total: text length with padding.
        base_hidden: [r, d].

    Returns:
        mixed hidden states [r, d], mixing weights [r], tokens [r, T] or None for pause tokens.
    """
    config, count = model.config, len(rows)
    slots = depth_of_end(config)
    check_length(model.base, total, slots)
    # The text as one range per row: the layout needs no more of it than the last position.
    layout = ThoughtLayout(
        first[:, None].to(torch.int32),
        torch.full_like(first[:, None], total, dtype=torch.int32),
        torch.zeros(count, 1, dtype=torch.int64, device=rows.device),
        slots,
        phase="slot",
    )
    layout.keys = chosen_keys(handed, rows, total)
    if temperature:
        seed = int(torch.randint(2**62, ()))
    ids, _, kept = run_slots(
        slot_steps,
        model.base,
        config,
        model.thought_embedding(config.embedding_scale),
        rows[:, None],  # no talk slot is run, so no text is needed
        layout,
        temperature=temperature,
        seed=seed,
        last=slots,
    )
    mixed, weight = model.mixing_head(
        base_hidden, kept[-1][:, 0], config.mixing_activation, floor=config.mixing_floor
    )
    return mixed, weight[:, 0].float(), None if ids is None else ids[:, 0]


def chosen_keys(handed: HandedKeys, rows: Tensor, total: int) -> dict[int, LayerKeys]:
    """Every layer's keys and values of the chosen rows, without a copy where all rows are chosen.

    A sliding-window cache holds only the tail of the text.
    """
    found = {}
    for index, (keys, values) in handed.keys.items():
        if len(rows) < keys.shape[0]:
            keys, values = keys.index_select(0, rows), values.index_select(0, rows)
        found[index] = layer_keys(keys, values, offset=total - keys.shape[2])
    return found


class ThinkingGenerationMixin(GenerationMixin):
    """transformers' generation for a model that thinks before it speaks."""

    config: QuietStarConfig
    _thinking: Thinking | None
    thoughts: list[SpokenThought]

    def generate(
        self,
        *args: Any,
        thinking: str = "always",
        thinking_budget: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate``, thinking before the tokens that ``thinking`` says.

        The text's cache is kept and the thought's keys are dropped; meta tokens are never emitted.
        ``self.thoughts`` holds every thought of the call so far.

        Args:
            thinking: ``"always"``, ``"never"``, ``"every:k"`` or ``"entropy:x"``
                (:class:`quietstar.generation.Thinking`).
            thinking_budget: at most so many thoughts per row. Not with beams, which swap rows.

        Raises:
            ValueError: for a rule that is none, or a budget with beam search.
        """
        self.config.check_thoughts()
        policy = Thinking(thinking if self.config.thinks else "never", thinking_budget)
        config = kwargs.get("generation_config") or self.generation_config
        beams = kwargs.get("num_beams") or config.num_beams or 1
        if thinking_budget is not None and beams > 1:
            raise ValueError(f"thinking_budget was given with num_beams={beams}; expected one beam")
        self._thinking = policy
        self.thoughts = policy.thoughts  # grows as they come, for streamers to look at
        try:
            return super().generate(*args, **kwargs)
        finally:
            self._thinking = None

    def _next(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        temperature: float | None,
    ) -> QuietStarOutput:
        """Logits [B, 1, V] of the next token."""
        thinking = self._thinking or Thinking("always" if self.config.thinks else "never")
        kept = cache if cache is not None else DynamicCache(config=self.base.config)
        logits = next_token_logits(self, input_ids, attention_mask, kept, thinking, temperature or 0.0)
        return QuietStarOutput(logits=logits[:, None], past_key_values=kept if use_cache else None)
