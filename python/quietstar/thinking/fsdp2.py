"""FSDP2: which weights stay gathered, and for how long.

FSDP2 gathers a unit's weights before its forward and drops them behind it. A step with thoughts runs the
decoder once per slot, the embedding once per slot, and reads the output layer's weight without calling
the layer, so

- the units of the embedding and the output layer are gathered once for a whole call of the model
  (:func:`output_layer_gathered`), and
- every unit of the decoder is gathered once for a whole rollout (:func:`decoder_gathered`): that is as
  many gathers as one forward has, instead of one per slot, for the price of the whole decoder's weights
  on every device while no activations of the packed pass are there yet. The packed pass and its backward
  gather layer by layer, as FSDP2 does.

Without FSDP2 both do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel


def _units(modules: Iterable[nn.Module | None]) -> list[Any]:
    """The modules that are FSDP2 units of their own."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in modules if isinstance(module, FSDPModule)]


def _groups(unit: Any) -> list[Any]:
    return list(unit._get_fsdp_state()._fsdp_param_groups)


@contextmanager
def _gathered(units: list[Any], leave: Any = None) -> Iterator[None]:
    """Gather the units' weights, keep them for the block, and leave FSDP2's own bookkeeping as it was.

    ``leave``: a unit whose weights stay behind the block as well; backward drops them.
    """
    groups = list(dict.fromkeys(g for unit in units for g in _groups(unit)))
    for unit in units:
        unit.unshard(async_op=True)
    for unit in units:
        unit.unshard()
    kept = [group.post_forward_mesh_info for group in groups]
    for group in groups:
        group.post_forward_mesh_info = None  # what set_reshard_after_forward(False) does
    try:
        yield
    finally:
        for group, before in zip(groups, kept, strict=True):
            group.post_forward_mesh_info = before
            if before is not None and (leave is None or group not in _groups(leave)):
                group.reshard()


@contextmanager
def decoder_gathered(decoder: PreTrainedModel) -> Iterator[None]:
    """Every weight of the decoder is gathered once, and stays so for the block (a rollout)."""
    units = _units(decoder.modules())
    if not units:
        yield
        return
    # FSDP2 notes the order of the forwards, to gather ahead in backward; a rollout has no backward.
    groups = [g for unit in units for g in _groups(unit)]
    order = groups[0].comm_ctx.post_forward_order if groups else []
    before = len(order)
    head = set(_units([decoder.get_input_embeddings(), decoder.get_output_embeddings()]))
    try:
        with _gathered([unit for unit in units if unit not in head]):
            yield
    finally:
        del order[before:]
        for group in groups:
            group._post_forward_indices = [i for i in group._post_forward_indices if i < before]


def output_layer_gathered(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a model's forward: embedding and output layer are gathered for the whole call."""

    @functools.wraps(forward)
    def wrapped(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        units = _units([self.get_input_embeddings(), self.get_output_embeddings()])
        if not units:
            return forward(self, *args, **kwargs)
        # The output layer's own forward never runs, so FSDP2 would not gather it for the backward.
        output = units[-1] if torch.is_grad_enabled() else None
        with _gathered(units, leave=output):
            return forward(self, *args, **kwargs)

    return wrapped


def put_shards_back(model: nn.Module) -> None:
    """Drop what FSDP2 has gathered, so that ``model.parameters()`` are the shards."""
    for unit in _units(model.modules()):
        unit.reshard()
