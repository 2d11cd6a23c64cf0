"""What is refused before a pass, in one sentence that names the argument."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .config import QuietStarConfig

# What generation and the Trainer hand over and this model has no use for.
_IGNORABLE = {
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "return_dict",
    "token_type_ids",
}


def check_ignored(ignored: dict[str, Any]) -> None:
    unknown = sorted(set(ignored) - _IGNORABLE)
    if unknown:
        raise TypeError(f"forward() got an argument it does not know: {unknown[0]!r}")


def check_meta_tokens(config: QuietStarConfig, vocabulary: int) -> None:
    for name in ("start_token_id", "end_token_id"):
        token = getattr(config, name)
        if token is not None and not 0 <= token < vocabulary:
            raise ValueError(
                f"{name} is {token}; expected a token of the vocabulary, 0 to {vocabulary - 1}"
            )


def check_text(config: QuietStarConfig, input_ids: Tensor, labels: Tensor | None) -> None:
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; expected [rows, tokens]")
    if labels is None:
        return
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels has shape {list(labels.shape)}; expected {list(input_ids.shape)} like input_ids"
        )
    shortest = config.talk_length + 2 if config.thinks else 2
    if input_ids.shape[1] < shortest:
        raise ValueError(
            f"input_ids has {input_ids.shape[1]} tokens per row; expected at least {shortest}"
            " (talk_length + 2)"
        )
