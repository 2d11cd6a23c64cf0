"""Open a model and its tokenizer by folder, file or name, as the commands do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quietstar.checkpoints.adapters import is_adapter, load_adapter, merge
from quietstar.config import QuietStarConfig
from quietstar.data.hub import from_hub
from quietstar.errors import UserError, blaming, reason
from quietstar.files import RUN_FILE, is_folder, last_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quietstar.modeling.model import QuietStarForCausalLM


def load_checkpoint(
    name: str, *, device: str | None = None, tokenizer: str | None = None, plain: bool = False
) -> tuple[QuietStarForCausalLM | Any, PreTrainedTokenizerBase]:
    """Load a model with thoughts, in evaluation mode.

    Args:
        name: a folder that ``quietstar train`` or ``save_pretrained`` wrote (of a run that is not done,
            the last checkpoint is taken; adapters are merged), a checkpoint of the reference code, or
            the name of either on the Hugging Face Hub.
        device: default: ``cuda`` where there is one, otherwise ``cpu``.
        tokenizer: folder, GGUF file or name of another tokenizer than the checkpoint's own.
        plain: take a decoder without thoughts, too (a folder, a GGUF file, a name on the hub), as it is.

    Raises:
        UserError: if there is no such model, it has no thoughts (unless ``plain``), or the tokenizer is
            not its own.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    place = _device(device)
    name = folder_of_run(name)
    with from_hub("model", name):
        model, own_tokenizer = _load(name, tokenizer, plain)
    return model.to(place).eval(), own_tokenizer


def _load(
    name: str, tokenizer: str | None, plain: bool
) -> tuple[QuietStarForCausalLM | Any, PreTrainedTokenizerBase]:
    from quietstar.checkpoints.upstream import from_reference, is_reference_config
    from quietstar.modeling.meta_tokens import add_meta_tokens, check_tokenizer
    from quietstar.modeling.model import QuietStarForCausalLM
    from quietstar.modeling.pretrained import load_decoder, load_tokenizer

    settings = _read_config(name)
    theirs = is_reference_config(settings)
    thinks = theirs or settings.get("model_type") == QuietStarConfig.model_type
    if not (thinks or plain):
        raise UserError(
            f"{name} is a model without thoughts ({settings.get('model_type', '?')}); expected"
            " one that quietstar train has made, or a checkpoint of the reference code"
        )
    with blaming(f"cannot load the tokenizer of {tokenizer or name} (--tokenizer names another)"):
        own_tokenizer = load_tokenizer(tokenizer or name)
    model: Any
    if not thinks:
        with blaming(f"cannot load {name}"):
            model = load_decoder(name)
        _check_size(name, own_tokenizer, model)
        return model, own_tokenizer
    if is_adapter(name):
        model = merge(load_adapter(name, own_tokenizer))
    elif theirs:
        add_meta_tokens(own_tokenizer)
        model = from_reference(name, tokenizer=own_tokenizer)
    else:
        with blaming(f"cannot load {name}"):
            model = QuietStarForCausalLM.from_pretrained(name)
    check_tokenizer(own_tokenizer, model.config)
    return model, own_tokenizer


def _check_size(name: str, tokenizer: PreTrainedTokenizerBase, decoder: PreTrainedModel) -> None:
    """Raise :class:`UserError` for a tokenizer that has more tokens than a decoder."""
    rows = decoder.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but {name} has {rows}; expected the tokenizer"
            " that it was trained with"
        )


def folder_of_run(name: str) -> str:
    """The folder to load: of a run that is not done, its last checkpoint."""
    folder = Path(name)
    if not name:
        raise UserError("the model's name is empty; expected a folder or a name on the Hugging Face Hub")
    if not is_folder(folder) or (folder / "config.json").is_file():
        return name
    checkpoint = last_checkpoint(folder) if (folder / RUN_FILE).is_file() else None
    if checkpoint is None:
        # As of `quietstar star`, which leaves one in every iteration.
        inside = sorted(folder.glob("*/model/config.json"))
        there = f"; there is one in {inside[-1].parent}" if inside else ""
        raise UserError(f"{name} holds no model (no config.json){there}")
    return str(checkpoint)


def _read_config(name: str) -> dict[str, Any]:
    from transformers import PretrainedConfig

    from quietstar.modeling.pretrained import is_gguf

    if is_gguf(name):
        return {"model_type": "GGUF file"}
    try:
        with from_hub("model", name):
            settings, _ = PretrainedConfig.get_config_dict(name)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        if is_folder(Path(name)):
            raise UserError(f"model {name} has no readable config.json: {reason(error)}") from error
        raise UserError(
            f"model {name} is neither a folder nor a name on the Hugging Face Hub that can be read:"
            f" {reason(error)}"
        ) from error
    if not isinstance(settings, dict) or not settings:
        raise UserError(f"model {name} has no readable config.json: {json.dumps(settings)}")
    return settings


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    with blaming(f"--device {name} cannot be used"):
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    return device
