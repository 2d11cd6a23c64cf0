"""Linear attention with a decay (gated delta rule, KDA, Mamba-2) over a text and the columns behind it.

A head has a state [K, V]. A token with key k, value v and log decay g makes of it

    state = exp(g) state + k u^T,    u = v, or under the delta rule u = beta (v - exp(g) k^T state),

and its query q gives q^T state; KDA has a decay for each element of the key. The text goes chunk by
chunk: within a chunk each token is compared with the chunk's others, and what came before is the state
at the chunk's start. What a column's slot reads of its anchor's state is likewise a part from that
chunk's state and one from the chunk's tokens, with the u that the text has found. So columns need no
state of their own: those of a chunk are rows of one product with the chunk's state and of one with its
keys, and the memory is one state per chunk.

Shapes: B rows, H heads, N tokens, n chunks of C tokens, S slots, M columns, K and V the sizes of keys
and values, D that of decays: 1 or K. All of it in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens of a chunk. A longer one costs every row K + V products and two kept numbers a token, a shorter
# one the text more states, of K x V numbers each: docs/scaling.md has both, and the times.
CHUNK = 32
# Where decays are the key's elements', pairs of tokens have K of them each.
CHUNK_BY_ELEMENT = 16


def chunk_size(length: int, decays: int) -> int:
    """Tokens of a chunk of a text, where every token has so many decays in a head (D)."""
    return min(CHUNK, length) if decays == 1 else min(CHUNK, CHUNK_BY_ELEMENT, length)


class Rows(NamedTuple):
    """Tokens: query and key [B, H, ..., K], value [B, H, ..., V], log decay [B, H, ..., D], beta
    [B, H, ..., 1] (None: no delta rule)."""

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor
    beta: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """With all of them changed."""
        query, key, value, decay = map(change, self[:4])
        return Rows(query, key, value, decay, None if self.beta is None else change(self.beta))


class TextMemory(NamedTuple):
    """What a text leaves for its columns.

    Attributes:
        states: [B, H, n, K, V] at the start of each chunk.
        keys: [B, H, n, C, K]; values: [B, H, n, C, V], what each token adds to the state (u).
        decay: [B, H, n, C, D] log decay from the chunk's start to each token, its own included.
    """

    states: Tensor
    keys: Tensor
    values: Tensor
    decay: Tensor

    @classmethod
    def of_state(cls, state: Tensor) -> TextMemory:
        """Of a text that is known by the state [B, H, K, V] at its end: one chunk of a token that is
        nothing."""
        keys, values = state.new_zeros(*state.shape[:2], 1, 1, state.shape[2]), state[:, :, None, :1] * 0
        return cls(state[:, :, None], keys, values, torch.zeros_like(keys[..., :1]))


class SlotMemory(NamedTuple):
    """The slots so far: key [B, H, s, M, K], value [B, H, s, M, V], and log decay [B, H, s, M, D] since
    the anchor."""

    key: Tensor
    value: Tensor
    decay: Tensor

    def repeated(self, times: int) -> SlotMemory:
        """With every column repeated."""
        return SlotMemory(*(t.repeat_interleave(times, dim=3) for t in self)) if times > 1 else self


class Pairs:
    """Products of queries with keys, each decayed from the key's token to the query's.

    Args:
        at: log decays [..., a, D] of the queries' tokens; before: [..., b, D] of the keys'.
        seen: [..., a, b] bool, the keys that each query sees.
    """

    def __init__(self, at: Tensor, before: Tensor, seen: Tensor):
        if at.shape[-1] == 1 and before.shape[-1] == 1:
            self._decay = (at - before.mT).masked_fill(~seen, -torch.inf).exp()
            self._by_element = False
        else:
            between = at[..., :, None, :] - before[..., None, :, :]
            self._decay = between.masked_fill(~seen[..., None], -torch.inf).exp()
            self._by_element = True

    def products(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[..., a, K] and [..., b, K] -> [..., a, b]."""
        if not self._by_element:
            return (queries @ keys.mT) * self._decay
        return self.of_slots(queries[..., None, :, :], keys)[..., 0, :, :]

    def of_slots(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The same where S queries have the decays of each token: [..., S, a, K] -> [..., S, a, b]."""
        if not self._by_element:
            products = queries.flatten(-3, -2) @ keys.mT
            return products.unflatten(-2, queries.shape[-3:-1]) * self._decay[..., None, :, :]
        decayed = self._decay * keys[..., None, :, :]
        return (decayed @ queries.movedim(-3, -1)).movedim(-1, -3)


def over_text(
    rows: Rows, row_start: Tensor, initial: Tensor | None = None
) -> tuple[Tensor, TextMemory, Tensor]:
    """Outputs [B, H, N, V], what columns need, and the state [B, H, K, V] behind the last token.

    Args:
        rows: [B, H, N, ...].
        row_start: [B, N], the first token that each one sees; below 0 where it goes on from ``initial``.
        initial: [B, H, K, V], the state before the first token; None: zeros.
    """
    length = rows.query.shape[2]
    size = chunk_size(length, rows.decay.shape[-1])
    fill = -length % size
    place = torch.arange(length + fill, device=row_start.device)
    nothing = (place[length:] + 1).expand(len(row_start), -1)
    start = torch.cat([row_start.long(), nothing], dim=1).unflatten(1, (-1, size))
    query, key, value, decay, beta = rows.each(
        lambda t: F.pad(t, (0, 0, 0, fill)).unflatten(2, (-1, size))
    )
    place = place.unflatten(0, (-1, size))
    seen = (place[:, None] >= start[..., None]) & (place[:, None] <= place[..., None])
    goes_on = start < place[:, :1]
    decay = decay.cumsum(3)
    pairs = Pairs(decay, decay, seen[:, None])
    kept = decay.exp() * goes_on[:, None, ..., None]
    written, corrections = value, None
    if beta is not None:
        system = beta * pairs.products(key, key)
        right = torch.cat([beta * value, beta * key * kept], dim=-1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        written, corrections = solved.split([value.shape[-1], key.shape[-1]], dim=-1)
    added, last = key * _decay_until(decay, seen, -1), kept[..., -1, :, None]
    state = value.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1])
    state = state if initial is None else initial.to(state)
    states, values = [], []
    for chunk in range(key.shape[2]):
        states.append(state)
        new = written[:, :, chunk]
        if corrections is not None:
            new = new - corrections[:, :, chunk] @ state
        values.append(new)
        state = last[:, :, chunk] * state + added[:, :, chunk].mT @ new
    memory = TextMemory(torch.stack(states, 2), key, torch.stack(values, 2), decay)
    out = (query * kept) @ memory.states + pairs.products(query, key) @ memory.values
    if fill:
        end = size - fill - 1
        added = (key * _decay_until(decay, seen, end))[:, :, -1]
        state = kept[:, :, -1, end, :, None] * states[-1] + added.mT @ values[-1]
    return out.flatten(2, 3)[:, :, :length], memory, state


def _decay_until(decay: Tensor, seen: Tensor, place: int) -> Tensor:
    """Decay [B, H, n, C, D] from each of a chunk's tokens to the one at a place, if that sees it."""
    until = decay[..., place, None, :] - decay
    return until.masked_fill(~seen[:, None, :, place, :, None], -torch.inf).exp()


class Folding:
    """Columns sorted by the chunks that their anchors lie in: [B, H, S, M, .] <-> [B, H, n, S, G, .],
    where G is the largest number of columns in a chunk.

    Args:
        anchors, text_start: [B, M]; a column sees the text from one to the other.
        size: C; chunks: n.
    """

    def __init__(self, anchors: Tensor, text_start: Tensor, size: int, chunks: int):
        count, device = anchors.shape[1], anchors.device
        chunk = anchors // size
        order = chunk.argsort(dim=1, stable=True)
        ordered = chunk.gather(1, order)
        begin = torch.arange(chunks, device=device)
        first = torch.searchsorted(ordered, begin.expand(len(anchors), -1).contiguous())
        rank = torch.arange(count, device=device) - first.gather(1, ordered)
        self.chunks, self.group = chunks, int(rank.max()) + 1
        place = ordered * self.group + rank
        self._place = torch.empty_like(place).scatter_(1, order, place)
        grid = torch.full_like(place[:, :1], -1).repeat(1, chunks * self.group)
        grid.scatter_(1, place, order)
        self._source = grid.clamp(min=0)
        taken = (grid >= 0).unflatten(1, (chunks, self.group))

        def by_chunk(column: Tensor) -> Tensor:
            return column.gather(1, self._source).unflatten(1, (chunks, self.group))

        at, since = by_chunk(anchors), by_chunk(text_start.long())
        token = torch.arange(chunks * size, device=device).view(chunks, 1, size)
        self.seen = (token <= at[..., None]) & (token >= since[..., None]) & taken[..., None]
        self.goes_on = (since < token[:, :, 0]) & taken
        self.within = (at - token[:, :, 0]).clamp(0, size - 1)

    def fold(self, columns: Tensor) -> Tensor:
        """[B, H, S, M, D] -> [B, H, n, S, G, D]; places without a column hold another's."""
        index = self._source[:, None, None, :, None].expand(*columns.shape[:3], -1, columns.shape[4])
        grid = columns.gather(3, index).unflatten(3, (self.chunks, self.group))
        return grid.permute(0, 1, 3, 2, 4, 5)

    def unfold(self, grid: Tensor) -> Tensor:
        """[B, H, n, S, G, D] -> [B, H, S, M, D]."""
        places = grid.permute(0, 1, 3, 2, 4, 5).flatten(3, 4)
        index = self._place[:, None, None, :, None].expand(*places.shape[:3], -1, places.shape[4])
        return places.gather(3, index)


class AnchorStates:
    """The states behind the anchors of columns, as what can be read of them."""

    def __init__(self, memory: TextMemory, folding: Folding):
        self._memory, self._folding = memory, folding
        heads = memory.keys.shape[1]
        within = folding.within[:, None, ..., None].expand(-1, heads, -1, -1, memory.decay.shape[-1])
        at = memory.decay.gather(3, within)
        self._pairs = Pairs(at, memory.decay, folding.seen[:, None])
        self._kept = (at.exp() * folding.goes_on[:, None, ..., None])[:, :, :, None]

    def read(self, columns: Tensor) -> Tensor:
        """What rows [B, H, S, M, K] read of their column's state: [B, H, S, M, V]."""
        memory, rows = self._memory, self._folding.fold(columns)
        slots = rows.shape[3]
        out = (rows * self._kept).flatten(3, 4) @ memory.states
        near = self._pairs.of_slots(rows, memory.keys)
        out = out + near.flatten(3, 4) @ memory.values
        return self._folding.unfold(out.unflatten(3, (slots, -1)))


def over_slots(
    rows: Rows, anchors: AnchorStates, before: SlotMemory | None = None
) -> tuple[Tensor, SlotMemory]:
    """Outputs [B, H, S, M, V] of the next S slots of every column, and all slots so far.

    Args:
        rows: [B, H, S, M, ...].
        before: earlier slots; None: these are the first.
    """
    slots = rows.query.shape[2]
    decay = rows.decay.cumsum(2)
    if before is not None:
        decay = decay + before.decay[:, :, -1:]
        keys, decays = torch.cat([before.key, rows.key], 2), torch.cat([before.decay, decay], 2)
    else:
        keys, decays = rows.key, decay
    old = keys.shape[2] - slots
    # From here on by column: [B, H, M, s, .].
    by_column = [t.transpose(2, 3) for t in (rows.query, rows.key, keys, decay, decays)]
    query, key, all_keys, own, others = by_column
    seen = torch.ones(slots, old + slots, dtype=torch.bool, device=own.device).tril(old)
    pairs = Pairs(own, others, seen)
    if rows.beta is None:
        read = anchors.read(rows.query * decay.exp())
        new = rows.value.transpose(2, 3)
        values = new if before is None else torch.cat([before.value.transpose(2, 3), new], 3)
    else:
        both = torch.cat([rows.query, rows.key], 2) * torch.cat([decay, decay], 2).exp()
        read, known = anchors.read(both).split(slots, dim=2)
        beta = rows.beta.transpose(2, 3)
        system = beta * pairs.products(key, all_keys)
        right = beta * (rows.value - known).transpose(2, 3)
        if before is not None:
            earlier = before.value.transpose(2, 3)
            right = right - system[..., :old] @ earlier
        new = torch.linalg.solve_triangular(system[..., old:], right, upper=False, unitriangular=True)
        values = new if before is None else torch.cat([earlier, new], 3)
    out = read + (pairs.products(query, all_keys) @ values).transpose(2, 3)
    return out, SlotMemory(keys, values.transpose(2, 3), decays)
