"""What linear layers gave in the rollout, taken again by the packed pass.

The packed pass runs the text and every slot. Most of these rows were run by the rollout, with the same
inputs: the text, and the slots that thought tokens were drawn from (4,608 of 7,168 rows at the paper's
settings), and products with weights are most of either pass. With ``reuse_rollout`` the linear layers
inside the decoder's layers keep what they give in the rollout; in the packed pass they multiply the
other rows alone, and put both together. Backward is that of an ordinary layer.

It costs the memory of the kept outputs while a step is under way (Mistral-7B at the paper's settings:
13 GB), freed layer by layer unless a CUDA graph holds them. Layers that are more than a product
(quantised, hooked) or do not take one row per token (experts) are run as always, and with gradient
checkpointing, where memory is short, nothing is kept. liger-kernel's rotary embeddings write over what a
layer gave, so the two exclude each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from quietstar.thinking.linear_layers import is_plain_linear
from quietstar.thinking.text_part import decoder_layers

Record = dict[nn.Module, list[tuple[Tensor, int]]]


@dataclass
class KeptOutputs:
    """The outputs of linear layers for the first rows of a packed sequence.

    Attributes:
        parts: by layer, [B, rows, out] of every pass of the rollout, in order.
        rows: how many rows each pass had.
        are_current: whether the memory still holds them; a CUDA graph overwrites it when it is replayed.
    """

    parts: dict[nn.Module, list[Tensor]]
    rows: tuple[int, ...]
    are_current: Callable[[], bool] = lambda: True

    @classmethod
    def of(cls, record: Record, rows: tuple[int, ...]) -> KeptOutputs:
        """What a record holds, but for outputs that were changed in place behind their layer, and of
        layers that did not run once in every pass, with a row per token."""
        parts = {
            layer: [output for output, _ in made]
            for layer, made in record.items()
            if [tuple(output.shape[1:-1]) for output, _ in made] == [(count,) for count in rows]
            and all(output._version == version for output, version in made)
        }
        return cls(parts, rows)

    def followed_by(self, later: KeptOutputs) -> KeptOutputs:
        """With the outputs of later passes."""
        both = self.parts.keys() & later.parts.keys()
        parts = {layer: self.parts[layer] + later.parts[layer] for layer in both}
        return KeptOutputs(parts, self.rows + later.rows, later.are_current)

    def of_rows(self, rows: slice) -> KeptOutputs:
        """Those of some texts of the batch."""
        parts = {layer: [part[rows] for part in made] for layer, made in self.parts.items()}
        return KeptOutputs(parts, self.rows, self.are_current)

    def output(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """A layer's output for all rows of the packed sequence; asked again, all are multiplied."""
        known = self.parts.pop(layer, None)
        whole = x.dim() == 3 and x.shape[1] > sum(self.rows)
        if known is None or not whole or len(x) != len(known[0]) or not self.are_current():
            return nn.Linear.forward(layer, x)
        weight: Tensor = layer.weight
        bias: Tensor | None = layer.bias
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        output: Tensor = _KnownRows.apply(x, weight, bias, *known)
        return output


class KeptLinear:
    """The forward of a linear layer that can keep its outputs, or take them."""

    def __init__(self, layer: nn.Linear):
        self.layer = layer

    # What happens here changes from pass to pass, behind the back of torch.compile.
    @torch.compiler.disable
    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        taken: KeptOutputs | None = getattr(_this_thread, "taken", None)
        if taken is not None:
            return taken.output(layer, x)
        output = nn.Linear.forward(layer, x)
        record: Record | None = getattr(_this_thread, "record", None)
        if record is not None:
            record.setdefault(layer, []).append((output, output._version))
        return output


_this_thread = threading.local()


@contextmanager
def keeping() -> Iterator[Record]:
    """Every output of the layers in the block goes into the record."""
    record: Record = {}
    before = getattr(_this_thread, "record", None)
    _this_thread.record = record
    try:
        yield record
    finally:
        _this_thread.record = before


@contextmanager
def taking(kept: KeptOutputs | None) -> Iterator[None]:
    """In the block layers whose outputs were kept multiply the rows that follow them only."""
    _this_thread.taken = kept
    try:
        yield
    finally:
        _this_thread.taken = None


class _KnownRows(torch.autograd.Function):
    """F.linear(x, weight, bias) of x [B, L, in] whose first rows are known; gradients of all rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *known: Tensor) -> Tensor:
        # As F.linear does: what a frozen weight or a first layer does not need is not held.
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None
        )
        first = sum(part.shape[1] for part in known)
        return torch.cat([*known, F.linear(x[:, first:], weight, bias)], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *known = ctx.needs_input_grad
        rows = dout.flatten(0, 1)
        return (
            dout @ weight if needs_x else None,
            rows.T @ x.flatten(0, 1) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
            *(None for _ in known),
        )


NOT_WITH_LIGER = (
    "reuse_rollout is on, but liger-kernel overwrites what linear layers gave; expected one of them"
    " (fused_layers 'compile' goes with reuse_rollout)"
)


def reuse_rollout(decoder: PreTrainedModel, on: bool) -> int:
    """Let the decoder's linear layers keep what they give in a rollout for the packed pass, or stop it.

    Before the model is sharded: a sharded layer does not.

    Returns:
        How many layers do.
    """
    count = 0
    for layer in _linears(decoder):
        if isinstance(vars(layer).get("forward"), KeptLinear):
            del layer.forward
        if on and is_plain_linear(layer):
            layer.forward = KeptLinear(layer)  # type: ignore[method-assign]
            count += 1
    return count


def keeps_outputs(decoder: PreTrainedModel) -> bool:
    """Whether a rollout of this decoder is to keep outputs."""
    return takes_rollout(decoder) and not any(map(_checkpoints, decoder.modules()))


def takes_rollout(decoder: PreTrainedModel) -> bool:
    """Whether :func:`reuse_rollout` is on."""
    return any(isinstance(vars(layer).get("forward"), KeptLinear) for layer in _linears(decoder))


def _checkpoints(module: nn.Module) -> bool:
    """transformers' checkpointing, or the wrapper that accelerate puts around FSDP2's layers."""
    wrapped = type(module).__name__ == "CheckpointWrapper"
    return wrapped or bool(getattr(module, "gradient_checkpointing", False))


def _linears(decoder: PreTrainedModel) -> list[nn.Linear]:
    layers = decoder_layers(decoder)
    return [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
