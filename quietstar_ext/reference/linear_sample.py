"""Reference of linear_sample: all logits at once, in float64."""

from __future__ import annotations

import torch

from quietstar_ext.reference.sample_tokens import sample_tokens


def linear_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    banned: torch.Tensor | None,
    seed: torch.Tensor,
    offset: int,
    softcap: float | None,
    logit_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [rows] int64 and log-probabilities [rows] float32 for hidden [rows, d], weight [V, d]."""
    logits = hidden.double() @ weight.double().T * logit_scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return sample_tokens(logits, temperature, top_k, top_p, min_p, banned, seed, offset)
