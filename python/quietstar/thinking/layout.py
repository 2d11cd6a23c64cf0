"""Where the text tokens and the thoughts' slots lie in one pass, and which text each of them sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from quietstar.thinking.shared_start import Columns

if TYPE_CHECKING:
    from quietstar.thinking.recurrent.linear_attention import Folding, SlotMemory, TextMemory


@dataclass
class LayerKeys:
    """What one layer keeps during a rollout: the text's keys and values, and the slots' so far.

    ``k_text``/``v_text`` [B, Hkv, N, D]; ``k_thought``/``v_thought`` [B, Hkv, S, M, D], filled slot by
    slot so that no step copies what earlier steps wrote. ``offset`` is how many tokens at the front
    are missing from the text's keys: a sliding-window cache holds only the tail.
    """

    k_text: Tensor
    v_text: Tensor
    offset: int = 0
    k_thought: Tensor | None = None
    v_thought: Tensor | None = None


@dataclass
class LayerStates:
    """What a layer that hands states on keeps during a rollout, instead of keys
    (:mod:`quietstar.thinking.recurrent`).

    ``inputs`` [B, N, D] of its convolution, from the text; ``behind`` [B, k-1, M, D], the last ones of
    every column. ``memory`` of its linear attention, from the text; ``slots`` so far.
    """

    inputs: Tensor | None = None
    behind: Tensor | None = None
    memory: TextMemory | None = None
    slots: SlotMemory | None = None

    def of_rows(self, rows: Tensor) -> LayerStates:
        """Those behind the text's end, of some rows of the batch."""
        behind = None if self.behind is None else self.behind.index_select(0, rows)
        memory = self.memory
        if memory is not None:
            memory = type(memory)(*(t.index_select(0, rows) for t in memory))
        return LayerStates(behind=behind, memory=memory)


class HandedKeys:
    """What the attention of an ordinary pass over cached text was handed; travels as a layout does.

    A cache may keep its keys in a form of its own (compressed, or by experts); what the layers hand to
    their attention is always ``keys``: by layer [B, Hkv, N', D] and values [B, Hkv, N', E], for the last
    N' tokens of the text. No dataclass, for the same reason.

    Attributes:
        row_start: [B, N], the first token of the pass that each one sees; below 0: the text before it,
            too.
        states: of the layers that hand states on, behind the last token.
    """

    def __init__(self, row_start: Tensor | None = None) -> None:
        self.row_start = row_start
        self.keys: dict[int, tuple[Tensor, Tensor]] = {}
        self.states: dict[int, LayerStates] = {}
        self.layers_seen: dict[int, int] = {}
        self.recurrent_seen: dict[int, int] = {}


class ThoughtLayout:
    """The plan of one pass through the decoder; travels to every attention layer as a keyword.

    A *column* is one thought: it hangs from a text position, its anchor, and holds one slot per depth.
    Two kinds of pass use a layout:

    - the **packed** pass, one differentiable forward over ``[text N | slot 1: A | slot 2: M | ... |
      slot S: M]``, where the A anchors' start slots serve all their rationales;
    - the **rollout**, without gradients: one text pass that keeps each layer's keys and values here,
      then one pass per slot (or several slots whose tokens are known) over all M columns at once.

    Not a dataclass on purpose: FSDP rebuilds dataclass arguments when it casts inputs, and a rebuilt
    layout would lose the keys that the attention layers leave in it.

    Attributes:
        text_length: N.
        row_start, row_stop: [B, N] int32, the text range that each text token sees.
        anchors: [B, M] int64, the text position of each column.
        text_start, text_stop: [B, M] int32, the text range that each column sees.
        num_slots: S.
        rationales: R, neighbouring columns with the same anchor, whose start slot is run once
            (:mod:`quietstar.thinking.shared_start`).
        phase: ``"packed"``, ``"text"`` (the rollout's first pass) or ``"slot"``.
        slot: in phase ``"slot"``, the slot being computed, counted from 0; at_once: how many are, this
            one and those behind it, which lie one after the other in the pass.
        plain_text: True when every text token sees exactly the tokens before it and itself (no left
            padding, no document boundary), so that any ordinary causal kernel may serve the text rows.
        every_position: True when besides every position has the same number of columns, in order.
            Columns of padding at the right may then see it; nothing reads them.
        goes_on_from_states: whether ``states`` are those behind the text's end (in generation), and not
            of all of it.
        apart: whether torch.compile is to leave the attention out of what it compiles
            (:mod:`quietstar.thinking.fused_layers`).
    """

    def __init__(
        self,
        row_start: Tensor,
        row_stop: Tensor,
        anchors: Tensor,
        num_slots: int,
        *,
        phase: str = "packed",
        plain_text: bool = False,
        every_position: bool = False,
        rationales: int = 1,
    ):
        self.text_length = row_start.shape[1]
        self.row_start = row_start
        self.row_stop = row_stop
        self.anchors = anchors
        self.text_start = row_start.gather(1, anchors)
        self.text_stop = row_stop.gather(1, anchors)
        self.num_slots = num_slots
        self.rationales = rationales
        self.phase = phase
        self.slot = 0
        self.at_once = 1
        self.plain_text = plain_text
        self.every_position = plain_text and every_position
        self.keys: dict[int, LayerKeys] = {}
        self.states: dict[int, LayerStates] = {}
        self.foldings: dict[tuple[int, int, int], Folding] = {}
        self.goes_on_from_states = False
        self.layers_seen: dict[int, int] = {}
        self.recurrent_seen: dict[int, int] = {}
        self.apart = False
        self._rationale_major_ranges: tuple[Tensor, Tensor] | None = None

    @classmethod
    def over(cls, ranges: TextRanges, anchors: Tensor, num_slots: int, **options: Any) -> ThoughtLayout:
        """The layout of a batch whose text tokens see ``ranges``."""
        start, stop, plain, _ = ranges
        return cls(start, stop, anchors, num_slots, plain_text=plain, **options)

    @property
    def num_columns(self) -> int:
        """M."""
        return self.anchors.shape[1]

    @property
    def columns(self) -> Columns:
        """How the columns lie in a pass."""
        return Columns(self.num_columns, self.rationales)

    @property
    def repeats(self) -> int:
        """How many columns a row of the pass that a rollout is at stands for."""
        return self.rationales if self.slot == 0 else 1

    def column_ranges(self, rationale_major: bool = False) -> tuple[Tensor, Tensor]:
        """``text_start`` and ``text_stop``, or those of all positions once for each rationale, one
        behind the other, where every position thinks."""
        if not rationale_major:
            return self.text_start, self.text_stop
        if self._rationale_major_ranges is None:
            start, stop = (t.repeat(1, self.rationales) for t in (self.row_start, self.row_stop))
            self._rationale_major_ranges = start, stop
        return self._rationale_major_ranges

    def slot_rows(self, last: int) -> tuple[int, ...]:
        """How many rows each of the first ``last`` slots has in a pass."""
        return (self.num_columns // self.rationales, *(self.num_columns,) * (last - 1))

    def packed_positions(self) -> Tensor:
        """Position ids [B, N + A + (S-1)*M] of the packed sequence: an anchor's own plus the slot's
        depth."""
        text = text_positions(self.row_start, self.row_stop)
        depth = torch.arange(2, self.num_slots + 1, device=text.device)
        own = text.gather(1, self.anchors)
        later = own[:, None, :] + depth[None, :, None]
        return torch.cat([text, own[:, :: self.rationales] + 1, later.flatten(1)], dim=1)

    def slot_positions(self) -> Tensor:
        """Position ids [B, at_once * M] of the slots that a rollout is at, [B, A] of a start slot that
        rationales share."""
        text = text_positions(self.row_start, self.row_stop)
        anchors = text.gather(1, self.anchors[:, :: self.repeats])
        first = self.slot + 1
        depths = [anchors + depth for depth in range(first, first + self.at_once)]
        return depths[0] if self.at_once == 1 else torch.cat(depths, dim=1)


def first_keys(layout: ThoughtLayout) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values [B, Hkv, M, D] of the columns' first slot, by layer."""
    found = {}
    for layer, keys in layout.keys.items():
        assert keys.k_thought is not None and keys.v_thought is not None
        found[layer] = keys.k_thought[:, :, 0], keys.v_thought[:, :, 0]
    return found


def text_positions(row_start: Tensor, row_stop: Tensor) -> Tensor:
    """Position ids [B, N] of the text: counted from the first token that a token sees."""
    return (row_stop - 1 - row_start).clamp(min=0).long()


class TextRanges(NamedTuple):
    """Which text each text token sees, and where its document ends.

    Attributes:
        start, stop: [B, N] int32, the range that each token sees; empty for padding.
        plain: whether every text token sees exactly the tokens before it and itself, so that any causal
            kernel may serve the text rows.
        end: [B, N] int32, the first position behind a token's document (0 for padding) if a row holds
            several documents, otherwise None.
    """

    start: Tensor
    stop: Tensor
    plain: bool
    end: Tensor | None = None

    def positions(self) -> Tensor:
        """Position ids [B, N] of the text."""
        return text_positions(self.start, self.stop)

    def crosses(self, anchors: Tensor, ahead: Tensor) -> Tensor:
        """Whether positions ``ahead`` [..., B, A] lie behind the documents of ``anchors`` [B, A]."""
        if self.end is None:
            return torch.zeros_like(ahead, dtype=torch.bool)
        return ahead >= self.end.gather(1, anchors)


def text_ranges(
    attention_mask: Tensor | None, input_ids: Tensor, document_ids: Tensor | None = None
) -> TextRanges:
    """The range of text that each text token sees, from the attention mask.

    Args:
        attention_mask: [B, N], nonzero where a token is text, or None for all of them. Padding may
            stand at either end of a row.
        input_ids: [B, N].
        document_ids: [B, N]; neighbours with different numbers belong to different documents, which do
            not see each other and have position ids of their own. None: a row is one document.

    Raises:
        ValueError: if mask or numbers have another shape, or a hole between two text tokens of a row.
    """
    batch, length = input_ids.shape
    stop = torch.arange(1, length + 1, device=input_ids.device, dtype=torch.int32).expand(batch, -1)
    for name, given in (("attention_mask", attention_mask), ("document_ids", document_ids)):
        if given is not None and given.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {list(given.shape)}; expected {list(input_ids.shape)} like input_ids"
            )
    if attention_mask is None and document_ids is None:
        return TextRanges(torch.zeros_like(stop), stop, True)
    is_text = torch.ones_like(stop) != 0 if attention_mask is None else attention_mask != 0
    starts = is_text & ~torch.nn.functional.pad(is_text, (1, 0))[:, :-1]
    changes = starts | (~is_text & torch.nn.functional.pad(is_text, (1, 0))[:, :-1])
    if document_ids is not None:
        changes[:, 1:] |= is_text[:, 1:] & (document_ids[:, 1:] != document_ids[:, :-1])
    # One look at the device for all questions.
    max_starts, max_documents, plain = torch.stack(
        [
            starts.sum(1).max(),
            (is_text & changes).sum(1).max(),
            (is_text[:, 0] | ~is_text.any(1)).all().long(),
        ]
    ).tolist()
    if max_starts > 1:
        raise ValueError(
            "attention_mask has a hole in the middle of a row; expected padding at the ends only"
        )
    first = torch.where(changes & is_text, stop - 1, 0).cummax(1).values
    start = torch.where(is_text, first, stop)
    if max_documents <= 1:
        return TextRanges(start, stop, bool(plain))
    return TextRanges(start, stop, False, _document_ends(is_text, changes, stop))


def _document_ends(is_text: Tensor, changes: Tensor, stop: Tensor) -> Tensor:
    """[B, N] int32: the next position at which something else begins; 0 for padding."""
    length = stop.shape[1]
    next_start = torch.where(changes, stop - 1, length)[:, 1:]
    next_start = torch.nn.functional.pad(next_start, (0, 1), value=length)
    return torch.where(is_text, next_start.flip(1).cummin(1).values.flip(1), 0)
