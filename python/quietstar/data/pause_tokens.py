"""Pause tokens in the stream, behind a prompt (Goyal et al. 2023, arXiv 2310.02226).

They are ordinary tokens of the text, with an embedding that is learnt: nothing is to be predicted before
the last of them, and every later token sees them. (``thoughts: {thought_kind: pause}`` is another thing:
pause tokens in the slots beside the text, which no later token sees.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAUSE_TOKEN = "<|pause|>"
# Saved with the tokenizer: whoever writes behind a prompt has to write them, too.
_COUNT = "quietstar_pause_tokens"


def add_pause_tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    """Let every prompt of a pair end in so many pauses; adds the token if it is new."""
    if PAUSE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([PAUSE_TOKEN], special_tokens=True)
    tokenizer.init_kwargs[_COUNT] = count


def pause_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The pauses that belong behind a prompt; none for other tokenizers."""
    count = int(tokenizer.init_kwargs.get(_COUNT, 0))
    return [int(tokenizer.convert_tokens_to_ids(PAUSE_TOKEN))] * count if count else []
