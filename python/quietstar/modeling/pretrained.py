"""What a model's name stands for, a folder, a GGUF file or a name on the hub, and what is loaded of it.

The weights of a GGUF file are unpacked into ordinary ones, without the quantizer that transformers would
leave on them: with it nothing could be trained or saved.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    __version__,
)

from quietstar.data.hub import from_hub
from quietstar.errors import UserError, blaming, reason
from quietstar.files import is_file, is_folder
from quietstar.modeling.loading import load_whole

GGUF_SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_OLDEST_GGUF = (0, 10)


def is_gguf(name: str | Path) -> bool:
    """Whether a name stands for a GGUF file: a file, or what ends as one and is no folder.

    Raises:
        UserError: for any other file, and a GGUF file that is not there or that this Python cannot read.
    """
    path = Path(os.path.expanduser(name))  # unlike pathlib's, never an error
    if is_folder(path):
        return False
    if not is_file(path):
        if str(name).endswith(GGUF_SUFFIX):
            raise UserError(f"GGUF file {name} does not exist")
        return False
    if path.suffix != GGUF_SUFFIX:
        raise UserError(
            f"model {name} is a file; expected a folder, a GGUF file (*{GGUF_SUFFIX}) or a name on the"
            " Hugging Face Hub"
        )
    with path.open("rb") as file:
        start = file.read(len(_MAGIC))
    if start != _MAGIC:
        raise UserError(f"{name} is not a GGUF file: it begins with {start!r}; expected {_MAGIC!r}")
    _check_package(name)
    return True


def _check_package(name: str | Path) -> None:
    try:
        version = metadata.version("gguf")
    except metadata.PackageNotFoundError:
        found = "is not installed"
    else:
        if tuple(int(part) for part in version.split(".")[:2]) >= _OLDEST_GGUF:
            return
        found = f"is there in version {version}"
    oldest = ".".join(map(str, _OLDEST_GGUF))
    raise UserError(
        f"{name} is a GGUF file, which is read with the package gguf (>= {oldest}), which {found}:"
        " pip install 'quietstar[gguf]'"
    )


def _place(name: str | Path) -> tuple[str, dict[str, Any]]:
    """What transformers' ``from_pretrained`` takes for a name."""
    if not is_gguf(name):
        return str(name), {}
    path = Path(os.path.expanduser(name))
    return str(path.parent), {"gguf_file": path.name}


def check_holds_model(name: str | Path) -> None:
    """Raise :class:`UserError` for a folder with neither a model's configuration nor an adapter's."""
    files = (Path(name) / file for file in ("config.json", "adapter_config.json"))
    if is_folder(name) and not any(map(is_file, files)):
        raise UserError(f"{name} holds no model (no config.json)")


@contextmanager
def _naming(kind: str, name: str | Path, options: dict[str, Any]) -> Iterator[None]:
    """Within, errors name what is not there, a GGUF file that cannot be read, and a model type that is
    not known or that is no causal language model."""
    if "gguf_file" in options:
        with blaming(f"the GGUF file {name} is damaged, or of a kind that transformers cannot read"):
            yield
        return
    if kind == "model":
        check_holds_model(name)
    try:
        with from_hub(kind, str(name)):
            yield
    except UserError:
        raise
    except ValueError as error:
        unknown = _unknown_type(str(name))
        if unknown is None and "Unrecognized configuration class" in str(error):
            raise UserError(f"{name}: {reason(error)}") from error
        if unknown is None:
            raise
        raise UserError(
            f"{name} is of model type {unknown!r}, which the installed transformers ({__version__}) does"
            " not know"
        ) from error


def _unknown_type(name: str) -> str | None:
    try:
        settings, _ = PretrainedConfig.get_config_dict(name)
    except (OSError, ValueError):
        return None
    kind = settings.get("model_type")
    return kind if isinstance(kind, str) and kind not in CONFIG_MAPPING else None


def load_tokenizer(
    name: str | Path, revision: str | None = None, of_model: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a GGUF file or a name on the hub.

    Args:
        of_model: it is the model's own: an error is about the model.
    """
    folder, options = _place(name)
    with _naming("model" if of_model else "", name, options):
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision, **options)
        if options:
            _set_special_tokens(tokenizer)
    return tokenizer


def _set_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer the special tokens of its GGUF file.

    transformers 5.17 reads their ids, and then takes the tokens of the file's kind of tokenizer: a wrong
    end-of-text token, for one.
    """
    tokens = {}
    for kind in ("bos", "eos", "unk", "pad"):
        index = tokenizer.init_kwargs.get(f"{kind}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokenizer):
            tokens[f"{kind}_token"] = tokenizer.convert_ids_to_tokens(index)
    if tokens:
        tokenizer.add_special_tokens(tokens)


def load_config(name: str | Path, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a folder, a GGUF file or a name on the hub."""
    folder, options = _place(name)
    with _naming("model", name, options):
        return AutoConfig.from_pretrained(folder, revision=revision, **options)


def load_decoder(name: str | Path, **options: Any) -> PreTrainedModel:
    """A causal language model, whole, of a folder, a GGUF file or a name on the hub.

    Args:
        options: of ``from_pretrained``. A GGUF file's weights come as float32 unless ``dtype`` names
            another: rounding what was unpacked once more would move predictions.

    Raises:
        UserError: for a checkpoint that lacks weights, or a file that cannot be read.
        OSError: if there is no checkpoint; as a UserError, too, for a name that the hub does not have.
    """
    folder, place = _place(name)
    if place:
        if options.get("quantization_config") is not None:
            raise UserError(f"{name} is a GGUF file, which cannot be quantized while it is read")
        from transformers import GgufConfig

        place["quantization_config"] = GgufConfig(dequantize=True)
        if options.get("dtype") in (None, "auto"):
            options["dtype"] = torch.float32
    options.setdefault("use_safetensors", True)

    def load(_: Any, **given: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, **given)

    with _naming("model", name, place):
        decoder, _ = load_whole(load, name, **options, **place)
    if place:
        decoder.config._name_or_path = decoder.name_or_path = str(name)
    return decoder
