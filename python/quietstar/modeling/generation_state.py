"""When a generating model thinks, and what it thought: the state of one call of ``generate``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quietstar.think_rules import parse_rule

RULES = ("always", "never", "every", "entropy")


@dataclass(frozen=True)
class SpokenThought:
    """A thought behind a generated token.

    Attributes:
        row: of the batch (with ``num_return_sequences`` or beams, of the batch that these make); step:
            which new token it was for, from 0.
        ids: [T] tokens; mixing_weight: how much the prediction listened to it.
    """

    row: int
    step: int
    ids: tuple[int, ...]
    mixing_weight: float


class Thinking:
    """When a generating model thinks, and what it thought: the state of one call of ``generate``.

    Not a dataclass on purpose: FSDP rebuilds dataclass arguments when it casts inputs, and a rebuilt
    state would not be the caller's.

    Args:
        rule: ``"always"``, ``"never"``, ``"every:k"`` (at every k-th new token) or ``"entropy-nats:x"``
            (where the base prediction's entropy exceeds x nats; each row decides for itself), in the
            grammar of :mod:`quietstar.think_rules`.
        budget: at most so many thoughts per row; None: no limit.

    Attributes:
        step: new tokens so far; spent: [rows] thoughts so far; chosen: [rows] bool, which rows thought
            before the latest token.
        thoughts: in the order in which they came.
    """

    def __init__(self, rule: str = "always", budget: int | None = None) -> None:
        self.rule, self.budget = rule, budget
        self._name, self._number = parse_rule("thinking", rule)
        self.step = 0
        self.spent: Tensor | None = None
        self.chosen: Tensor | None = None
        self.thoughts: list[SpokenThought] = []
        # So many tokens of a prompt go through the decoder at a time; None: all.
        self.prefill_chunk_size: int | None = None
        # A call has taken it; another would mix its thoughts into that one's.
        self.taken = False
        # The text's cache was seen to hold what the decoder's layers hand to their attention.
        self.cache_is_plain = False
        # How often every row has thought, where all rows think at the same tokens.
        self._times = 0
        whole = isinstance(self.budget, int) and not isinstance(self.budget, bool)
        if self.budget is not None and not (whole and self.budget >= 0):
            raise ValueError(f"thinking_budget is {self.budget!r}; expected a whole number >= 0")

    def foreseen(self) -> bool | None:
        """Whether every row thinks before the next token (or none does); None where that depends on its
        base prediction."""
        return None if type(self).decide is not Thinking.decide else self._by_rule()

    def _by_rule(self) -> bool | None:
        if self._name == "entropy":
            return None
        now = self._name in ("always", "every") and self.step % int(self._number) == 0
        return now and (self.budget is None or self._times < self.budget)

    def decide(self, logits: Tensor) -> Tensor:
        """Which rows think now, [rows] bool, from the base prediction's logits [rows, V]."""
        rows = logits.shape[0]
        if self.spent is None:
            self.spent = torch.zeros(rows, dtype=torch.int64, device=logits.device)
        now = self._by_rule()
        if now is None:
            # entr(0) is 0, which the banned meta tokens need.
            chosen = torch.special.entr(logits.float().softmax(-1)).sum(-1) > self._number
            if self.budget is not None:
                chosen &= self.spent < self.budget
        else:
            chosen = torch.full((rows,), now, device=logits.device)
            self._times += now
        self.spent += chosen
        self.step += 1
        self.chosen = chosen
        return chosen


class FollowingThinking(Thinking):
    """Thinks where another one does: for guidance, whose extra passes keep no thoughts."""

    def __init__(self, leader: Thinking) -> None:
        super().__init__()
        self._leader = leader

    def decide(self, logits: Tensor) -> Tensor:
        """The rows that the leader chose for the same token."""
        chosen = self._leader.chosen
        if chosen is None or len(chosen) != logits.shape[0]:
            count = "no" if chosen is None else len(chosen)
            raise ValueError(
                f"negative_prompt_ids has {logits.shape[0]} rows; expected {count}, one for every row"
                " that is generated"
            )
        self.step += 1
        return chosen
