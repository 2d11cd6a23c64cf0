"""A decoder from ``model.config``: its configuration checked, and tried before it is trained."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from quietstar.errors import UserError, blaming, did_you_mean
from quietstar.values import leaves

# By their common names; a family may call them otherwise (n_embd).
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)


def decoder_config(fields: dict[str, Any], vocabulary: int, ids: dict[str, Any]) -> PretrainedConfig:
    """The configuration that ``model.config`` describes.

    Args:
        fields: ``model_type`` and fields of its configuration.
        vocabulary: tokens of the tokenizer, the least that ``vocab_size`` may be and its default.
        ids: of the tokenizer's special tokens, where ``fields`` does not set them.

    Raises:
        UserError: for a field that the configuration does not know, or a value that it cannot have.
    """
    fields = {key: value for key, value in fields.items() if (key, value) != ("vocab_size", None)}
    model_type = fields.pop("model_type")
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise UserError(
            f"model.config.model_type is {model_type!r}, which the installed transformers does not know"
        ) from error
    _check_keys(fields, known, "model.config")
    text = known.get_text_config(decoder=True)
    of_text, where = fields, "model.config"
    for name in known.sub_configs:
        if getattr(known, name, None) is text:  # a model for several modalities
            of_text = fields[name] = dict(fields.get(name) or {})
            where = f"model.config.{name}"
            _check_keys(of_text, text, where)
    for name in SIZES:
        key = text.attribute_map.get(name, name)
        for given in {name, key} & set(of_text):
            _check_size(of_text[given], f"{where}.{given}", optional=getattr(text, key, None) is None)
    size = of_text.get("vocab_size", vocabulary)
    if size < vocabulary:
        raise UserError(
            f"model.config.vocab_size is {size} but the tokenizer has {vocabulary} tokens; leave it out"
            " to take the tokenizer's"
        )
    of_text.update({"vocab_size": size, **ids, **of_text})
    try:
        with blaming("model.config"):
            config = AutoConfig.for_model(model_type, **fields)
    except UserError as error:
        raise _named(error, fields) from error.__cause__
    heads, shared = (
        getattr(config.get_text_config(decoder=True), f"num_{kind}_heads", None)
        for kind in ("attention", "key_value")
    )
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise UserError(
            f"{where}.num_key_value_heads is {shared}; expected a divisor of"
            f" num_attention_heads, {heads}"
        )
    return config


def random_decoder(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """A decoder with random weights, tried on two tokens.

    Args:
        config: from :func:`decoder_config`; options: of ``AutoModelForCausalLM.from_config``.

    Raises:
        UserError: if there is no such decoder, or it cannot run or is too large for this machine.
    """
    try:
        with blaming("model.config"), torch.random.fork_rng(devices=[]):
            size, memory = _bytes(config, options), psutil.virtual_memory().total
        if size > memory:
            raise UserError(
                f"model.config makes a decoder of {size / 1e9:.3g} GB; this machine has"
                f" {memory / 1e9:.3g} GB of memory"
            )
        with blaming("model.config"):
            decoder = AutoModelForCausalLM.from_config(config, **options)
            training = decoder.training
            decoder.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                decoder(torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
            decoder.train(training)
    except UserError as error:
        raise _named(error, config.to_dict()) from error.__cause__
    return decoder


def _check_keys(fields: dict[str, Any], known: PretrainedConfig, where: str) -> None:
    """Raise for unknown keys: configurations accept any, and a misspelt size would go unnoticed."""
    for key in fields:
        if not hasattr(known, key):
            names = [n for n in known.to_dict() if not n.startswith("_")]
            hint = did_you_mean(key, names)
            raise UserError(f"unknown key {key!r} in {where} ({known.model_type}){hint}")


def _check_size(value: Any, name: str, optional: bool) -> None:
    if (optional and value is None) or isinstance(value, list):  # one per layer
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {value!r}; expected a whole number >= 1")


def _bytes(config: PretrainedConfig, options: dict[str, Any]) -> int:
    try:
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(config, **options)
    except Exception:  # it is said where the decoder is made in earnest
        return 0
    return sum(p.numel() * p.element_size() for p in shape.parameters())


def _named(error: UserError, fields: dict[str, Any]) -> UserError:
    """The same error, naming the field where the cause is that a name in it is not known."""
    cause = error.__cause__
    if isinstance(cause, KeyError) and cause.args:
        for path, value in leaves(fields):
            if value == cause.args[0]:
                return UserError(
                    f"model.config.{path} is {value!r}, which the installed transformers does not know"
                )
    return error
