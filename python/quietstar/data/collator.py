"""Rows of a data set, as one batch: padded to the longest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quietstar.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
# The columns of a row. The mask alone marks padding, so that documents may have any number there.
_SHAPES = {
    **dict.fromkeys(("input_ids", "attention_mask", "labels"), "[tokens]"),
    **dict.fromkeys(("document_ids", "position_ids", "seq_idx"), "[tokens]"),
    "thought_ids": "[rationales, tokens, thought_length]",
    "anchors": "[anchors]",
    "completion_anchors": "[completions]",
    "baseline_losses": "[tokens - 1]",
}
# Positions of a row: as many as it has.
_RAGGED = ("anchors", "completion_anchors")
# What tokenizers and samplers have beside them, which the model has no use for.
_LEFT_OUT = ("token_type_ids", "special_tokens_mask", "length")


@dataclass
class PaddingCollator:
    """Pad rows to the longest of the batch and stack them.

    A row has ``input_ids`` [n], and may have ``attention_mask`` [n] (default: all text), ``labels`` [n]
    (or by transformers' other name, ``label_ids``), ``document_ids``, ``position_ids`` or ``seq_idx``
    [n], ``thought_ids`` [R, n, T], ``anchors`` [A] (then ``thought_ids`` may be [R, A, T]),
    ``completion_anchors`` [C] and ``baseline_losses`` [n-1]; as lists, arrays or tensors. All rows have
    the same columns.

    Returns ``input_ids``, ``attention_mask`` (1 at text), ``labels`` (-100 at pads, and at a first
    token that only pads precede) and the others, each [B, longest] int64 or with that many tokens.
    The mask alone says what is padding: ``pad_id`` may equal the end-of-text id. A row without a target
    stays in the batch, where it counts nowhere. A row with fewer anchors than another has its last one
    repeated, which the model counts once; one without any gets the batch's last position, of which
    nothing can be predicted.

    Args:
        min_length: batches have at least so many tokens per row.

    Raises:
        ValueError: names the row and the column that cannot be used.
    """

    pad_id: int = 0
    padding_side: str = "right"
    min_length: int = 1

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise UserError(f"padding_side is {self.padding_side!r}; expected left or right")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        checked = [_checked(row, number) for number, row in enumerate(rows)]
        columns = [name for name in _SHAPES if any(name in row for row in checked)]
        for number, row in enumerate(checked):
            for name in columns:
                if name not in row:
                    raise ValueError(
                        f"row {number} of a batch has no {name}, which others have; expected the same"
                        " columns in every row"
                    )
        longest = max(self.min_length, *(len(row["input_ids"]) for row in checked))
        # Thoughts for every token, or for every anchor: the same in all rows.
        of_anchors = all(
            "anchors" in row and row["thought_ids"].shape[1] == len(row["anchors"])
            for row in checked
            if "thought_ids" in row
        )
        padded = [self._padded(row, number, longest, of_anchors) for number, row in enumerate(checked)]
        for name in (name for name in _RAGGED if name in columns):
            _repeat_last(padded, name, longest, of_anchors and name == "anchors")
        for number, row in enumerate(padded):
            for name in columns:
                if row[name].shape != padded[0][name].shape:
                    raise ValueError(
                        f"{name} of rows 0 and {number} of a batch have the shapes"
                        f" {_shape(checked[0][name])} and {_shape(checked[number][name])}; expected rows"
                        " that can be stacked"
                    )
        return {name: torch.stack([row[name] for row in padded]) for name in columns}

    def _padded(
        self, row: dict[str, Tensor], number: int, longest: int, of_anchors: bool
    ) -> dict[str, Tensor]:
        """A row with all its columns in their places among ``longest`` tokens."""
        length = len(row["input_ids"])
        before = longest - length if self.padding_side == "left" else 0
        fill = {"input_ids": self.pad_id, "labels": IGNORED}
        made = {}
        for name, value in row.items():
            if name in _RAGGED:
                made[name] = value + before
            elif name == "thought_ids":
                if not of_anchors and value.shape[1] != length != longest:
                    raise ValueError(
                        f"thought_ids of row {number} of a batch has shape {_shape(value)} for {length}"
                        " tokens beside rows of other lengths; expected thoughts for every token, or"
                        " anchors"
                    )
                # A pad's thought is never read.
                whole = of_anchors or length == longest
                made[name] = value if whole else pad(value, (0, 0, before, longest - before - length))
            else:
                after = longest - before - len(value) - (name == "baseline_losses")
                made[name] = pad(value, (before, after), value=fill.get(name, 0))
        if before and length and "labels" in made:
            # Only a pad stands before a row's first token, and it has seen no text.
            made["labels"][before] = IGNORED
        return made


def collator_for(
    tokenizer: PreTrainedTokenizerBase, padding_side: str, min_length: int = 1
) -> PaddingCollator:
    """The collator of a tokenizer: its pad id, else its end-of-text id, else 0."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return PaddingCollator(next(i for i in ids if i is not None), padding_side, min_length)


def _repeat_last(rows: list[dict[str, Tensor]], name: str, longest: int, with_thoughts: bool) -> None:
    """Give every row as many anchors as the one that has the most, and one at least; perhaps the same
    for the thoughts that were given at them."""
    count = max(1, *(len(row[name]) for row in rows))
    for row in rows:
        own = row[name]
        fill = own[-1:] if len(own) else own.new_full((1,), longest - 1)
        row[name] = torch.cat([own, fill.expand(count - len(own))])
        if with_thoughts and "thought_ids" in row:  # of a repeated anchor they are never read
            row["thought_ids"] = pad(row["thought_ids"], (0, 0, 0, count - len(own)))


def _checked(row: Mapping[str, Any], number: int) -> dict[str, Tensor]:
    """The columns of a row that the model takes, as tensors of the right shape."""
    if not isinstance(row, Mapping):
        raise ValueError(
            f"row {number} of a batch is a {type(row).__name__}; expected a mapping with input_ids and"
            " labels"
        )
    given = {name: value for name, value in row.items() if value is not None and name not in _LEFT_OUT}
    if "label_ids" in given:
        given.setdefault("labels", given.pop("label_ids"))
    if "input_ids" not in given:
        # The Trainer drops columns that the model does not take, which may leave none.
        found = f"only {', '.join(given)}" if given else "nor another column that the model takes"
        raise ValueError(
            f"row {number} of a batch has no input_ids, {found}; expected input_ids and labels"
        )
    for name in given:
        if name not in _SHAPES:
            raise ValueError(
                f"row {number} of a batch has the column {name!r}; expected any of {', '.join(_SHAPES)}"
            )
    made = {name: _tensor(value, name, number) for name, value in given.items()}
    length = made["input_ids"].numel()
    made.setdefault("attention_mask", torch.ones(length, dtype=torch.int64))
    sizes = {"[tokens]": length, "[tokens - 1]": max(length - 1, 0)}
    for name, value in made.items():
        wanted = _SHAPES[name]
        dimensions = wanted.count(",") + 1
        if value.dim() != dimensions or len(value) != sizes.get(wanted, len(value)):
            raise ValueError(
                f"{name} of row {number} of a batch has shape {_shape(value)}; expected {wanted}, with"
                f" {length} tokens in input_ids"
            )
    return made


def _tensor(value: Any, name: str, number: int) -> Tensor:
    try:
        made = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} of row {number} of a batch is {value!r}; expected numbers") from None
    if name == "baseline_losses":
        return made.float()
    if made.is_floating_point() and made.numel() and name != "attention_mask":
        raise ValueError(f"{name} of row {number} of a batch holds {made.dtype}; expected whole numbers")
    return made.long()


def _shape(value: Tensor) -> list[int]:
    return list(value.shape)
