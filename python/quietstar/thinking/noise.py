"""Noise: what a network draws at random in training mode, found and switched off.

A thought is sampled in one pass and scored in another, so both have to be the same network, and dropout
makes each pass another one. Checkpoints bring it (attention, residual and embedding dropout, layer
drop, a router's jitter), and so do adapters (LoRA dropout), often after the model was wrapped. Hence it
is looked for whenever a pass in training mode begins, whoever trains, and switched off where it acts:

- probabilities, in modules (``nn.Dropout``) or in attributes (``self.attention_dropout``), become 0;
- a router with jitter is kept in evaluation mode, because some use the same number there as well.

The configuration stays as it is: a decoder that is saved keeps its dropout for whoever trains it without
thoughts.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from quietstar.thinking.fsdp2 import decoder_gathered
from quietstar.thinking.output_layer import output_layer
from quietstar.thinking.text_part import kind_of, text_body

if TYPE_CHECKING:
    from quietstar.modeling.model import QuietStarForCausalLM

logger = logging.getLogger("quietstar")

# A Trainer's hook puts noise of this size on the embeddings.
_NEFTUNE = "neftune_noise_alpha"
_PROBE_TOKENS = 16


class Probability(NamedTuple):
    """What a module draws with: an entry of its attributes, or of a dictionary among them."""

    values: dict[str, Any]
    key: str
    described: str


def find_probabilities(model: nn.Module) -> Iterator[Probability]:
    """Every dropout probability above 0 in a model and in what was put into it."""
    for module in model.modules():
        kind, attributes = type(module).__name__, vars(module)
        # torch's own dropout modules, and those of others that are named like them.
        names = [n for n in attributes if "drop" in n or (n == "p" and "drop" in kind.lower())]
        for name in names:
            inner = attributes[name]
            # peft: a probability for every adapter.
            values, keys = (inner, list(inner)) if isinstance(inner, dict) else (attributes, [name])
            for key in keys:
                if _is_positive(values[key]):
                    yield Probability(values, key, f"{kind}.{name} = {values[key]:g}")


def find_jitter(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every module that has a setting for jitter, with that setting, or "" where it is 0."""
    for module in model.modules():
        settings = {name: value for name, value in vars(module).items() if "jitter" in name}
        if settings:
            on = [f"{name} = {value:g}" for name, value in settings.items() if _is_positive(value)]
            yield module, f"{type(module).__name__}.{on[0]}" if on else ""


def settle_noise(model: QuietStarForCausalLM, input_ids: Tensor) -> None:
    """Switch off what a model draws at random in training mode, or reject it with an error.

    Args:
        input_ids: [B, N] of the pass; its first tokens are tried once.

    Raises:
        ValueError: for noise that was asked for, and for noise that cannot be switched off.
    """
    config = model.config
    for module in model.modules():
        alpha = vars(module).get(_NEFTUNE)
        if alpha and config.thinks:
            raise ValueError(refusal_of_neftune(alpha))
    if not config.disable_dropout and not config.thinks:
        return
    found = list(find_probabilities(model))
    jitter = list(find_jitter(model))
    jittered = [described for _, described in jitter if described]
    if not config.disable_dropout:
        if found or jittered:
            raise ValueError(
                "disable_dropout is False and the network draws at random in training mode"
                f" ({_count([s.described for s in found] + jittered)}); expected True, because a thought"
                " has to be scored by the network that sampled it (or thought_kind 'none')"
            )
    else:
        for source in found:
            source.values[source.key] = 0.0
        for module, _ in jitter:
            module.training = False
        new = [s.described for s in found] + jittered[model._routers_reported :]
        model._routers_reported = max(model._routers_reported, len(jittered))
        if new:
            logger.warning(
                "dropout and other noise is switched off in %d places, because a thought has to be"
                " scored by the network that sampled it (disable_dropout): %s",
                len(new),
                _count(new),
            )
    if config.thinks and model._noise_probed != (seen := _fingerprint(model)):
        _probe(model, input_ids[:1, :_PROBE_TOKENS])
        model._noise_probed = seen


def _fingerprint(model: nn.Module) -> int:
    """Changes with every module and hook that is put into a model or taken out of it."""
    return hash(
        tuple((id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules())
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The block runs in evaluation mode, and every module goes back to the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def refusal_of_neftune(alpha: float) -> str:
    """The error message for noise on the embeddings, which only a user asks for."""
    return (
        f"{_NEFTUNE} is {alpha}; expected none with thoughts, because a thought has to be scored by the"
        " network that sampled it"
    )


@torch.no_grad()
def _probe(model: QuietStarForCausalLM, input_ids: Tensor) -> None:
    """Reject a decoder that still draws and whose passes differ (code that is not known here)."""
    decoder = model.base
    devices = [input_ids.device] if input_ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices), decoder_gathered(decoder):
        passes, states = [], [_states(input_ids.device)]
        for _ in range(2):
            # As check_logits does, the decoder's ordinary pass; then what thoughts do with its result.
            hidden = text_body(decoder)(input_ids=input_ids, use_cache=False).last_hidden_state[0]
            _, weight = model.mixing_head(hidden, hidden, model.config.mixing_activation)
            logits = output_layer(decoder).logits(hidden)
            passes.append(torch.cat([hidden.float(), weight.float(), logits.float()], dim=1))
            states.append(_states(input_ids.device))
            if len(passes) == 1 and all(map(torch.equal, *states)):
                return
    if not torch.equal(*passes):
        raise ValueError(
            f"{kind_of(decoder)} draws at random in training mode, in a way that"
            " is not known here and that disable_dropout cannot switch off; a thought has to be scored"
            " by the network that sampled it"
        )


def _states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _count(described: list[str]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in Counter(described).items())
