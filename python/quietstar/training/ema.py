"""EMA: a copy of the model that follows slowly, for the reward ``information-gain``.

RLP (Hatamizadeh et al. 2025, arXiv 2510.01265, section 2.1): the copy starts as the model before
training and after every optimiser step becomes ``decay * copy + (1 - decay) * model``. What it is asked
for is the base loss of every token, without thoughts; so the mixing head and the thought embeddings have
no copy, nor has anything that is not trained (of a model with adapters only the adapters have one).

The copy is kept in fp32, at least: in bf16 a step of (1 - 0.999) of a difference is rounded away. It has
no module of its own: its values take the parameters' place for one pass over the text without gradients
(a second copy of the parameters is held during it) and are taken out again. So it works wherever the
model does, FSDP included, where it is sharded like the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quietstar.checkpoints.state import gathered, sharded_like
from quietstar.config import QuietStarConfig
from quietstar.thinking.batch_share import BatchShard
from quietstar.thinking.documents import TEXT
from quietstar.thinking.fsdp2 import put_shards_back
from quietstar.training.schedule import Schedule
from quietstar_ext.precision import compute_dtype

FILE_NAME = "ema.safetensors"
# Parts of the model that the prediction without a thought does not use.
_NOT_COPIED = ("mixing_head.", "thought_embedding.")
_TEXT = (*TEXT, "labels")


class EmaCopy:
    """The averaged copy.

    Args:
        model: unwrapped; the copy starts with its values.
        decay: from 0 (the model itself) to below 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.values = {name: p.detach().clone().to(compute_dtype(p.dtype)) for name, p in _copied(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Follow the model, after an optimiser step."""
        for name, parameter in _copied(model):
            value = self.values[name]
            value.mul_(self.decay).add_(parameter.detach().to(value.dtype), alpha=1 - self.decay)

    @torch.no_grad()
    def base_losses(self, model: nn.Module, unwrapped: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Loss of every token but the first without thoughts, [B, N-1]; 0 where a token does not count.

        Args:
            model: as it is called in training; unwrapped: the one inside, whose ``config`` is ours.
            inputs: of the training batch; the text is taken from them.
        """
        config, training = unwrapped.config, model.training
        kind = config.thought_kind
        with self._in_place(unwrapped):
            try:
                config.thought_kind = "none"
                model.eval()
                text = {key: inputs[key] for key in _TEXT if inputs.get(key) is not None}
                # Perhaps one part of several, and without a target; its means are not asked for.
                output = model(**text, batch_part=BatchShard())
            finally:
                model.train(training)
                config.thought_kind = kind
        losses: Tensor = output.base_losses
        return losses

    @contextmanager
    def _in_place(self, model: nn.Module) -> Iterator[None]:
        parameters = dict(_copied(model))
        own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.copy_(self.values[name])
            yield
        finally:
            # FSDP may still hold what it gathered, which is the copy's.
            put_shards_back(model)
            for name, parameter in parameters.items():
                parameter.copy_(own[name])

    def save(self, folder: str | Path, *, write: bool = True) -> None:
        """Put the copy into a checkpoint; every process calls, one has ``write``."""
        full = gathered(self.values.items(), keep=write)
        if write:
            save_file(full, Path(folder) / FILE_NAME)

    def load(self, folder: str | Path) -> None:
        """Take the copy from a checkpoint.

        Raises:
            ValueError: if it has none, or one of another model.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {FILE_NAME}; expected a checkpoint of training with the reward"
                " 'information-gain'"
            )
        found = load_file(path)
        for name, value in self.values.items():
            if name not in found or found[name].shape != value.shape:
                raise ValueError(f"{path} has no tensor that fits {name!r}; it belongs to another model")
            value.copy_(sharded_like(found[name].to(value.dtype), value))


def asks_for_copy(config: QuietStarConfig, schedule: Schedule | None = None) -> bool:
    """Whether training measures against the copy: now, or with a schedule at any of its stages."""
    kinds = [config.thought_kind]
    if schedule is not None:
        kinds = [stage.get("thought_kind", config.thought_kind) for stage in schedule.settings]
    return config.reward == "information-gain" and "sampled" in kinds


def _copied(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that have a copy; with FSDP the shards."""
    put_shards_back(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(part in name for part in _NOT_COPIED):
            yield name.replace("_orig_mod.", ""), parameter
