"""Layers that are not attention, with their own code: only how they hand states on is changed.

A mixer's forward is kept, with its projections, gates and norms. Its convolution and its scan are
functions that it finds among its module's; in passes with a layout it runs with others under their names
(:class:`~quietstar.thinking.recurrent.passes.LayerPass`), and in all other passes as ever. No module of
transformers is changed, and no kernel that stands in for one of these functions (fla, mamba_ssm,
causal_conv1d) can get in.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from quietstar.thinking.layout import HandedKeys, ThoughtLayout
from quietstar.thinking.recurrent.linear_attention import Rows
from quietstar.thinking.recurrent.passes import LayerPass
from quietstar.thinking.text_part import decoder_layers, text_config_of

# Layer types that are ordinary softmax attention over a prefix or a window of it ...
ATTENTION = ("full_attention", "sliding_attention")
# ... those that hand a state from token to token ...
RECURRENT = ("conv", "linear_attention")
# ... those that do both, side by side ...
BOTH = ("hybrid",)
# ... and those that do neither.
ALONE = ("moe", "mlp")
_CACHE_NAMES = ("cache", "cache_params", "past_key_values")

_this_thread = threading.local()


def _now() -> LayerPass:
    found: LayerPass = _this_thread.layer_pass
    return found


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    return _now().convolve(x, weight, bias, activation)


def _gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """query, key [B, L, Hk, K], value [B, L, H, V], g [B, L, H] or, of KDA, [B, L, H, K], beta [B, L, H]
    -> [B, L, H, V]."""
    dtype, groups = query.dtype, value.shape[2] // key.shape[2]
    query, key = query.float(), key.float()
    if options.get("use_qk_l2norm_in_kernel"):
        query, key = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + 1e-6) for t in (query, key))
    query = query * query.shape[-1] ** -0.5
    query, key = (t.repeat_interleave(groups, dim=2).transpose(1, 2) for t in (query, key))
    g = g[..., None] if g.dim() == 3 else g
    decay, beta = g.transpose(1, 2), beta.transpose(1, 2)[..., None]
    out = _now().attend(Rows(query, key, value.transpose(1, 2), decay, beta))
    return out.transpose(1, 2).to(dtype), None


def _mamba2_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any) -> Tensor:
    """x [B, L, H, V], dt [B, L, H], A [H], B and C [B, L, G, K] -> [B, L, H, V] in float32."""
    if options.get("z") is not None:
        raise ValueError("a state space layer gates inside its scan; expected one that gates behind it")
    if (bias := options.get("dt_bias")) is not None:
        dt = dt + bias.to(dt.dtype)
    if options.get("dt_softplus"):
        dt = F.softplus(dt)
    low, high = options.get("dt_limit", (0.0, float("inf")))
    step, x = dt.clamp(low, high).float().transpose(1, 2)[..., None], x.float().transpose(1, 2)
    groups = x.shape[1] // B.shape[2]
    query, key = (t.float().repeat_interleave(groups, dim=2).transpose(1, 2) for t in (C, B))
    rows = Rows(query, key, x * step, A.float()[:, None, None] * step, None)
    out = _now().attend(rows, transposed=True)
    if (skip := options.get("D")) is not None:
        out = out + skip.float()[:, None, None] * x
    return out.transpose(1, 2).contiguous()


def _without_fusing(*_: Any, **__: Any) -> None:
    """A whole layer in one kernel, which would keep what goes from token to token to itself."""


def _not_here(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a layer took a step of one token, which passes with thoughts do otherwise")


# By the name under which a mixer finds its function.
_REPLACED: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolve,
    "causal_conv1d_update": _not_here,
    "torch_chunk_gated_delta_rule": _gated_delta_rule,
    "torch_recurrent_gated_delta_rule": _not_here,
    "chunk_kimi_delta_attention": _gated_delta_rule,
    "recurrent_kimi_delta_attention": _not_here,
    "mamba2_chunk_scan": _mamba2_scan,
    "mamba2_selective_state_update": _not_here,
    "mamba2_split_conv1d_scan_combined": _without_fusing,
}
KNOWN_RECURRENCES = "short convolutions, the gated delta rule, KDA and Mamba-2"
# Names that only a layer has which hands a state on, by what transformers' modules call such functions.
_SIGNS = ("conv1d", "delta", "scan", "recurrent", "state_update")


def _own_forward(mixer: nn.Module) -> FunctionType:
    function: Any = inspect.unwrap(type(mixer).forward)
    return function


def _functions(mixer: nn.Module) -> set[str]:
    """The functions of its module that a layer calls and that look like a recurrence's."""
    function = _own_forward(mixer)
    code = getattr(function, "__code__", None)
    known = getattr(function, "__globals__", {})
    names = {n for n in (code.co_names if code else ()) if callable(known.get(n))}
    return {name for name in names if any(sign in name for sign in _SIGNS)}


def mixer_of(layer: nn.Module) -> nn.Module | None:
    """The part of a layer that hands a state from token to token, if passes with thoughts know how."""
    for module in layer.modules():
        found = _functions(module)
        if found and found <= _REPLACED.keys():
            return module if getattr(module, "layer_idx", None) is not None else None
    return None


class RecurrentForward:
    """A mixer's forward: in passes with a layout with other functions, in all others its own."""

    def __init__(self, mixer: nn.Module):
        self._mixer = mixer
        self._rebuilt: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_rebuilt": None}  # of functions that cannot be pickled

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Where checkpointing runs a layer's forward again, and not its hooks, its mixer is handed the
        # layout.
        mixer, layout = self._mixer, kwargs.pop("thought_layout", None)
        layout = layout or getattr(_this_thread, "layout", None)
        if layout is None:
            return type(mixer).forward(mixer, *args, **kwargs)
        layer: int = mixer.layer_idx  # type: ignore[assignment]
        layout.recurrent_seen[layer] = layout.recurrent_seen.get(layer, 0) + 1
        cache = next((kwargs.pop(name) for name in _CACHE_NAMES if kwargs.get(name) is not None), None)
        # Which text a token sees is the layout's to say, padding included.
        kwargs = {name: value for name, value in kwargs.items() if name not in _CACHE_NAMES}
        kwargs["attention_mask"] = None
        if self._rebuilt is None:
            self._rebuilt = _with_functions(_own_forward(mixer))
        _this_thread.layer_pass = LayerPass(layout, layer, cache)
        try:
            with _weights_of_convolutions(mixer):
                return self._rebuilt(mixer, *args, **kwargs)
        finally:
            del _this_thread.layer_pass


@contextlib.contextmanager
def _weights_of_convolutions(mixer: nn.Module) -> Iterator[None]:
    """Let accelerate, where it puts weights away, bring those of convolutions, which a mixer does not
    call: it hands their weights to a function."""
    hooks = [(part, getattr(part, "_hf_hook", None)) for part in mixer.children()]
    hooked = [(part, hook) for part, hook in hooks if hook is not None and isinstance(part, nn.Conv1d)]
    for part, hook in hooked:
        hook.pre_forward(part)
    try:
        yield
    finally:
        for part, hook in hooked:
            hook.post_forward(part, ())


def _with_functions(forward: FunctionType) -> FunctionType:
    """A copy of a function that finds ours under the names of its module's."""
    names = {**forward.__globals__, **_REPLACED}
    made = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _enter(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    layout = kwargs.get("thought_layout")
    _this_thread.layout = layout if isinstance(layout, ThoughtLayout | HandedKeys) else None


def _leave(layer: nn.Module, args: Any, output: Any) -> None:
    _this_thread.layout = None


def hand_layouts_to_mixers(decoder: PreTrainedModel) -> None:
    """Let the decoder's layers that are not attention take part in passes with a layout."""
    layers = decoder_layers(decoder)
    for index in _handing_on(decoder):
        layer = layers[index]
        mixer = mixer_of(layer)
        if mixer is None:
            continue
        # accelerate's hooks stay around it.
        name = "_old_forward" if "_old_forward" in vars(mixer) else "forward"
        if not isinstance(vars(mixer).get(name), RecurrentForward):
            setattr(mixer, name, RecurrentForward(mixer))
            # Some layers do not pass on to their mixer what they are called with.
            layer.register_forward_pre_hook(_enter, with_kwargs=True)
            layer.register_forward_hook(_leave, always_call=True)


def hands_states_on(decoder: PreTrainedModel) -> bool:
    """Whether some of a decoder's layers do, which passes with thoughts run in their own way."""
    return bool(_handing_on(decoder))


def _handing_on(decoder: PreTrainedModel) -> set[int]:
    types = getattr(text_config_of(decoder.config), "layer_types", None) or []
    return {index for index, kind in enumerate(types) if kind in RECURRENT + BOTH}


def layers_of_both_kinds(decoder: PreTrainedModel) -> tuple[set[int], set[int]]:
    """Which of a decoder's layers have to attend in a pass, and which have to hand states on."""
    config, hand_on = text_config_of(decoder.config), _handing_on(decoder)
    if not hand_on:
        return set(range(config.num_hidden_layers)), hand_on
    return {index for index, kind in enumerate(config.layer_types) if kind in ATTENTION + BOTH}, hand_on
