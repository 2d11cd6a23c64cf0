"""Loading weights: a complete model, or an error of one sentence.

transformers gives random values to what a folder lacks, or what has another size there, and says so in a
table among other lines. For a model that is to think, or to be trained on, that is a model in ruins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from quietstar.errors import UserError

_ADAPTER = "adapter_config.json"


def load_whole(
    load: Callable[..., Any], name: str | Path | None, *args: Any, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A model and transformers' loading information, every parameter from the checkpoint.

    Args:
        load: a ``from_pretrained`` of transformers; args, options: for it.
        name: folder or name on the hub; None where ``options`` have a ``state_dict``.

    Raises:
        UserError: if the checkpoint lacks a parameter, has it in another size, or is damaged.
        OSError: if there is no checkpoint.
    """
    # Sizes that differ are told below, together with what is missing.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = load(name, *args, **options)
    except SafetensorError as error:
        raise UserError(f"{name}: a file of its weights is cut short or damaged ({error})") from error
    except FileNotFoundError as error:
        raise UserError(f"{name}: a file of its weights is missing ({error})") from error
    _check_whole(name or "state_dict", model, info)
    return model, info


def _check_whole(name: str | Path, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    for key, theirs, ours in info["mismatched_keys"]:
        raise UserError(
            f"{name} has {key!r} in size {list(theirs)}; the configuration gives {list(ours)}, and"
            " random values would take its place"
        )
    parameters = {key for key, _ in model.named_parameters()}
    missing = sorted(parameters & set(info["missing_keys"]))
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{name} lacks the weights {missing[0]!r}{others} of a {type(model).__name__}; expected a"
            " whole checkpoint"
        )


def check_folder(name: str | Path | None) -> None:
    """Reject a folder that holds an adapter and no model.

    Raises:
        UserError: says how it is opened.
    """
    folder = Path(name) if name is not None else None
    if folder is None or not (folder / _ADAPTER).is_file() or any(folder.glob("model*.safetensors*")):
        return
    raise UserError(
        f"{name} holds an adapter without its decoder; open it with"
        " quietstar.checkpoints.load.load_checkpoint, or make a model of it first (quietstar merge)"
    )


def keep_4bit_differentiable(decoder: nn.Module) -> None:
    """Let a 4-bit decoder pass gradients on every device.

    On CPUs with bf16 instructions bitsandbytes repacks a weight in the first evaluation pass, for a
    kernel that gives no gradient, and that later training passes take, too, with a warning at most.
    """
    for module in decoder.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def keep_weights(model: nn.Module) -> None:
    """Mark all modules, so that transformers does not initialise them again under a wrapper."""
    for module in model.modules():
        _mark(module)


def keep_read_weights(model: nn.Module) -> None:
    """Mark the modules whose every weight was read, so that rules for new weights pass them over.

    Most of transformers' rules respect what was read, one weight at a time. Youtu's sets the padding
    token's row to 0 whether it was read or not.
    """
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and all(getattr(tensor, "_is_hf_initialized", False) for tensor in own):
            _mark(module)


def _mark(module: Any) -> None:
    module._is_hf_initialized = True
