"""The text's cache under both of its names: transformers 5.24 calls ``past_key_values`` ``cache``."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin

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
