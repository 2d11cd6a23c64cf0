"""A decoder in numbers, counted from its configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig


@dataclass(frozen=True)
class Sizes:
    """A decoder in numbers: widths, layers, parameters."""

    width: int
    inner: int
    layers: int
    heads: int
    query: int
    key: int
    vocabulary: int
    body: int
    embeddings: int
    head_dim: int
    linear: int

    @property
    def mixing(self) -> int:
        """Parameters of mixing head and thought embeddings."""
        return 3 * self.width**2 + 5 * self.width

    @property
    def counted(self) -> int:
        """The weights of the linear layers that the formulas know: attention and a gated MLP."""
        d = self.width
        return self.layers * d * (2 * self.query + 2 * self.key + 3 * self.inner)

    @property
    def all(self) -> int:
        """Every parameter."""
        return self.body + self.embeddings + self.mixing


def decoder_sizes(config: PretrainedConfig) -> Sizes:
    """Count a decoder from its configuration; no weight is made."""
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(config)
    embeddings = {id(p): p for p in decoder.get_input_embeddings().parameters()}
    embeddings |= {id(p): p for p in decoder.get_output_embeddings().parameters()}
    every = sum(p.numel() for p in {id(p): p for p in decoder.parameters()}.values())
    outer = sum(p.numel() for p in embeddings.values())
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    linear = sum(m.weight.numel() for m in decoder.base_model.modules() if isinstance(m, nn.Linear))
    return Sizes(
        width=config.hidden_size,
        inner=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=heads,
        query=heads * head_dim,
        key=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        vocabulary=config.vocab_size,
        body=every - outer,
        embeddings=outer,
        head_dim=head_dim,
        linear=linear,
    )
