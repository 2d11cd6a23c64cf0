"""Weights of sharded models and of adapters, saved and read whole.

They are gathered one by one, so that only one process ever holds all of them, and read from the same
files as without sharding. ``torch.distributed.checkpoint.state_dict`` does not replace this: it gathers
tied weights into two tensors, and loads a whole state dict whose keys an adapter's file does not have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from quietstar.checkpoints.state import full_on_cpu, parameter_names, sharded_like


def full_weights(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The state dict of a model, gathered on the CPU; on every process.

    Args:
        keep: False on a process that only takes part in the gathering; its result is empty.
    """
    gathered: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in model.state_dict().items():
        # Tied weights are one parameter under two names, and have to stay one tensor.
        key = id(parameters.get(name, value))
        if key not in gathered:
            full = full_on_cpu(value)
            gathered[key] = full if keep else torch.empty(0)
        if keep:
            weights[name] = gathered[key]
    return weights


def load_full_weights(folder: Path, model: nn.Module) -> None:
    """Copy a checkpoint's weights into a sharded model.

    Raises:
        ValueError: if the checkpoint lacks a weight that is trained.
    """
    names = parameter_names(model)
    # An adapter's file leaves out the adapter's name.
    by_name: dict[str, Tensor] = {
        name.replace("modules_to_save.default.", "").replace(".default.", "."): parameter
        for parameter, name in names.items()
    }
    targets = {**dict(model.named_buffers()), **by_name}
    missing = {names[p] for p in names if p.requires_grad}
    for path in [*folder.glob("model*.safetensors"), *folder.glob("adapter_model*.safetensors")]:
        with safe_open(path, "pt") as file, torch.no_grad():
            for name in file.keys():  # noqa: SIM118 - not a mapping
                target = targets.get(name)
                if target is None:
                    continue
                value = sharded_like(file.get_tensor(name).to(target.dtype), target)
                if isinstance(target, DTensor) and isinstance(value, DTensor):
                    target.to_local().copy_(value.to_local())
                else:
                    target.copy_(value)
                if isinstance(target, nn.Parameter):
                    missing.discard(names[target])
    if missing:
        raise ValueError(f"{folder} has no weight {min(missing)!r}; it belongs to another model")


@contextmanager
def without_embeddings(model: Any) -> Iterator[None]:
    """Within the block an adapter is saved without its decoder's tables, which loading makes again.

    peft would save them whole, and look for the number of tokens in the decoder's own configuration as
    if it were one of a model with thoughts.
    """
    if not hasattr(model, "peft_config"):
        yield
        return
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    try:
        yield
    finally:
        del model.save_pretrained
