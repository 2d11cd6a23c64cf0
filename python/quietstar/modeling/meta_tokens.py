"""The two meta tokens, and whether a tokenizer and a model belong together."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from quietstar.config import END_TOKEN, START_TOKEN, QuietStarConfig
from quietstar.thinking.text_part import text_config_of


def add_meta_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Add ``<|startthought|>`` and ``<|endthought|>`` to a tokenizer that lacks them."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"tokenizer is {tokenizer!r}; expected a tokenizer, e.g. from AutoTokenizer.from_pretrained"
        )
    missing = [t for t in (START_TOKEN, END_TOKEN) if t not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing})


def init_tokens(
    tokenizer: PreTrainedTokenizerBase | None, both: str, start: str | None, end: str | None
) -> dict[str, list[int]]:
    """The tokens whose mean embedding the ``start`` and the ``end`` embedding begin as.

    Args:
        both: the text for one that has none of its own; start, end: their own.

    Returns:
        nothing without a tokenizer: the embeddings begin at random.

    Raises:
        ValueError: for a text without a token, or one of its own without a tokenizer.
    """
    found = {}
    for part, own in (("start", start), ("end", end)):
        text, name = (both, "init_embedding_from") if own is None else (own, f"init_{part}_from")
        if tokenizer is None:
            if own is not None:
                raise ValueError(f"{name} is {text!r}, which needs a tokenizer; expected one")
            continue
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"{name} is {text!r}; expected text with a token")
        found[part] = list(ids)
    return found


def meta_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The meta tokens' ids as :class:`QuietStarConfig` fields; the tokenizer has to have them.

    Raises:
        ValueError: names the token that is missing.
    """
    vocabulary = tokenizer.get_vocab()
    ids = {}
    for token, name in ((START_TOKEN, "start_token_id"), (END_TOKEN, "end_token_id")):
        if token not in vocabulary:
            raise ValueError(f"the tokenizer has no {token} token; call quietstar.add_meta_tokens first")
        ids[name] = vocabulary[token]
    return ids


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: QuietStarConfig) -> None:
    """Require that a tokenizer fits a model: meta tokens at the same ids, no more tokens than rows.

    Raises:
        ValueError: says which token or size does not match.
    """
    for name, index in meta_token_ids(tokenizer).items():
        if index != getattr(config, name):
            raise ValueError(
                f"{name} is {index} in the tokenizer and {getattr(config, name)} in the model; expected"
                " the tokenizer that the model was built with"
            )
    decoder: Any = text_config_of(config)
    rows = getattr(decoder, "vocab_size", None)
    if rows is not None and len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's vocabulary {rows}; expected a"
            " vocabulary that holds them all"
        )
