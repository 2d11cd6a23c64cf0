"""Causal depthwise convolutions over a text and over the columns that hang from it.

A column needs the last k - 1 inputs up to its anchor, which is a gather. Inputs of other documents and
of padding are zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def over_text(
    x: Tensor, weight: Tensor, bias: Tensor | None, row_start: Tensor | None, past: Tensor | None = None
) -> Tensor:
    """[B, N, D] -> [B, N, D].

    Args:
        weight: [D, k]; bias: [D].
        row_start: [B, N], the first token that each one sees; None: all before it.
        past: [B, k-1, D], the inputs before the first token; None: zeros.
    """
    size = weight.shape[1]
    if row_start is None and past is None:
        channels = x.transpose(1, 2)
        out = F.conv1d(channels, weight[:, None], bias, padding=size - 1, groups=len(weight))
        return out[..., : x.shape[1]].transpose(1, 2)
    before = F.pad(x, (0, 0, size - 1, 0)) if past is None else torch.cat([past.to(x), x], dim=1)
    windows = before.unfold(1, size, 1)
    if row_start is not None:
        place = torch.arange(x.shape[1], device=x.device)[:, None] + torch.arange(
            1 - size, 1, device=x.device
        )
        windows = windows.masked_fill((place < row_start[..., None])[:, :, None], 0)
    out = (windows * weight).sum(-1)
    return out if bias is None else out + bias


def over_columns(history: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The last S of k - 1 + S inputs of every column: [B, k-1+S, M, D] -> [B, S, M, D]."""
    slots = history.shape[1] + 1 - weight.shape[1]
    out = history[:, :slots] * weight[:, 0]
    for step in range(1, weight.shape[1]):
        out = torch.addcmul(out, history[:, step : step + slots], weight[:, step])
    return out if bias is None else out + bias


def inputs_behind(x: Tensor, anchors: Tensor, text_start: Tensor, count: int) -> Tensor:
    """The last ``count`` inputs [B, count, M, D] of a text [B, N, D] up to each anchor [B, M]."""
    lag = torch.arange(count - 1, -1, -1, device=x.device)
    place = anchors[:, None] - lag[:, None]
    index = place.clamp(min=0).flatten(1)[..., None].expand(-1, -1, x.shape[2])
    found = x.gather(1, index).unflatten(1, place.shape[1:])
    return found.masked_fill((place < text_start[:, None])[..., None], 0)
