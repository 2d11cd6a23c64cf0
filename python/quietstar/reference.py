"""Models from the state dicts of the reference implementation (github ezelikman/quiet-star)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from .config import QuietStarConfig
from .modeling import QuietStarForCausalLM

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
    vocabulary = text_config.vocab_size
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
    renamed = reference_names(list(state_dict))
    ours = {new: state_dict[old] for old, new in renamed.items()}
    known = ("start_embedding", "end_embedding")
    unknown = [name for name in state_dict if name not in renamed and name not in known]
    if unknown:
        raise ValueError(f"state_dict has {unknown[0]!r}, which no part of the model matches")
    for name in known:
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
