"""How transformers' generate may be used with thoughts; what cannot work is an error of one sentence.

Each call of the model answers for one new token, since a thought hangs from the end of the text. Ways of
decoding that check several tokens at once, and caches that do not grow with the text, are rejected.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

logger = logging.getLogger("quietstar")

# Fields of a GenerationConfig that make the model answer for several positions, or run a loop that is
# not here; each with the values that leave it off.
_SEVERAL_POSITIONS = {
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "use_mtp": (None, False),
    "dola_layers": (None,),
    "penalty_alpha": (None, 0, 0.0),
}
_OTHER_LOOPS = {
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "token_healing": (None, False),
    "compile_config": (None,),
}


def check_loop(arguments: dict[str, Any]) -> None:
    """Reject decoding loops that are handed to ``generate``.

    Raises:
        ValueError: names the argument.
    """
    for name in ("assistant_model", "custom_generate"):
        if arguments.get(name) is not None:
            raise ValueError(
                f"{name} was given; a model that thinks predicts one token at a time, so expected"
                " greedy decoding, sampling or beam search of its own"
            )
    if arguments.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds were given; expected input_ids, which thoughts are built on")


def check_generation_config(config: GenerationConfig) -> None:
    """Reject settings of a generation that cannot work, wherever they were made.

    Raises:
        ValueError: names the field, its value and what was expected.
    """
    for fields, why in (
        (_SEVERAL_POSITIONS, "; a model that thinks predicts one token at a time, so expected"),
        (_OTHER_LOOPS, ", which thoughts do not support; expected"),
    ):
        for name, off in fields.items():
            value = getattr(config, name, None)
            if value not in off:
                raise ValueError(f"{name} is {value!r}{why} {off[-1]!r}")
    _check_layers(lambda name: getattr(config, name, None))
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        raise ValueError(
            f"cache_implementation is {config.cache_implementation!r}; expected None or 'dynamic' (a"
            " cache that grows with the text)"
        )
    beams = config.num_beams or 1
    if beams > 1 and config.guidance_scale not in (None, 1, 1.0):
        raise ValueError(
            f"`guidance_scale` and num_beams={beams} cannot be combined; expected one beam, since the"
            " passes without the prompt do not follow beams"
        )
    chunk = config.prefill_chunk_size
    if chunk is not None and chunk < 1:
        raise ValueError(f"prefill_chunk_size is {chunk}; expected a whole number >= 1")


def check_outputs(ignored: dict[str, Any]) -> None:
    """Reject keyword arguments of a forward that ask for what it does not return.

    Raises:
        ValueError: names the argument.
    """
    _check_layers(ignored.get)
    if ignored.get("return_dict") is False:
        raise ValueError("return_dict is False; expected True, a Quiet-STaR model returns no tuples")


def _check_layers(asked: Callable[[str], Any]) -> None:
    for name in ("output_attentions", "output_hidden_states"):
        if asked(name):
            raise ValueError(
                f"{name} is True; a Quiet-STaR model returns no layers of its decoder, expected False"
                " (model.base returns them for a text without thoughts)"
            )


def inherited_settings(config: GenerationConfig) -> GenerationConfig:
    """A decoder's settings of generation, as a copy that can be saved.

    Some published ones have a temperature and no sampling, say; transformers reads and ignores such
    fields, but refuses to save them, which would be at the end of a training.
    """
    try:
        config.validate(strict=True)
    except ValueError as error:
        logger.warning(
            "the decoder's generation settings are left out, but for its special tokens: %s",
            " ".join(str(error).split()),
        )
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        return GenerationConfig(**{name: getattr(config, name) for name in tokens})
    return copy.deepcopy(config)


def check_kept(logits_to_keep: Any, max_kept: int, why: str = "") -> None:
    """Reject numbers of predictions other than 0 (all) to ``max_kept``.

    Raises:
        ValueError: names the argument; ``why`` ends the sentence.
    """
    if not isinstance(logits_to_keep, int):
        raise ValueError(
            f"logits_to_keep is a {type(logits_to_keep).__name__}; expected a whole number, which counts"
            " positions from the end"
        )
    if not 0 <= logits_to_keep <= max_kept:
        raise ValueError(f"logits_to_keep is {logits_to_keep}; expected 0 to {max_kept}{why}")


def text_before_the_end(
    attention_mask: Tensor, past: int, new: int, look: bool = True
) -> tuple[Tensor, Tensor]:
    """Which columns are text, [B, N] bool, and each row's first one, [B] int64.

    Args:
        attention_mask: [B, N], nonzero for text.
        past, new: tokens in the cache and in this call, N in all.
        look: at the values, for which the host waits for the device.

    Raises:
        ValueError: for another number of columns, or padding anywhere but at the left.
    """
    total = past + new
    if attention_mask.dim() != 2 or attention_mask.shape[1] != total:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; expected {total} columns ({past}"
            f" cached and {new} new tokens)"
        )
    is_text = attention_mask != 0
    first = is_text.int().argmax(1)
    if not look:
        return is_text, first
    columns = torch.arange(total, device=is_text.device)
    wrong = (is_text != (columns >= first[:, None])).any(1) | ~is_text[:, -1]
    if wrong.any():
        row = int(wrong.int().argmax())
        where = "a hole in the middle" if is_text[row, -1] else "padding at the right"
        raise ValueError(
            f"attention_mask has {where} of row {row}; expected padding at the left only, since the next"
            " token follows the last one (tokenizer.padding_side = 'left')"
        )
    return is_text, first
