"""Decoder layers whose small operations run as fused kernels: norms, rotary, gates, residual adds.

Unfused they were 20 to 30 per cent of a training step's device time on an H200
(benchmarks/results/nvidia-h200.json). Two ways, neither of which changes a weight or its name:

- ``"compile"``: torch.compile, layer by layer, for passes with thoughts. The attention function stays
  outside: between it and the next one everything of a layer is one graph, and all layers of a kind share
  what is compiled.
- ``"liger"``: liger-kernel's Triton kernels, for the families that it knows, on CUDA. Its gated MLP
  overwrites what it has saved for the backward pass, so a second one through the same graph would be
  wrong. It does not go with ``reuse_rollout``, and cannot be taken off a decoder again.

A compiled backward pass may overwrite what was kept for it, too (torch's "donated buffers"; which of two
settings a compilation on disk was made with is not looked at). So ``policy_max_grad_norm``, which goes
through a graph twice, runs with neither.

Under CUDA graphs (:mod:`quietstar.thinking.cuda_graphs`) either is captured: compiled by the run that
comes before a capture.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.thinking.checkpointing import CHECKPOINT, keeps_products
from quietstar.thinking.kept_outputs import NOT_WITH_LIGER, takes_rollout
from quietstar.thinking.layout import ThoughtLayout
from quietstar.thinking.recurrent.mixers import hands_states_on
from quietstar.thinking.text_part import decoder_layers, kind_of, text_body, text_config_of

logger = logging.getLogger("quietstar")

WAYS = ("auto", "compile", "liger", "off")
# Of one piece of code: with and without gradients, one length or any, dtypes, kinds of layers.
RECOMPILE_LIMIT = 64
HIDES_PRODUCTS = "a compiled layer hides its products and computes small operations again by itself"
_LIGER_ATTRIBUTE = "_quietstar_liger"


class FusedForward:
    """A layer's forward that is compiled for passes with thoughts, and its own for all others.

    Those with a cache have shapes that grow, and look at the number of the layer, which would be
    compiled for every layer anew.
    """

    def __init__(self, layer: nn.Module, cuda_only: bool):
        self._layer, self.cuda_only = layer, cuda_only
        self._compiled: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What is compiled cannot be pickled.
        return {**vars(self), "_compiled": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layout = kwargs.get("thought_layout")
        if not isinstance(layout, ThoughtLayout) or (self.cuda_only and not layout.anchors.is_cuda):
            return type(self._layer).forward(self._layer, *args, **kwargs)
        layout.apart = True
        if self._compiled is None:
            self._compiled = torch.compile(type(self._layer).forward)
        return self._compiled(self._layer, *args, **kwargs)


def fuse_layers(decoder: PreTrainedModel, way: str = "auto") -> None:
    """Let a decoder's layers run fused, or no longer.

    Args:
        way: ``"compile"``, ``"liger"``, ``"off"``, or ``"auto"``: compiled wherever the decoder is on a
            CUDA device and can be, else as it is.

    Raises:
        ValueError: for another way, or one that does not fit the decoder.
        ImportError: for ``"liger"`` without liger-kernel.
    """
    if way not in WAYS:
        raise ValueError(f"fused_layers is {way!r}; expected one of {', '.join(WAYS)}")
    if way != "liger" and uses_liger(decoder):
        raise ValueError(f"fused_layers is {way!r}, but liger-kernel is in the decoder's layers already")
    for layer in decoder_layers(decoder):
        if isinstance(vars(layer).get("forward"), FusedForward):
            del layer.forward
    if way == "liger":
        if not uses_liger(decoder):
            _apply_liger(decoder)
    elif way != "off":
        reason = _not_compilable(decoder)
        if way == "auto" and getattr(decoder, "hf_quantizer", None) is not None:
            reason = reason or "its weights are quantized, which was not tried compiled"
        if reason is None:
            _compile(decoder, cuda_only=way == "auto")
        elif way == "compile":
            raise ValueError(f"fused_layers is 'compile', but {reason}")
        elif torch.cuda.is_available():  # elsewhere nothing would be fused
            logger.info("the layers are not fused: %s", reason)


def unfused_for(decoder: PreTrainedModel, option: str, why: str, liger: bool = False) -> None:
    """An option that fused layers do not go with: those of ``"auto"`` go off.

    Args:
        option: its name and value in half a sentence; why: the rest, behind the layers' way.
        liger: whether liger-kernel is going to be taken.

    Raises:
        ValueError: if the layers were asked to be fused.
    """
    forwards = (vars(layer).get("forward") for layer in decoder_layers(decoder))
    compiled = [forward for forward in forwards if isinstance(forward, FusedForward)]
    way = "liger" if liger or uses_liger(decoder) else "compile"
    if way == "compile" and (not compiled or compiled[0].cuda_only):
        return fuse_layers(decoder, "off")
    raise ValueError(f"{option} and fused_layers is {way!r}, {why}; expected fused_layers 'off'")


def uses_liger(decoder: PreTrainedModel) -> bool:
    """Whether liger-kernel is in the decoder's layers."""
    return bool(getattr(decoder, _LIGER_ATTRIBUTE, False))


def _not_compilable(decoder: PreTrainedModel) -> str | None:
    """Half a sentence on why the layers cannot be compiled."""
    layers = decoder_layers(decoder)
    if not layers:
        return f"{kind_of(decoder)} has its layers in no list"
    if hands_states_on(decoder):
        return f"layers of {kind_of(decoder)} hand states on, which was not tried compiled"
    if any(keeps_products(getattr(layer, CHECKPOINT, None)) for layer in layers):
        return f"checkpointing keeps products, and {HIDES_PRODUCTS}"
    if any("forward" in vars(layer) for layer in layers):
        return f"the forward of {type(layers[0]).__name__} was replaced (by accelerate's hooks, for one)"
    return None


def _compile(decoder: PreTrainedModel, cuda_only: bool) -> None:
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
    for layer in decoder_layers(decoder):
        layer.forward = FusedForward(layer, cuda_only)


def _apply_liger(decoder: PreTrainedModel) -> None:
    if takes_rollout(decoder):
        raise ValueError(f"fused_layers is 'liger' and {NOT_WITH_LIGER}")
    if any(keeps_products(getattr(layer, CHECKPOINT, None)) for layer in decoder_layers(decoder)):
        raise ValueError(
            "fused_layers is 'liger' and checkpointing keeps products, which liger-kernel overwrites;"
            " expected one of them"
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise ImportError("fused_layers is 'liger', which needs liger-kernel (pip install liger-kernel)")
    from liger_kernel.transformers import monkey_patch

    if text_config_of(decoder.config).model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"fused_layers is 'liger', which does not know {kind_of(decoder)}; expected 'compile'"
        )
    home: Any = sys.modules[type(text_body(decoder)).__module__]
    rotary = getattr(home, "apply_rotary_pos_emb", None)
    # The losses are the operators' own.
    monkey_patch._apply_liger_kernel_to_instance(
        decoder, cross_entropy=False, fused_linear_cross_entropy=False
    )
    fused = getattr(home, "apply_rotary_pos_emb", None)
    if rotary is not None and fused is not None and fused is not rotary:
        # It was replaced for every decoder of the family, also for those that are not on a GPU.
        home.apply_rotary_pos_emb = _where_possible(fused, rotary)
    setattr(decoder, _LIGER_ATTRIBUTE, True)


def _where_possible(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def rotary(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fused if q.is_cuda else plain)(q, *args, **kwargs)

    return rotary
