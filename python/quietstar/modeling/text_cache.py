"""The text's cache under both of its names: transformers 5.24 calls ``past_key_values`` ``cache``."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quietstar.thinking.next_token import KeysByLayer

_NEW, _OLD = "cache", "past_key_values"


def _named_in(function: Any) -> str | None:
    known = inspect.signature(function).parameters
    return next((name for name in (_NEW, _OLD) if name in known), None)


# What the installed transformers calls it in generate and in outputs.
CACHE_NAME = _named_in(GenerationMixin.prepare_inputs_for_generation) or _OLD


@lru_cache(maxsize=64)
def _name_in(module: Any) -> str:
    return _named_in(module.forward) or CACHE_NAME


def cache_argument(decoder: nn.Module, cache: Cache) -> dict[str, Cache]:
    """The cache under the name that the decoder's own forward has for it."""
    kind: Any = type(decoder)
    return {_name_in(kind): cache}


def one_cache(past_key_values: Any, cache: Any) -> tuple[str, Any]:
    """The cache of a call, and the name under which it was given.

    Raises:
        ValueError: if it was given under both names.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError(
            "`past_key_values` and `cache` cannot be combined: they are two names of one argument"
        )
    if cache is not None:
        return _NEW, cache
    return (CACHE_NAME, None) if past_key_values is None else (_OLD, past_key_values)


def with_installed_name(arguments: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for transformers' generate, whichever name the cache was given under."""
    others = {key: value for key, value in arguments.items() if key not in (_NEW, _OLD)}
    name, cache = one_cache(arguments.get(_OLD), arguments.get(_NEW))
    check_grows(name, cache)
    return others if cache is None else {**others, CACHE_NAME: cache}


def check_grows(name: str, cache: Any) -> None:
    """Reject caches that thoughts cannot read.

    Raises:
        ValueError: names the class that came.
    """
    if cache is None:
        return
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"{name} is a {type(cache).__name__}; expected a cache that grows, a DynamicCache"
            " (static and quantized caches are not supported with thoughts)"
        )
    if getattr(cache, "offloading", False):
        raise ValueError(
            f"{name} is offloaded; expected a cache on the model's device, as a thought reads all of it"
        )


def check_prompt_is_longer(cache: Any, prompt: Any) -> None:
    """Reject a cache that leaves nothing of a prompt to read: generate would read all of it again.

    Raises:
        ValueError: says how many tokens either has.
    """
    if cache is None or prompt is None or cache.get_seq_length() == 0:
        return
    if cache.get_seq_length() >= prompt.shape[1]:
        raise ValueError(
            f"{CACHE_NAME} holds {cache.get_seq_length()} tokens and the prompt has {prompt.shape[1]};"
            " expected a cache of fewer, as the prompt's last token is read again"
        )


def check_alone(name: str, **others: Any) -> None:
    """Reject arguments that mean nothing together with the argument ``name``.

    Raises:
        ValueError: names both.
    """
    for other, value in others.items():
        if value is not None:
            raise ValueError(f"`{other}` and `{name}` cannot be combined")


def holds_handed_keys(cache: Cache, handed: KeysByLayer) -> bool:
    """Whether a cache holds, layer by layer, the very keys and values that the decoder's layers have
    just handed to their attention, or the tail of them.

    Then a pass without the cache can be followed by :func:`keep_keys`. Other caches hold a form of their
    own (compressed, say), which only the layers can add to.
    """
    kept = kept_keys(cache)
    return set(kept) == set(handed) and all(
        _is_tail(mine, theirs)
        for layer in kept
        for mine, theirs in zip(kept[layer], handed[layer], strict=True)
    )


def _is_tail(kept: Tensor, handed: Tensor) -> bool:
    same_memory = kept.untyped_storage().data_ptr() == handed.untyped_storage().data_ptr()
    ends = [t.storage_offset() + (t.shape[2] - 1) * t.stride(2) for t in (kept, handed)]
    same_shape = kept.shape[:2] == handed.shape[:2] and kept.shape[3] == handed.shape[3]
    return same_memory and same_shape and kept.stride() == handed.stride() and ends[0] == ends[1]


def kept_keys(cache: Cache) -> KeysByLayer:
    """Keys and values [B, Hkv, N', D] by layer, of the last N' tokens of the text; nothing for caches
    that are not known to keep just these."""
    layers = cache.layers if type(cache) is DynamicCache else []
    if not all(map(_keeps_keys, layers)):
        return {}
    return {index: (layer.keys, layer.values) for index, layer in enumerate(layers)}


def _keeps_keys(layer: Any) -> bool:
    windowed = type(layer) is DynamicSlidingWindowLayer and not getattr(layer, "record_past", False)
    return (windowed or type(layer) is DynamicLayer) and layer.is_initialized


def keep_keys(cache: Cache, new: KeysByLayer) -> None:
    """Add a token's keys and values [B, Hkv, 1, D] to a cache, perhaps with zeros behind them."""
    for index, (keys, values) in new.items():
        layer = cache.layers[index]
        cache.update(keys[..., : layer.keys.shape[-1]], values[..., : layer.values.shape[-1]], index)
