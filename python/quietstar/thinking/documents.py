"""Which documents the rows of a batch hold, from all arguments that may say so.

Our own batches have ``document_ids``. Flattened batches, of transformers' ``DataCollatorWithFlattening``
for one, tell documents apart by ``position_ids`` that start anew, by ``seq_idx`` or by the
``cu_seq_lens_q`` of flash attention. Whoever looks at a batch reads them here, so that losses, counts,
averaged copy and evaluation see the same documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from quietstar.thinking.layout import TextRanges, text_ranges

# Arguments of the model beside document_ids that describe the documents of its rows.
DESCRIPTIONS = (
    *("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)
# All that the ranges of a batch follow from.
TEXT = ("input_ids", "attention_mask", "document_ids", *DESCRIPTIONS)


def batch_ranges(batch: Mapping[str, Any]) -> TextRanges:
    """The range of text that each token of a batch sees
    (:func:`~quietstar.thinking.layout.text_ranges`).

    Args:
        batch: arguments of the model. Read are ``input_ids`` [B, N], ``attention_mask`` and
            ``document_ids`` as in :func:`~quietstar.thinking.layout.text_ranges`, and

            - ``position_ids`` [B, N] or [1, N]: counted from 0 in every document; a 0 begins one;
            - ``seq_idx`` [B, N]: numbers of documents, as ``document_ids``;
            - ``cu_seq_lens_q``, ``cu_seq_lens_k`` [D + 1]: where the D documents of a single row begin,
              and its end, with ``max_length_q``, ``max_length_k``, the longest document.

    Raises:
        ValueError: if one of them cannot be read so, or two disagree.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    positions = _positions(batch.get("position_ids"), ids)
    said = {"document_ids": batch.get("document_ids"), "seq_idx": batch.get("seq_idx")}
    for end in ("q", "k"):
        said[f"cu_seq_lens_{end}"] = _numbers(batch, end, ids)
    if positions is not None:
        said["position_ids"] = (positions == 0).cumsum(1)
    given = {name: numbers for name, numbers in said.items() if numbers is not None}
    first, *others = given or [""]
    numbers = given.get(first)
    if numbers is not None and numbers.shape != ids.shape:
        raise ValueError(
            f"{first} has shape {list(numbers.shape)}; expected {list(ids.shape)} like input_ids"
        )
    ranges = text_ranges(mask, ids, numbers)
    for name in others:
        # position_ids are compared as such below.
        if name != "position_ids" and not torch.equal(
            text_ranges(mask, ids, given[name]).start, ranges.start
        ):
            raise ValueError(
                f"{name} and {first} disagree about where documents begin; expected one of them, or the"
                " same documents"
            )
    if positions is not None:
        expected = ranges.positions()
        wrong = (positions != expected) & (ranges.start < ranges.stop)
        _check_positions(positions, expected, wrong, "" if first == "position_ids" else first)
    return ranges


def check_new_positions(
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    input_ids: Tensor,
    past_key_values: Cache | None,
) -> None:
    """Check that the position ids of new tokens are those that follow from the mask, which are used.

    Args:
        position_ids: [B, new] or [1, new]; attention_mask: [B, past + new]; input_ids: [B, new].

    Raises:
        ValueError: if they are others.
    """
    positions = _positions(position_ids, input_ids)
    if positions is None:
        return
    rows, new = input_ids.shape
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    if attention_mask is None:
        attention_mask = input_ids.new_ones(rows, past + new)
    is_text = attention_mask != 0
    if is_text.shape != (rows, past + new):
        return  # an error where it is used
    expected = (is_text.long().cumsum(1) - 1)[:, past:]
    wrong = (positions != expected) & is_text[:, past:]
    _check_positions(positions, expected, wrong, "attention_mask")


def _positions(position_ids: Tensor | None, input_ids: Tensor) -> Tensor | None:
    if position_ids is None:
        return None
    if position_ids.shape == (1, input_ids.shape[1]):
        return position_ids.expand(input_ids.shape)
    if position_ids.shape != input_ids.shape:
        raise ValueError(
            f"position_ids has shape {list(position_ids.shape)}; expected {list(input_ids.shape)} like"
            " input_ids"
        )
    return position_ids


def _check_positions(positions: Tensor, expected: Tensor, wrong: Tensor, by: str) -> None:
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        follows = f", as {by} says" if by else ""
        raise ValueError(
            f"position_ids[{row}, {place}] is {int(positions[row, place])}; expected"
            f" {int(expected[row, place])}: they count from 0 in every document of a row{follows}"
        )


def _numbers(batch: Mapping[str, Any], end: str, input_ids: Tensor) -> Tensor | None:
    """[1, N] numbers of the documents that ``cu_seq_lens_q`` or ``_k`` describes."""
    name, longest = f"cu_seq_lens_{end}", batch.get(f"max_length_{end}")
    bounds = batch.get(name)
    if bounds is None:
        if longest is not None:
            raise ValueError(f"max_length_{end} was given without {name}; expected both or neither")
        return None
    length = input_ids.shape[1]
    if len(input_ids) != 1:
        raise ValueError(f"{name} was given with {len(input_ids)} rows; expected one flattened row")
    bounds = torch.as_tensor(bounds, device=input_ids.device).long()
    lengths = bounds.diff() if bounds.dim() == 1 else bounds.new_empty(0)
    if not len(lengths) or bounds[0] != 0 or bounds[-1] != length or bool((lengths <= 0).any()):
        raise ValueError(f"{name} is {bounds.tolist()}; expected ascending numbers from 0 to {length}")
    if longest is not None and int(longest) != int(lengths.max()):
        raise ValueError(
            f"max_length_{end} is {int(longest)}; expected {int(lengths.max())}, the longest of {name}"
        )
    return torch.arange(len(lengths), device=input_ids.device).repeat_interleave(lengths)[None]
