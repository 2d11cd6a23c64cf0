"""Text of others as tokens: what it spells is text, even where it spells a special token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Saved with the tokenizer. transformers' own setting says nothing of what anybody asked for: Qwen's
# tokenizers have it, as False.
_ASKED = "quietstar_special_tokens"


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **options: Any) -> list[Any]:
    """The ids of a text, or of each of several, with what the tokenizer puts before and behind one.

    ``<|endoftext|>`` in a document, a question or a page is a piece of text like any other: as a token
    it would end what it stands in, or begin a thought. :func:`read_special_tokens` makes it one.

    Args:
        options: of the tokenizer's call.
    """
    splits = tokenizer.init_kwargs.get(_ASKED) != "control"
    # verbose=False: texts longer than the model's context are cut by the caller, no warning needed.
    found = tokenizer(text, verbose=False, split_special_tokens=splits, **options)
    return list(found["input_ids"])


def read_special_tokens(tokenizer: PreTrainedTokenizerBase, on: bool = True) -> None:
    """Let texts spell special tokens, here and wherever the tokenizer is opened after it was saved; or
    no longer."""
    tokenizer.init_kwargs.pop(_ASKED, None)
    if on:
        tokenizer.init_kwargs[_ASKED] = "control"


def spells(tokenizer: PreTrainedTokenizerBase, text: str, token: object) -> bool:
    """Whether a text ends by spelling a special token, and the token is what becomes of it."""
    return tokenizer.init_kwargs.get(_ASKED) == "control" and text.endswith(str(token))
