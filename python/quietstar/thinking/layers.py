"""The two small layers that a model with thoughts has beside its decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from quietstar.config import check_mixing_weight
from quietstar.thinking.linear_layers import call_linear, input_dtype, is_plain_linear
from quietstar_ext import mixing_head


class ThoughtEmbedding(nn.Module):
    """The embeddings of the two meta tokens, stored divided by ``embedding_scale``.

    A module of its own, so that adapters can save it whole (peft's ``modules_to_save``).
    ``start``, ``end``: [d].
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(hidden_size))
        self.end = nn.Parameter(torch.zeros(hidden_size))

    def reset_parameters(self, std: float) -> None:
        """Draw both with a standard deviation."""
        nn.init.normal_(self.start, std=std)
        nn.init.normal_(self.end, std=std)

    def forward(self, scale: float) -> tuple[Tensor, Tensor]:
        """Both embeddings at the size in which they are used."""
        return self.start * scale, self.end * scale


class MixingHead(nn.Module):
    """The network that decides how much a prediction listens to its thought.

    An MLP 2d -> d -> ReLU -> d -> ReLU -> 1 on [base ; thought]; the last layer has no bias and starts
    at zero, so that an untrained head leaves the base prediction as it is (with the identity
    activation).
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(2 * hidden_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.fc3 = nn.Linear(hidden_size, 1, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Torch's own initialisation, with the last layer at zero."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()
        nn.init.zeros_(self.fc3.weight)

    @torch.no_grad()
    def start_at(self, weight: float | None, activation: str) -> None:
        """Let an untrained head give every thought this weight (before a floor); None changes nothing.

        A hidden unit that is 1 whatever comes in stands for the bias that the last layer lacks, as the
        paper's does: checkpoints and operators stay as they are. It is trained like any other unit, and
        weight decay pulls at it like at any.

        Raises:
            ValueError: see :func:`quietstar.config.check_mixing_weight`.
        """
        check_mixing_weight(weight, activation)
        if weight is None:
            return
        self.fc2.weight[-1] = 0.0
        self.fc2.bias[-1] = 1.0
        level = math.log(weight / (1 - weight)) if activation == "sigmoid" else weight
        self.fc3.weight[0, -1] = float(level)

    def forward(
        self,
        base: Tensor,
        thought: Tensor,
        activation: str,
        base_index: Tensor | None = None,
        floor: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """base [P, d], thought [rows, d], base_index [rows] -> mixed [rows, d], weight [rows, 1].

        With a floor f the head's weight w becomes f + (1 - f) w.
        """
        dtype = input_dtype(self.fc1)
        if dtype is not None and not torch.is_autocast_enabled(base.device.type):
            # An adapter's head is in fp32 on a decoder in bf16.
            base, thought = base.to(dtype), thought.to(dtype)
        if self._is_its_weights():
            first, second = (self.fc1.weight, self.fc1.bias), (self.fc2.weight, self.fc2.bias)
            weights = (*first, *second, self.fc3.weight)
            mixed, weight = mixing_head(base, thought, *weights, activation, base_index=base_index)
        else:
            mixed, weight = self._called(base, thought, activation, base_index)
        if floor:
            # (1 - w') b + w' z, w' = f + (1 - f) w, is the mixture moved towards z by the share f.
            mixed, weight = mixed.lerp(thought.to(mixed.dtype), floor), floor + (1 - floor) * weight
        return mixed, weight

    def _is_its_weights(self) -> bool:
        if not all(map(is_plain_linear, self.children())):
            return False
        biases = [layer.bias is not None for layer in (self.fc1, self.fc2, self.fc3)]
        return biases == [True, True, False]

    def _called(
        self, base: Tensor, thought: Tensor, activation: str, base_index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same from the layers' own forwards, where one is more than its weight and bias."""
        if base_index is not None:
            base = base[base_index]
        hidden = call_linear(self.fc1, torch.cat([base, thought], dim=-1)).relu()
        weight = call_linear(self.fc3, call_linear(self.fc2, hidden).relu()).to(base.dtype)
        if activation == "sigmoid":
            weight = weight.sigmoid()
        return base.lerp(thought, weight), weight
