"""Predictions token by token, with the controls that tell whether it is the thought that helps.

``thoughts="own"``: what the model thinks at each position (the most likely thought). ``"none"``: the
same weights without thinking. ``"shuffled"``: at each position the thought of another position that
holds the same token; if thoughts only help by being there, this changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy.typing as npt

    from quietstar.modeling.model import QuietStarForCausalLM

Thoughts = Literal["own", "none", "shuffled"]


@dataclass(frozen=True)
class TokenScores:
    """One entry per predicted token; entry i predicts token i + 1.

    Attributes:
        nll: [rows, N-1] float64, nats; correct: [rows, N-1] bool, whether the true token was the most
            likely one.
        mixing_weight: [rows, N-1] float64; zeros without thoughts.
        thought_ids: [rows, N-1, T] int64, or None.
    """

    nll: npt.NDArray[np.float64]
    correct: npt.NDArray[np.bool_]
    mixing_weight: npt.NDArray[np.float64]
    thought_ids: npt.NDArray[np.int64] | None


@torch.no_grad()
def token_scores(
    model: QuietStarForCausalLM,
    rows: Tensor,
    *,
    thoughts: Thoughts = "own",
    batch_size: int = 16,
    seed: int = 0,
) -> TokenScores:
    """Score every token of ``rows`` [count, N] int64 (no padding).

    Logits of a whole batch are held at once, so choose ``batch_size`` by the vocabulary. The model's
    mode, its configuration and torch's generator are left as they were.
    """
    kind, training = model.config.thought_kind, model.training
    state = torch.get_rng_state()
    model.eval()
    if thoughts == "none":
        model.config.thought_kind = "none"
    generator = torch.Generator().manual_seed(seed)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    ids: list[Tensor] = []
    try:
        for batch in rows.split(batch_size):
            torch.manual_seed(seed)
            *part, chosen = _score(model, batch.to(model.device), thoughts, generator)
            parts.append((part[0], part[1], part[2]))
            if chosen is not None:
                ids.append(chosen)
    finally:
        model.config.thought_kind = kind
        model.train(training)
        torch.set_rng_state(state)
    nll, correct, weight = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return TokenScores(nll, correct, weight, torch.cat(ids).cpu().numpy() if ids else None)


def _score(
    model: QuietStarForCausalLM, ids: Tensor, thoughts: Thoughts, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    output = model(ids)
    if thoughts == "shuffled" and output.thought_ids is not None:
        partner = same_token_partners(ids.cpu(), generator).to(ids.device)
        chosen = output.thought_ids[:, 0].flatten(0, 1)[partner].view_as(output.thought_ids[:, 0])
        output = model(ids, thought_ids=chosen[:, None])
    logp = output.logits[:, :-1].double().log_softmax(-1)
    nll = -logp.gather(2, ids[:, 1:, None])[..., 0]
    weight = torch.zeros_like(nll)
    if output.mixing_weight is not None:
        weight = output.mixing_weight[0, :, 0, :-1].double()
    chosen_ids = None if output.thought_ids is None else output.thought_ids[:, 0, :-1]
    return nll, logp.argmax(-1) == ids[:, 1:], weight, chosen_ids


def same_token_partners(ids: Tensor, generator: torch.Generator) -> Tensor:
    """For every position of ``ids`` (flattened), another position with the same token.

    A token that occurs once keeps its own position; otherwise no position keeps its own.
    """
    flat = ids.flatten()
    partner = torch.arange(len(flat))
    # Random order within each token's group, then everybody takes the next one's.
    order = torch.randperm(len(flat), generator=generator)
    order = order[flat[order].argsort(stable=True)]
    groups: Sequence[int] = torch.unique_consecutive(flat[order], return_counts=True)[1].tolist()
    start = 0
    for size in groups:
        members = order[start : start + size]
        partner[members] = members.roll(1)
        start += size
    return partner
