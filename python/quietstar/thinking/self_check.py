"""Once per model, before its first thoughts: does the decoder compute what its thoughts are taken for?

A packed column of ordinary tokens has to equal the decoder's own run of the same tokens as one text. A
decoder that computes positions of its own, adds something to the embeddings of its ``input_ids`` or
attends in another way than it tells its attention function would otherwise get wrong thoughts without a
word.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from quietstar.thinking.fsdp2 import decoder_gathered
from quietstar.thinking.layout import ThoughtLayout, text_ranges
from quietstar.thinking.linear_layers import embedding_rows
from quietstar.thinking.noise import evaluation_mode
from quietstar.thinking.output_layer import output_layer
from quietstar.thinking.positions import check_length
from quietstar.thinking.text_part import kind_of, text_body, text_config_of
from quietstar.thinking.text_pass import run_decoder

# The text, its two anchors and the slots behind each: enough for a wrong position, mask or embedding.
_TEXT, _ANCHORS, _SLOTS = 4, (1, 3), 2
# Largest relative difference of a hidden state. In fp32 right decoders stay below 1e-5, wrong ones begin
# at 0.05. Where numbers are rounded (half precision, quantized weights) a token may go to another
# expert, so the median counts, and deep decoders magnify what was rounded: up to so many times what a
# change of the embeddings by one part in 256 does is allowed.
_EXACT, _ROUNDED, _OF_A_NUDGE = 1e-3, 0.05, 4.0

_one_at_a_time = threading.Lock()


@torch.compiler.disable
def check_decoder(
    decoder: PreTrainedModel, device: torch.device, *, logits: bool, thoughts: bool
) -> None:
    """Run the checks on a handful of tokens; leaves no trace in the model or the random numbers.

    Args:
        decoder: the wrapped causal language model.
        device: where its tokens are.
        logits: compare its logits with what
            :func:`~quietstar.thinking.output_layer.output_layer` reads of them.
        thoughts: compare a packed pass with its own run.

    Raises:
        ValueError: names the model type and what differs.
    """
    devices = [device] if device.type == "cuda" else []
    with (
        _one_at_a_time,
        torch.no_grad(),
        torch.random.fork_rng(devices=devices),
        evaluation_mode(decoder),  # two passes with dropout would differ
        decoder_gathered(decoder),
        _errors_as_a_sentence(decoder),
    ):
        ids = _ordinary_tokens(decoder, _TEXT + _SLOTS).to(device)
        check_length(decoder, _TEXT, _SLOTS)
        if logits:
            check_logits(decoder, ids[None, :_TEXT])
        if thoughts:
            _check_columns(decoder, ids)


@contextmanager
def _errors_as_a_sentence(decoder: PreTrainedModel) -> Iterator[None]:
    """Turn what the decoder's own code raises during the checks into an error of one sentence."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").startswith(__package__ + "."):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{kind_of(decoder)} cannot run with thoughts: its own code raised {type(error).__name__}"
            f" ({reason})"
        ) from error


def check_logits(decoder: PreTrainedModel, input_ids: Tensor) -> None:
    """Compare the logits of a model in evaluation mode with :func:`output_layer`'s reading of them.

    Args:
        input_ids: [1, N], any text.

    Raises:
        ValueError: if a family does something to its logits that is not known here.
    """
    own = decoder(input_ids=input_ids, use_cache=False).logits
    body = text_body(decoder)(input_ids=input_ids, use_cache=False).last_hidden_state
    ours = output_layer(decoder).logits(body)
    error = (own.float() - ours.float()).abs().max() / own.float().abs().max().clamp(min=1e-6)
    if not error < 2e-2:
        raise ValueError(
            f"{kind_of(decoder)} computes its logits in a way that is not supported (relative"
            f" difference {float(error):.2g})"
        )


def _check_columns(decoder: PreTrainedModel, ids: Tensor) -> None:
    """ids [text + slots]: what is said, both in a packed pass and as texts."""
    text, said = ids[None, :_TEXT], ids[_TEXT:]
    anchors = torch.tensor([_ANCHORS], device=ids.device)
    layout = ThoughtLayout.over(text_ranges(None, text), anchors, _SLOTS)
    slots = said.repeat_interleave(len(_ANCHORS))[None]
    embeds = decoder.get_input_embeddings()(torch.cat([text, slots], dim=1))

    def packed(embeds: Tensor) -> tuple[Tensor, Tensor]:
        hidden = run_decoder(decoder, embeds, layout.packed_positions(), layout)[0]
        columns = hidden[_TEXT:].unflatten(0, (_SLOTS, len(_ANCHORS)))
        return hidden[:_TEXT], columns.transpose(0, 1).flatten(0, 1)

    # One text for each anchor; what fills up the shorter ones is behind them and changes nothing.
    texts = [torch.cat([ids[: anchor + 1], said, ids])[: len(ids)] for anchor in _ANCHORS]
    own = text_body(decoder)(input_ids=torch.stack(texts), use_cache=False).last_hidden_state
    behind = [row[anchor + 1 :][:_SLOTS] for row, anchor in zip(own, _ANCHORS, strict=True)]
    wanted = (own[-1, :_TEXT], torch.cat(behind))
    found = packed(embeds.clone())  # some decoders scale it in place
    rounded = _is_rounded(decoder, own)
    nudge = torch.full(embeds.shape[-1:], 1 + 1 / 256, device=embeds.device)
    nudge[1::2] = 1 - 1 / 256
    nudged = packed(embeds * nudge.to(embeds.dtype)) if rounded else found
    pairs = zip(("the text", "a thought"), found, wanted, nudged, strict=True)
    for what, ours, theirs, moved in pairs:
        error, limit = _difference(ours, theirs, rounded), _EXACT
        if rounded:
            limit = max(_ROUNDED, _OF_A_NUDGE * _difference(moved, ours, rounded))
        if not error < limit:
            raise ValueError(
                f"{kind_of(decoder)} computes {what} in a pass"
                " with thoughts differently from the same tokens as one text (relative difference"
                f" {error:.2g}), so its thoughts would be wrong (self_check=False in the configuration"
                " skips this check)"
            )


def _difference(found: Tensor, wanted: Tensor, rounded: bool) -> float:
    """Of hidden states [rows, d], relative to their size: the largest row's, or the median."""
    size = wanted.float().norm(dim=-1).clamp(min=1e-6)
    errors = (found.float() - wanted.float()).norm(dim=-1) / size
    return float(errors.median() if rounded else errors.max())


def _is_rounded(decoder: PreTrainedModel, hidden: Tensor) -> bool:
    exact = (torch.float32, torch.float64)
    kind = hidden.device.type
    backend: Any = torch.backends.cuda if kind == "cuda" else torch.backends.mkldnn
    return (
        hidden.dtype not in exact
        or any(p.dtype not in exact for p in decoder.parameters())
        or bool(getattr(decoder, "is_quantized", False))
        or torch.is_autocast_enabled(kind)
        or getattr(backend.matmul, "fp32_precision", "ieee") in ("tf32", "bf16")
    )


def _ordinary_tokens(decoder: PreTrainedModel, count: int) -> Tensor:
    """[count] int64 ids all over the vocabulary, other than those with a meaning for the decoder."""
    config = text_config_of(decoder.config)
    rows = embedding_rows(decoder.get_input_embeddings()) or 1
    size = min(getattr(config, "vocab_size", rows), rows)
    special = {i for part in (config, decoder.config) for i in _special_ids(part)}
    # Ordinary ones first: those with a meaning stand at the ends of most vocabularies.
    spread = chain(range(size // 3, size), range(size // 3))
    ordinary = list(islice((i for i in spread if i not in special), count)) or [0]
    return torch.tensor((ordinary * count)[:count])


def _special_ids(config: PretrainedConfig) -> Iterator[int]:
    for name, value in config.to_dict().items():
        if name.endswith(("token_id", "token_ids", "token_index")):
            yield from (i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))
