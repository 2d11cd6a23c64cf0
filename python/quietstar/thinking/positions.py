"""How many positions a decoder has: learned ones end, and some rotary ones change."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from quietstar.thinking.text_part import text_body, text_config_of

# Rotary embeddings whose frequencies depend on the largest position id of the pass.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

_known_limits: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


def check_length(decoder: PreTrainedModel, text: int, slots: int = 0) -> None:
    """Reject positions that a decoder's position embedding cannot reach without side effects.

    Args:
        decoder: a causal language model.
        text: tokens in a row; slots: of the thought behind it.

    Raises:
        ValueError: names the limit.
    """
    longest = text + slots
    need = (
        f"text and thought need {longest} positions" if slots else f"the text needs {longest} positions"
    )
    config = text_config_of(decoder.config)
    limit = learned_positions(decoder)
    if limit is not None and longest > limit:
        raise ValueError(f"{need}; {config.model_type!r} has {limit} learned ones")
    for kind, limit in rope_limits(decoder):
        if slots and longest > limit:
            raise ValueError(
                f"{need}; with {kind!r} rotary embeddings a slot past {limit} would change the text's"
                " own predictions"
            )


def learned_positions(decoder: PreTrainedModel) -> int | None:
    """The number of positions in a decoder's table of learned ones, None where it has no such table."""
    if decoder not in _known_limits:
        limits = [
            table.num_embeddings - int(getattr(table, "offset", 0))
            for name, table in text_body(decoder).named_modules()
            if isinstance(table, nn.Embedding) and _of_positions(name)
        ]
        _known_limits[decoder] = min(limits, default=None)
    return _known_limits[decoder]


def _of_positions(name: str) -> bool:
    """Whether a module's name is that of a text's position table, not of an image's or a recording's."""
    positions = any("position" in part or part in ("wpe", "pos_emb") for part in name.split("."))
    return positions and not any(
        other in name for other in ("image", "img", "vision", "audio", "encoder")
    )


def rope_limits(decoder: PreTrainedModel) -> list[tuple[str, int]]:
    """Kind and original length of rotary embeddings that depend on the longest position of a pass."""
    config = text_config_of(decoder.config)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    found = []
    for group in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = group.get("rope_type", group.get("type"))
        if kind in LENGTH_DEPENDENT_ROPE:
            limit = group.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", config.max_position_embeddings
            )
            found.append((kind, limit))
    return found
