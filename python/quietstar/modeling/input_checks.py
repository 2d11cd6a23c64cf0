"""Checks of a call's arguments before anything is computed; each error names the argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quietstar.config import QuietStarConfig
from quietstar.thinking.documents import DESCRIPTIONS
from quietstar.thinking.linear_layers import embedding_rows
from quietstar_ext.checks import check_index_range, dtype_name

# What generation and the Trainer hand over and this model has no use for.
_IGNORABLE = {
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "token_type_ids",
}


def check_ignored(ignored: dict[str, Any]) -> None:
    # Wrappers (peft's among them) hand down every argument that they know, None where none was given.
    given = {name for name, value in ignored.items() if value is not None}
    unknown = sorted(given - _IGNORABLE - set(DESCRIPTIONS))
    if "inputs_embeds" in unknown:
        raise ValueError(
            "inputs_embeds were given; expected input_ids, because thoughts are predicted from tokens"
            " (so prompt tuning, which puts its own embeddings before them, cannot be used)"
        )
    if unknown:
        raise TypeError(f"forward() got an unexpected argument {unknown[0]!r}")


def check_meta_tokens(config: QuietStarConfig, vocabulary: int) -> None:
    for name in ("start_token_id", "end_token_id"):
        token = getattr(config, name)
        if token is None:
            continue
        if not isinstance(token, int) or isinstance(token, bool):
            raise ValueError(f"{name} is {token!r}; expected the number of a token")
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"{name} is {token}; expected a token of the vocabulary, 0 to {vocabulary - 1}"
            )
    if config.start_token_id is not None and config.start_token_id == config.end_token_id:
        raise ValueError(
            f"start_token_id and end_token_id are both {config.start_token_id}; expected two tokens"
        )


def check_tensors(**given: Any) -> None:
    """Reject what is no tensor, by the name of its argument.

    Raises:
        TypeError: says what came.
    """
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; expected a torch.Tensor")


def check_prompt(name: str, ids: Any) -> None:
    """Reject what are no token numbers [rows, tokens].

    Raises:
        TypeError, ValueError: for another type, shape or dtype.
    """
    check_tensors(**{name: ids})
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"{name} has shape {list(ids.shape)}; expected [rows, tokens]")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} has dtype {dtype_name(ids.dtype)}; expected int64, numbers of tokens")


def check_text(
    config: QuietStarConfig, input_ids: Tensor, labels: Tensor | None, alone: bool = True
) -> None:
    """``alone``: not part of a larger batch, so that there has to be something to learn from."""
    check_prompt("input_ids", input_ids)
    if labels is None:
        return
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels has shape {list(labels.shape)}; expected {list(input_ids.shape)} like input_ids"
        )
    shortest = config.talk_length + 2 if config.thinks else 2
    if alone and input_ids.shape[1] < shortest:
        raise ValueError(
            f"input_ids has {input_ids.shape[1]} tokens per row; expected at least {shortest}"
            " (talk_length + 2)"
        )


def check_baseline(
    config: QuietStarConfig, baseline_losses: Tensor | None, input_ids: Tensor, rewarded: bool
) -> None:
    wanted = config.reward == "information-gain" and config.thought_kind == "sampled"
    if baseline_losses is None:
        if wanted and rewarded:
            raise ValueError(
                "baseline_losses is missing; the reward 'information-gain' needs those of a copy of the"
                " model (QuietStarTrainer keeps one)"
            )
        return
    if not wanted:
        raise ValueError(
            f"baseline_losses cannot be combined with reward {config.reward!r} and thought_kind"
            f" {config.thought_kind!r}; expected 'information-gain' and 'sampled'"
        )
    shape = [input_ids.shape[0], input_ids.shape[1] - 1]
    if list(baseline_losses.shape) != shape:
        raise ValueError(
            f"baseline_losses has shape {list(baseline_losses.shape)}; expected {shape}, one for every"
            " token but each row's first"
        )


def check_tokens(input_ids: Tensor, embedding: nn.Module) -> None:
    """Reject tokens that a decoder has no embedding for, where looking does not wait for a device."""
    weight = getattr(embedding, "weight", None)
    # A shard, or weights that accelerate moves, lie elsewhere than where they are used.
    plain = type(weight) in (nn.Parameter, Tensor) and not hasattr(embedding, "_hf_hook")
    if isinstance(weight, Tensor) and plain and weight.device != input_ids.device:
        raise ValueError(f"input_ids is on {input_ids.device}; expected {weight.device} like the model")
    rows = embedding_rows(embedding)
    if rows is not None:
        check_index_range("input_ids", input_ids, rows)
