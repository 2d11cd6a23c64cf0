"""Models from state dicts and checkpoints of the reference implementation (ezelikman/quiet-star).

Its code is never run: the configuration is read as JSON, weights as safetensors or, for ``.bin``
shards, with torch's weights-only loader.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from quietstar.config import END_TOKEN, START_TOKEN, QuietStarConfig, check_fields
from quietstar.data.hub import from_hub
from quietstar.errors import UserError, reason
from quietstar.files import read_json
from quietstar.modeling.model import QuietStarForCausalLM
from quietstar.thinking.text_part import text_config_of

logger = logging.getLogger("quietstar")

# What shapes the reference's talk head, the values that we know, and its defaults, which are the same.
HEAD_FLAGS = {
    "use_weighted_talk_head": True,
    "use_concat_talk_head": True,
    "use_complex_talk_head": True,
    "use_shallow_talk": False,
    "merged_lm_and_talk_heads": False,
}
# Its further flags, which its code stores and does not read.
_UNREAD_FLAGS = (
    "merged_talk_heads",
    "merged_lm_and_think_heads",
    "use_shallow_think",
    "use_complex_think_head",
)
# Talk tokens in its training script, for checkpoints that do not say.
_USUAL_TALK = 4
_THOUGHT_EMBEDDINGS = ("start_embedding", "end_embedding")

# Layers of the reference's talk head, an nn.Sequential, by their place in it.
_HEAD_LAYERS = {"talk_head.0.0": "fc1", "talk_head.0.2": "fc2", "talk_head.0.4": "fc3"}


def reference_names(names: list[str]) -> dict[str, str]:
    """Map the reference's parameter names to ours; the two thought embeddings are not among them."""
    renamed = {}
    for name in names:
        for theirs, ours in _HEAD_LAYERS.items():
            if name.startswith(theirs + "."):
                renamed[name] = f"mixing_head.{ours}{name.removeprefix(theirs)}"
        if name.startswith("model.") or name == "lm_head.weight":
            renamed[name] = f"base.{name}"
    return renamed


def load_reference(
    state_dict: Mapping[str, Tensor],
    config_dict: Mapping[str, Any],
    *,
    n_ahead: int,
    n_ahead_talk: int,
    n_passes: int,
    start_token_id: int | None = None,
    end_token_id: int | None = None,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> QuietStarForCausalLM:
    """Build a model from a reference state dict.

    Args:
        state_dict: ``model.*``, ``lm_head.weight``, ``talk_head.0.{0,2,4}.*``, ``start_embedding`` and
            ``end_embedding`` [2, d], of which row 0 is the embedding (row 1 belongs to a variant that
            samples it) at the reference's training scale.
        config_dict: the decoder's configuration (a Mistral one unless ``model_type`` says otherwise).
        n_ahead, n_ahead_talk, n_passes: as the reference counts them.
        start_token_id, end_token_id: default: the last two rows of the vocabulary, where the
            reference's script puts them.
        dtype: of the model's weights.
        fields: override anything of the reference preset.

    Raises:
        ValueError: names the parameters that are missing, unknown or of the wrong shape.
    """
    settings = {"model_type": "mistral", **config_dict}
    # transformers 4 wrote the rotary base as a field of its own.
    theta = settings.pop("rope_theta", None)
    if theta is not None and "rope_parameters" not in settings:
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    text_config = AutoConfig.for_model(**settings)
    vocabulary = text_config_of(text_config).vocab_size
    config = QuietStarConfig.from_reference(
        n_ahead=n_ahead,
        n_ahead_talk=n_ahead_talk,
        n_passes=n_passes,
        text_config=text_config,
        start_token_id=vocabulary - 2 if start_token_id is None else start_token_id,
        end_token_id=vocabulary - 1 if end_token_id is None else end_token_id,
        **fields,
    )
    model = QuietStarForCausalLM(config, base=AutoModelForCausalLM.from_config(text_config))
    model.to(dtype)
    renamed = reference_names(list(state_dict))
    ours = {new: state_dict[old] for old, new in renamed.items()}
    unknown = [n for n in state_dict if n not in renamed and n not in _THOUGHT_EMBEDDINGS]
    if unknown:
        raise ValueError(f"state_dict has {unknown[0]!r}, which no part of the model matches")
    for name in _THOUGHT_EMBEDDINGS:
        if name not in state_dict:
            raise ValueError(f"state_dict lacks {name!r}; expected a checkpoint with trained thoughts")
        embedding = state_dict[name]
        ours[f"thought_embedding.{name.removesuffix('_embedding')}"] = (
            embedding[0] if embedding.dim() == 2 else embedding
        )
    own = model.state_dict()
    if getattr(text_config, "tie_word_embeddings", False):
        ours.setdefault("base.lm_head.weight", ours["base.model.embed_tokens.weight"])
    for name, tensor in own.items():
        if name not in ours:
            raise ValueError(f"state_dict has nothing for {name!r}")
        if ours[name].shape != tensor.shape:
            raise ValueError(
                f"{name!r} has shape {list(ours[name].shape)} in the state dict; the configuration"
                f" gives {list(tensor.shape)}"
            )
    with torch.no_grad():
        model.load_state_dict(ours)
    return model


def from_reference(
    name: str | Path,
    *,
    n_ahead: int | None = None,
    n_ahead_talk: int | None = None,
    n_passes: int = 2,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    **fields: Any,
) -> QuietStarForCausalLM:
    """Read a checkpoint that the reference code saved, in evaluation mode.

    Args:
        name: a folder, or a repository of the Hugging Face Hub (``ezelikman/quietstar-8-ahead``).
        n_ahead, n_ahead_talk: as the reference counts them. A checkpoint holds only their sum
            (``max_thoughts`` less one), so give at least one of them; without either, 4 talk tokens
            are assumed, as in the reference's training script, with a warning.
        n_passes: rationales per position in further training; nothing that a checkpoint holds.
        tokenizer: default: the checkpoint's own, if it has one.
        revision: of the repository.
        dtype: default: the one in which the weights were saved.
        fields: override anything of the reference preset.

    Raises:
        ValueError: for a talk head of an unknown layout (names the flag), for files or parameters that
            are missing or do not fit, or if the number of thought tokens cannot be known.
    """
    check_fields(fields)
    folder = _local_folder(str(name), revision)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder / 'config.json'} does not exist; expected a folder with a checkpoint")
    settings = read_json(folder / "config.json")
    if settings.get("model_type") == QuietStarConfig.model_type:
        raise ValueError(f"{name} is a checkpoint of this package; expected one of the reference code")
    for flag, known in HEAD_FLAGS.items():
        value = settings.pop(flag, known)
        if value != known:
            raise ValueError(
                f"{flag} is {value} in the configuration of {name}; only talk heads with"
                f" {flag}={known} are known: a mixing weight from both hidden states, three layers deep"
            )
    n_ahead, n_ahead_talk = _lengths(settings.pop("max_thoughts", None), n_ahead, n_ahead_talk)
    # A remote-code configuration has a model type of its own; underneath it is a Mistral.
    for key in (*_UNREAD_FLAGS, "model_type", "architectures", "auto_map", "dtype", "torch_dtype"):
        settings.pop(key, None)
    settings = {key: value for key, value in settings.items() if not key.startswith("_")}
    state = _read_weights(folder)
    if tokenizer is None and any(folder.glob("tokenizer*")):
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if "model.embed_tokens.weight" not in state:
        raise ValueError(
            f"{name} has no 'model.embed_tokens.weight'; expected a Mistral of the reference"
        )
    for key, token in (("start_token_id", START_TOKEN), ("end_token_id", END_TOKEN)):
        index = None if tokenizer is None else tokenizer.get_vocab().get(token)
        if index is not None:
            fields.setdefault(key, index)
    _fill_thought_embeddings(str(name), state, tokenizer, fields)
    model = load_reference(
        state,
        settings,
        n_ahead=n_ahead,
        n_ahead_talk=n_ahead_talk,
        n_passes=n_passes,
        dtype=dtype or state["model.embed_tokens.weight"].dtype,
        **fields,
    )
    return model.eval()


def is_reference_config(settings: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` was written by the reference code."""
    return settings.get("model_type") != QuietStarConfig.model_type and "max_thoughts" in settings


def _lengths(total: int | None, n_ahead: int | None, n_ahead_talk: int | None) -> tuple[int, int]:
    """``n_ahead`` and ``n_ahead_talk``; the reference saves max_thoughts = their sum + 1."""
    if n_ahead is not None and n_ahead_talk is not None:
        return n_ahead, n_ahead_talk
    if total is None:
        missing = "n_ahead" if n_ahead is None else "n_ahead_talk"
        raise ValueError(f"{missing} is missing, and the configuration has no max_thoughts to tell it")
    if n_ahead is not None:
        return n_ahead, max(1, total - 1 - n_ahead)
    if n_ahead_talk is None:
        n_ahead_talk = _USUAL_TALK
        logger.warning(
            "max_thoughts is %d, which is n_ahead + n_ahead_talk + 1: assuming n_ahead=%d and"
            " n_ahead_talk=%d; give n_ahead if that is not so",
            total,
            total - 1 - n_ahead_talk,
            n_ahead_talk,
        )
    return total - 1 - n_ahead_talk, n_ahead_talk


def _fill_thought_embeddings(
    name: str,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    fields: Mapping[str, Any],
) -> None:
    """Begin where the reference's training begins if the trained embeddings are not there."""
    table = state["model.embed_tokens.weight"]
    scale = float(fields.get("embedding_scale", 100.0))
    for place, key in enumerate(_THOUGHT_EMBEDDINGS):
        # Before its first step the reference holds zeros.
        if key in state and bool((state[key] != 0).any()):
            continue
        if tokenizer is not None:
            source, index = "of '---'", tokenizer("---", add_special_tokens=False)["input_ids"][0]
        else:
            source = "of its token in the vocabulary"
            index = fields.get(key.replace("embedding", "token_id"), len(table) - 2 + place)
        logger.warning(
            "%s has no trained %s; it begins as the embedding %s, and thoughts will be worth less than"
            " those of a trained model",
            name,
            key,
            source,
        )
        state[key] = table[index] / scale


# ---- files --------------------------------------------------------------------------------------


def _local_folder(name: str, revision: str | None) -> Path:
    """The checkpoint's files on this machine; no Python files are fetched."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        texts = ["*.json", "tokenizer*"]
        with from_hub("model", name):
            folder = Path(
                snapshot_download(name, revision=revision, allow_patterns=[*texts, "*.safetensors"])
            )
            if not any(folder.glob("*.safetensors")):
                snapshot_download(name, revision=revision, allow_patterns=["pytorch_model*.bin"])
    except UserError:
        raise
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{name} is neither a folder nor a repository that can be read: {reason(error)}"
        ) from error
    return folder


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole or sharded, safetensors before ``.bin``."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
        elif (folder / stem).is_file():
            files = [stem]
        else:
            continue
        state: dict[str, Tensor] = {}
        for file in files:
            # The index is input: it may name files of this folder only.
            if Path(file).name != file or not (folder / file).is_file():
                raise ValueError(f"{index} names {file!r}, which is not in {folder}")
            state.update(_read_tensors(folder / file))
        # transformers before 4.32 saved this buffer, which follows from the configuration.
        return {n: t for n, t in state.items() if not n.endswith("rotary_emb.inv_freq")}
    raise ValueError(f"{folder} holds neither model.safetensors nor pytorch_model.bin (or their index)")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as tensors alone: {reason(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(f"{path} holds something other than named tensors")
    return found
