"""Layers: which linear layers are read through their weight, and which are called.

The fused operators take a weight. An ordinary linear layer is its weight (and bias); a layer that was
wrapped or replaced is not: an adapter adds its update, a quantised layer holds packed integers, a hook
changes what goes in or comes out. Such a layer is called as it stands, so that whatever it does is done,
and trained. This is decided here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether calling a layer is ``F.linear(x, layer.weight, layer.bias)`` and nothing else."""
    if not isinstance(layer, nn.Linear):
        return False
    # A subclass or a wrapper (accelerate's, say) may have a forward of its own.
    if getattr(layer.forward, "__func__", None) is not nn.Linear.forward:
        return False
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_hooks)
    if any(not _gathers_weights(hook) for each in hooks for hook in each.values()):
        return False
    # A subclass of Tensor (torchao's, a shard's) holds something else at its address.
    weight = layer.weight
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()


def _gathers_weights(hook: Any) -> bool:
    """FSDP2's hooks leave values as they are, and :mod:`quietstar.thinking.fsdp2` does what they do."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


def _inside_adapters(layer: nn.Module) -> nn.Module:
    while hasattr(layer, "get_base_layer"):  # peft's layers, one in another
        layer = layer.get_base_layer()  # type: ignore[operator]
    return layer


def embedding_rows(layer: nn.Module) -> int | None:
    """How many tokens an embedding table has, an adapter's around it or not; None if it is no table."""
    rows = getattr(_inside_adapters(layer), "num_embeddings", None)
    return None if rows is None else int(rows)


def input_dtype(layer: nn.Module) -> torch.dtype | None:
    """The floating dtype that a linear layer takes; None where it takes any (its weight is packed)."""
    weight = getattr(_inside_adapters(layer), "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.dtype
    return None


def call_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` for x of any floating dtype."""
    dtype = input_dtype(layer)
    output: Tensor = layer(x if dtype is None else x.to(dtype))
    return output


def input_device(base: PreTrainedModel) -> torch.device:
    """The device on which a decoder takes its tokens, also where accelerate has put its weights away."""
    hook = getattr(base.get_input_embeddings(), "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    return base.device if place is None else torch.device(place)
