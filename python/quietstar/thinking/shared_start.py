"""Rows of a packed pass and the operator's grid of slots and columns, one from the other.

Before anything is drawn the rationales of a position are the same, so a pass runs their start slot once:
behind the text its rows are ``[start: A | slot 2: M | ... | slot S: M]`` with M = A·R. The operator
takes a full grid [S, M]. Forward and backward every number is copied once at most, and what is kept for
the backward pass holds no other rows in memory.

In a grid as in the rows the rationales of a position are neighbours, unless it is ``rationale_major``:
then column m is rationale m // A of position m % A, and memory holds it as [B, S, R, A, H, D], which is
what torch's attention kernels read and write in place (``quietstar_ext/thought_attention/composed.py``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Columns(NamedTuple):
    """How the M columns of a grid lie: R rationales of A positions."""

    total: int  # M
    rationales: int = 1  # R
    rationale_major: bool = False

    @property
    def anchors(self) -> int:
        """A."""
        return self.total // self.rationales

    def by_position(self, grid: Tensor) -> Tensor:
        """[B, H, S, M, D] -> [B, H, S, A, R, D], a view."""
        if self.rationale_major:
            return grid.unflatten(3, (self.rationales, self.anchors)).transpose(3, 4)
        return grid.unflatten(3, (self.anchors, self.rationales))

    def empty_grid(self, rows: Tensor) -> Tensor:
        """[B, H, S, M, D] for slot rows [B, H, A + (S-1)·M, D]."""
        batch, heads, count, size = rows.shape
        slots = (count - self.anchors) // self.total + 1
        if not self.rationale_major:
            return rows.new_empty(batch, heads, slots, self.total, size)
        grid = rows.new_empty(batch, slots, self.total, heads, size)
        return grid.permute(0, 3, 1, 2, 4)

    def later_slots(self, rows: Tensor) -> Tensor:
        """Slot rows [B, H, A + (S-1)·M, D] behind the start slot -> [B, H, S-1, A, R, D], a view."""
        return rows[:, :, self.anchors :].unflatten(2, (-1, self.anchors, self.rationales))


def split_rows(rows: Tensor, text: int, columns: Columns) -> tuple[Tensor, Tensor]:
    """[B, H, N + A + (S-1)·M, D] -> text [B, H, N, D] and grid [B, H, S, M, D], the start slot
    repeated; both are views where R = 1."""
    if columns.rationales == 1:
        first, rest = rows.split([text, rows.shape[2] - text], dim=2)
        return first, rest.unflatten(2, (-1, columns.total))
    return _Split.apply(rows, text, *columns)


def join_rows(text: Tensor, grid: Tensor, columns: Columns) -> Tensor:
    """Text [B, N, H, E] and grid [B, H, S, M, E] -> [B, N + A + (S-1)·M, H, E]: of the start slot each
    position's first column."""
    if columns.rationales == 1:
        return torch.cat([text, grid.flatten(2, 3).transpose(1, 2)], dim=1)
    rows: Tensor = _Join.apply(text, grid, *columns)
    return rows


def start_repeated(slots: Tensor, columns: Columns) -> Tensor:
    """[B, A + (S-1)·M, d] -> [B, S, M, d]; a view where R = 1."""
    return split_rows(slots[:, None], 0, columns)[1][:, 0]


def _rows_of(dim: int, text: Tensor, start: Tensor, later: Tensor, columns: Columns) -> Tensor:
    """One behind the other along ``dim``, contiguous: N rows of text, A of the start slot, and (S-1)·M
    of the others, which have the dimensions S-1, A and R from there on."""
    if not columns.rationale_major:
        return torch.cat([text, start, later.flatten(dim, dim + 2)], dim=dim)
    counts = [text.shape[dim], start.shape[dim], later.shape[dim] * columns.total]
    rows = text.new_empty(*text.shape[:dim], sum(counts), *text.shape[dim + 1 :])
    of_text, of_start, of_later = rows.split(counts, dim=dim)
    of_text.copy_(text)
    of_start.copy_(start)
    of_later.unflatten(dim, later.shape[dim : dim + 3]).copy_(later)
    return rows


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, text: int, *sizes: Any) -> tuple[Tensor, Tensor]:
        ctx.columns = columns = Columns(*sizes)
        slots = rows[:, :, text:]
        grid = columns.empty_grid(slots)
        by_position = columns.by_position(grid)
        by_position[:, :, 0] = slots[:, :, : columns.anchors, None]
        by_position[:, :, 1:] = columns.later_slots(slots)
        return rows[:, :, :text].clone(), grid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtext: Tensor, dgrid: Tensor) -> tuple[Tensor | None, ...]:
        by_position = ctx.columns.by_position(dgrid)
        start = by_position[:, :, 0].sum(3)
        # Contiguous as the gradient of a single rationale: compiled layers would copy another order.
        rows = _rows_of(2, dtext, start, by_position[:, :, 1:], ctx.columns)
        return rows, *(None,) * (1 + len(Columns._fields))


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, text: Tensor, grid: Tensor, *sizes: Any) -> Tensor:
        ctx.text, ctx.columns = text.shape[1], Columns(*sizes)
        columns = ctx.columns
        by_position = columns.by_position(grid)
        start = by_position[:, :, 0, :, 0].transpose(1, 2)
        return _rows_of(1, text, start, by_position[:, :, 1:].movedim(1, 4), columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        columns: Columns = ctx.columns
        slots = dout[:, ctx.text :].transpose(1, 2)
        dgrid = columns.empty_grid(slots)
        by_position = columns.by_position(dgrid)
        # The other columns' start slots were not handed on.
        by_position[:, :, 0, :, 0] = slots[:, :, : columns.anchors]
        by_position[:, :, 0, :, 1:] = 0
        by_position[:, :, 1:] = columns.later_slots(slots)
        return dout[:, : ctx.text], dgrid, *(None,) * len(Columns._fields)
