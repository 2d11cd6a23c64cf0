"""Predictions token by token, with the controls that tell whether it is the thought that helps.

``thoughts="own"``: what the model thinks at each position (the most likely thought). ``"none"``: the
same weights without thinking. ``"shuffled"``: at each position the thought of another position that
holds the same token; if thoughts only help by being there, this changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from quietstar.evaluation.perplexity import undisturbed

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


def token_scores(
    model: QuietStarForCausalLM,
    rows: Tensor | npt.NDArray[np.integer],
    *,
    thoughts: Thoughts = "own",
    batch_size: int = 16,
    seed: int = 0,
) -> TokenScores:
    """Score every token of ``rows`` [count, N] int64 (no padding).

    Logits of a whole batch are held at once, so choose ``batch_size`` by the vocabulary. The model's
    mode, its configuration and torch's generator are left as they were.
    """
    generator = torch.Generator().manual_seed(seed)
    fields: dict[str, Any] = {"thought_kind": "none"} if thoughts == "none" else {}
    parts = []
    for batch in torch.as_tensor(rows, dtype=torch.int64).split(batch_size):
        with undisturbed(model, seed, **fields):
            parts.append(_score(model, batch.to(model.device), thoughts, generator))
    # Without thoughts there are no thought_ids.
    columns: Any = (None if c[0] is None else np.concatenate(c) for c in zip(*parts, strict=True))
    return TokenScores(*columns)


def _score(
    model: QuietStarForCausalLM, ids: Tensor, thoughts: Thoughts, generator: torch.Generator
) -> tuple[Any, ...]:
    """The columns of :class:`TokenScores` for one batch."""
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
    seen = None if output.thought_ids is None else output.thought_ids[:, 0, :-1].cpu().numpy()
    correct = logp.argmax(-1) == ids[:, 1:]
    return (*(t.cpu().numpy() for t in (nll, correct, weight)), seen)


def same_token_partners(ids: Tensor, generator: torch.Generator) -> Tensor:
    """For every position of ``ids`` (flattened), another position with the same token.

    A token that occurs once keeps its own position; otherwise no position keeps its own.
    """
    flat = ids.flatten()
    # Random order within each token's group, then everybody takes the one before, the first the last.
    order = torch.randperm(len(flat), generator=generator)
    order = order[flat[order].argsort(stable=True)]
    sizes = torch.unique_consecutive(flat[order], return_counts=True)[1]
    ends = sizes.cumsum(0)
    before = torch.arange(len(flat)) - 1
    before[ends - sizes] = ends - 1
    partner = torch.empty_like(order)
    partner[order] = order[before]
    return partner
