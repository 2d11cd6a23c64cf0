"""Rows of a packed pass and the operator's grid of slots and columns, one from the other.

Before anything is drawn the rationales of a position are the same, so a pass runs their start slot once:
behind the text its rows are ``[start: A | slot 2: M | ... | slot S: M]`` with M = A·R. The operator
takes a full grid [S, M]. Forward and backward every number is copied once at most, and what is kept for
the backward pass holds no other rows in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def split_rows(rows: Tensor, text: int, columns: int, rationales: int) -> tuple[Tensor, Tensor]:
    """[B, H, N + A + (S-1)·M, D] -> text [B, H, N, D] and grid [B, H, S, M, D], the start slot
    repeated; both are views where R = 1."""
    if rationales == 1:
        first, rest = rows.split([text, rows.shape[2] - text], dim=2)
        return first, rest.unflatten(2, (-1, columns))
    return _Split.apply(rows, text, columns, rationales)


def join_rows(text: Tensor, grid: Tensor, rationales: int) -> Tensor:
    """Text [B, N, H, E] and grid [B, H, S, M, E] -> [B, N + A + (S-1)·M, H, E]: of the start slot each
    position's first column."""
    if rationales == 1:
        return torch.cat([text, grid.flatten(2, 3).transpose(1, 2)], dim=1)
    rows: Tensor = _Join.apply(text, grid, rationales)
    return rows


def start_repeated(slots: Tensor, columns: int, rationales: int) -> Tensor:
    """[B, A + (S-1)·M, d] -> [B, S, M, d]; a view where R = 1."""
    return split_rows(slots[:, None], 0, columns, rationales)[1][:, 0]


def _grid_of(rows: Tensor, columns: int, rationales: int) -> tuple[Tensor, Tensor]:
    """An empty grid for slot rows [B, H, A + (S-1)·M, D] whose later slots are filled, and a view of
    its start slot, [B, H, A, R, D]."""
    anchors = columns // rationales
    slots = (rows.shape[2] - anchors) // columns + 1
    grid = rows.new_empty(*rows.shape[:2], slots, columns, rows.shape[3])
    grid[:, :, 1:] = rows[:, :, anchors:].unflatten(2, (slots - 1, columns))
    return grid, grid[:, :, 0].unflatten(2, (anchors, rationales))


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, text: int, columns: int, rationales: int
    ) -> tuple[Tensor, Tensor]:
        ctx.rationales = rationales
        slots = rows[:, :, text:]
        grid, start = _grid_of(slots, columns, rationales)
        start.copy_(slots[:, :, : columns // rationales, None])
        return rows[:, :, :text].clone(), grid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtext: Tensor, dgrid: Tensor) -> tuple[Tensor | None, ...]:
        start = dgrid[:, :, 0].unflatten(2, (-1, ctx.rationales)).sum(3)
        return torch.cat([dtext, start, dgrid[:, :, 1:].flatten(2, 3)], dim=2), None, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, text: Tensor, grid: Tensor, rationales: int) -> Tensor:
        ctx.text, ctx.columns, ctx.rationales = text.shape[1], grid.shape[3], rationales
        start, rest = grid[:, :, 0, ::rationales], grid[:, :, 1:].flatten(2, 3)
        return torch.cat([text, start.transpose(1, 2), rest.transpose(1, 2)], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        slots = dout[:, ctx.text :].transpose(1, 2)
        dgrid, start = _grid_of(slots, ctx.columns, ctx.rationales)
        # The other columns' start slots were not handed on.
        start[:, :, :, 0] = slots[:, :, : ctx.columns // ctx.rationales]
        start[:, :, :, 1:] = 0
        return dout[:, : ctx.text], dgrid, None
