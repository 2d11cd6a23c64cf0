"""Adapters (LoRA, QLoRA) through peft: build, load, merge.

Trained are low-rank updates of the decoder's linear layers, and whole the mixing head and the thought
embeddings, which are new anyway. An adapter folder holds peft's two files, the tokenizer and
``config.json`` with the thought settings; the decoder stays where it came from. It is opened like a
model (:func:`quietstar.checkpoints.load.load_checkpoint`), and ``quietstar merge`` makes a model of it
that needs neither peft nor the decoder's own folder.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn

from quietstar.config import QuietStarConfig, settings
from quietstar.errors import UserError, blaming
from quietstar.files import is_folder
from quietstar.modeling.pretrained import is_gguf, load_config, load_decoder
from quietstar.thinking.linear_layers import is_plain_linear
from quietstar.thinking.text_part import text_body

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quietstar.modeling.model import QuietStarForCausalLM

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
SAVED_WHOLE = ["mixing_head", "thought_embedding"]


def import_peft() -> Any:
    """peft, or a :class:`UserError` that says how to get it."""
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "adapters need peft, which is not installed: pip install 'quietstar[peft]'"
        ) from error
    return peft


def quantization(kind: str, name: str, revision: str | None = None) -> dict[str, Any]:
    """The options of ``from_pretrained`` that load a decoder quantized; empty for ``none``.

    4-bit NormalFloat with double quantization, computing in bf16: QLoRA (Dettmers et al. 2023,
    arXiv 2305.14314). The output layer, and a mixing head where there is one, stay as they are.

    Args:
        kind: ``none`` or ``4bit``.
        name: of the model, and revision, as ``from_pretrained`` will get them.
    """
    if kind == "none":
        return {}
    if is_gguf(name):
        raise UserError(
            f"adapter.quantize is {kind!r} and {name} a GGUF file, whose weights are unpacked when"
            " they are read; expected adapter.quantize=none, or a model that is no GGUF file"
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"adapter.quantize is {kind!r}, which needs bitsandbytes: pip install 'quietstar[qlora]'"
        ) from error
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with torch.device("meta"):
        config = load_config(name, revision)
        shape = AutoModelForCausalLM.from_config(config)
    head = shape.get_output_embeddings()
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[*(n for n, m in shape.named_modules() if m is head), *SAVED_WHOLE],
    )
    return {"quantization_config": settings}


def target_pattern(model: QuietStarForCausalLM, names: list[str] | None) -> str:
    """A pattern for the names of the decoder's linear layers, the output layer left out.

    Args:
        names: the last parts of their names, e.g. ``["q_proj", "v_proj"]``; None: all there are.

    Raises:
        UserError: names a layer that the decoder does not have.
    """
    from transformers.pytorch_utils import Conv1D

    body = text_body(model.base)  # of a model for several modalities the text's part
    found = {
        name.rpartition(".")[2]
        for name, module in body.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    for name in names or ():
        if name not in found:
            raise UserError(
                f"adapter.targets names {name!r}; expected linear layers of the decoder:"
                f" {', '.join(sorted(found))}"
            )
    prefix = re.escape(next(name for name, module in model.named_modules() if module is body))
    return rf"{prefix}\..*\b(?:{'|'.join(sorted(names or found))})"


def add_adapters(
    model: QuietStarForCausalLM,
    base_name: str,
    *,
    rank: int,
    alpha: int,
    targets: list[str] | None = None,
) -> PeftModel:
    """Freeze a model and give it adapters to train.

    Args:
        base_name: where the decoder can be had again; goes into the adapter's configuration.
        rank: of the updates, which are scaled by ``alpha / rank``.
        targets: last parts of the names of the layers to adapt; None: every linear layer of the decoder.
    """
    peft = import_peft()
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        # Dropout would score a thought by another network than the one that sampled it.
        lora_dropout=0.0,
        target_modules=target_pattern(model, targets),
        modules_to_save=SAVED_WHOLE,
    )
    wrapped = peft.get_peft_model(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = base_name
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            # In bf16 small updates would be rounded away.
            parameter.data = parameter.data.float()
    return wrapped


def grow_embeddings(decoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grow a decoder's embeddings to the tokenizer, the new rows being the mean of the others.

    They are frozen and not saved with an adapter, so they must come out the same at every loading.
    """
    before = decoder.get_input_embeddings().num_embeddings
    if len(tokenizer) <= before:
        return
    if not is_plain_linear(decoder.get_output_embeddings()):
        kind = type(decoder.get_output_embeddings()).__name__
        raise UserError(
            f"the decoder's output layer is a {kind} of {before} tokens, which cannot be given the"
            f" {len(tokenizer) - before} new ones of the tokenizer; expected one that is not quantized"
        )
    decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for layer in (decoder.get_input_embeddings(), decoder.get_output_embeddings()):
        with torch.no_grad():
            layer.weight[before:] = layer.weight[:before].double().mean(0).to(layer.weight.dtype)


def is_adapter(name: str) -> bool:
    """Whether a folder, or a name on the hub, holds an adapter."""
    if is_folder(Path(name)):
        return (Path(name) / CONFIG_FILE).is_file()
    from transformers.utils import cached_file

    return cached_file(name, CONFIG_FILE, _raise_exceptions_for_missing_entries=False) is not None


def load_adapter(name: str, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    """An adapter on its decoder.

    A decoder that was trained on in 4 bits is rounded to these values again, and then held in its own
    dtype: the adapter was fitted to the rounded weights, and can be merged into them without another
    rounding.

    Args:
        name: a folder that ``quietstar train`` wrote, or its name on the hub.

    Raises:
        UserError: if the adapter or its decoder cannot be had, or bitsandbytes where it is needed.
    """
    from transformers.utils import cached_file

    from quietstar.modeling.model import QuietStarForCausalLM

    peft = import_peft()
    with blaming(f"cannot load the adapter {name}"):
        settings = json.loads(Path(cached_file(name, CONFIG_FILE)).read_text(encoding="utf-8"))
        weights = cached_file(name, WEIGHTS_FILE)  # a pickled adapter is not looked at
        config = QuietStarConfig.from_pretrained(name)
        base_name = settings["base_model_name_or_path"]
        # At the top where a model with thoughts was quantized whole.
        rounded = any(getattr(c, "quantization_config", None) for c in (config, config.text_config))
        options = {"dtype": "auto"}
        if rounded:
            options |= {"dtype": config.text_config.dtype, **quantization("4bit", base_name)}
        base = load_decoder(base_name, **options)
    if rounded:
        base = base.dequantize()
    if isinstance(base, QuietStarForCausalLM):
        for key, value in thought_fields(config).items():
            setattr(base.config, key, value)
    else:
        grow_embeddings(base, tokenizer)
        base = QuietStarForCausalLM.from_base(base, tokenizer, **thought_fields(config))
    missing: set[str]
    try:
        with blaming(f"cannot load the adapter {name}"):
            model = peft.PeftModel.from_pretrained(base, name)
        # peft leaves random values where an update is missing,
        with safe_open(weights, "pt") as file:
            expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
            missing = set(expected) - set(file.keys())
    except UserError as error:
        if not isinstance(error.__cause__, KeyError):
            raise
        missing = {str(error.__cause__.args[0])}  # and gives up over a layer that is saved whole
    if missing:
        raise UserError(
            f"cannot load the adapter {name}: {WEIGHTS_FILE} lacks {sorted(missing)[0]!r}; expected a"
            " whole one, as quietstar train writes it"
        )
    return model


def thought_fields(config: QuietStarConfig) -> dict[str, Any]:
    """The thought settings of a configuration, as ``from_base`` takes them."""
    return {name: getattr(config, name) for name in settings()}


def merge(model: PeftModel) -> QuietStarForCausalLM:
    """The model with its adapters added into the weights."""
    merged: QuietStarForCausalLM = model.merge_and_unload()
    return merged
