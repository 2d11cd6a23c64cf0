"""A decoder in numbers, counted from its configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from quietstar.plan.hybrids import Hybrid
from quietstar.thinking.recurrent.mixers import hands_states_on, layers_of_both_kinds, mixer_of
from quietstar.thinking.text_part import decoder_layers


@dataclass(frozen=True)
class Sizes:
    """A decoder in numbers: widths, layers, parameters.

    Attributes:
        attending: layers that attend.
        linears, linear: how many linear layers there are, and their weights; ``outputs`` is what they
            give for a row, ``ends`` what they take and give.
        hybrid: where some layers hand states on; ``inner`` is then the widest output beside them.
        experts: whether some layers have them.
    """

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
    attending: int
    linears: int
    outputs: int
    ends: int
    hybrid: Hybrid | None = None
    experts: bool = False

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


def _widest_outside_mixers(decoder: PreTrainedModel) -> int:
    """The MLPs' inner size, which some configurations do not say."""
    layers = decoder_layers(decoder)
    mixers = [mixer for layer in layers if (mixer := mixer_of(layer)) is not None]
    inside = {id(part) for mixer in mixers for part in mixer.modules()}
    parts = [part for layer in layers for part in layer.modules() if id(part) not in inside]
    return max(part.out_features for part in parts if isinstance(part, nn.Linear))


def outline(config: PretrainedConfig) -> PreTrainedModel:
    """A decoder without weights."""
    with torch.device("meta"):
        decoder: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return decoder


def decoder_sizes(config: PretrainedConfig, decoder: PreTrainedModel | None = None) -> Sizes:
    """Count a decoder from its configuration; no weight is made.

    Args:
        decoder: its :func:`outline`, if that has been made.
    """
    decoder = outline(config) if decoder is None else decoder
    embeddings = {id(p): p for p in decoder.get_input_embeddings().parameters()}
    embeddings |= {id(p): p for p in decoder.get_output_embeddings().parameters()}
    every = sum(p.numel() for p in {id(p): p for p in decoder.parameters()}.values())
    outer = sum(p.numel() for p in embeddings.values())
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    linears = [m for m in decoder.base_model.modules() if isinstance(m, nn.Linear)]
    hybrid = Hybrid(config) if hands_states_on(decoder) else None
    inner = config.intermediate_size if hybrid is None else _widest_outside_mixers(decoder)
    return Sizes(
        width=config.hidden_size,
        inner=inner,
        layers=config.num_hidden_layers,
        heads=heads,
        query=heads * head_dim,
        key=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        vocabulary=config.vocab_size,
        body=every - outer,
        embeddings=outer,
        head_dim=head_dim,
        linear=sum(m.weight.numel() for m in linears),
        attending=len(layers_of_both_kinds(decoder)[0]),
        linears=len(linears),
        outputs=sum(m.out_features for m in linears),
        ends=sum(m.out_features + m.in_features for m in linears),
        hybrid=hybrid,
        # Of several experts in one parameter; a convolution's weight has three dimensions, too.
        experts=any(p.dim() == 3 and p.shape[1] > 1 for p in decoder.parameters()),
    )
