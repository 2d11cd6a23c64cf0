"""What a recipe names, built: the tokenizer, the model and the rows of tokens."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from quietstar.checkpoints.adapters import grow_embeddings, quantization
from quietstar.config import QuietStarConfig
from quietstar.data import lookup
from quietstar.data.blocks import Blocks, StreamedBlocks, TokenBlocks, read_blocks
from quietstar.data.sources import STDLIB, expand_files, open_documents
from quietstar.data.stdlib import Document
from quietstar.errors import UserError, blaming
from quietstar.modeling.loading import load_whole
from quietstar.recipes.decoder import decoder_config, random_decoder
from quietstar.recipes.recipe import DataSection, ModelSection, Recipe
from quietstar.training.schedule import longest_talk
from quietstar.values import Mismatch, coerce, describe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quietstar.modeling.model import QuietStarForCausalLM

LOOKUP = "lookup"


def build_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer that the model section names."""
    if section.tokenizer == STDLIB:
        from quietstar.data.stdlib import stdlib_tokenizer

        return stdlib_tokenizer(section.vocab_size)
    if section.tokenizer == LOOKUP:
        return lookup.build_tokenizer()
    from transformers import AutoTokenizer

    source = section.tokenizer or section.name
    assert source is not None  # checked with the recipe
    revision = section.revision if section.tokenizer is None else None
    with blaming(f"cannot load the tokenizer of {source}"):
        return AutoTokenizer.from_pretrained(source, revision=revision)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> QuietStarForCausalLM:
    """The model of a recipe: a decoder with thoughts added, or a Quiet-STaR checkpoint continued.

    Adds the meta tokens to ``tokenizer`` if they are new.
    """
    from quietstar.modeling.meta_tokens import add_meta_tokens, check_tokenizer
    from quietstar.modeling.model import QuietStarForCausalLM

    section = recipe.model
    if section.config:
        decoder = _random_decoder(section, tokenizer)
    else:
        decoder = _load(section, recipe.adapter.quantize)
    thoughts = dict(recipe.thoughts)
    if isinstance(decoder, QuietStarForCausalLM):
        check_tokenizer(tokenizer, _thoughts_of(decoder))
    if isinstance(decoder, QuietStarForCausalLM) and not section.base_only:
        for key, value in thoughts.items():
            setattr(decoder.config, key, value)
        _thoughts_of(decoder).check_thoughts()
        return decoder
    if isinstance(decoder, QuietStarForCausalLM):
        decoder = decoder.base
    rows = int(decoder.config.get_text_config().vocab_size)
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's vocabulary has {rows}; they "
            "do not belong together (check model.tokenizer)"
        )
    if recipe.adapter.rank is not None:
        add_meta_tokens(tokenizer)
        grow_embeddings(decoder, tokenizer)
    return QuietStarForCausalLM.from_base(
        decoder, tokenizer, init_embedding_from=section.init_embedding_from, **thoughts
    )


def _thoughts_of(model: QuietStarForCausalLM) -> QuietStarConfig:
    config = model.config
    assert isinstance(config, QuietStarConfig)
    return config


def check_files(data: DataSection) -> None:
    """Raise :class:`UserError` for local files that are missing or empty; opens none of them."""
    for files in (data.files, data.eval_files):
        if files is not None:
            expand_files(files)


def build_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, progress: bool = True
) -> tuple[TokenBlocks | StreamedBlocks, TokenBlocks | None]:
    """Training rows and, if the recipe asks for them, evaluation rows (always in memory)."""
    data = recipe.data
    if data.name == LOOKUP:
        return _lookup_data(data)
    thoughts = QuietStarConfig(**recipe.thoughts)
    blocks = Blocks(data.block_size, data.packing, longest_talk(thoughts, recipe.training) + 2)
    seed = int(recipe.training.get("data_seed") or recipe.training.get("seed", 42))
    train_source = _source(data, data.name, data.files, data.split, seed)
    eval_data, skip = None, 0
    if data.eval_blocks:
        separate = data.eval_files is not None or data.eval_split is not None
        if data.eval_files is not None:
            eval_source = _source(data, None, data.eval_files, data.split, seed)
        elif data.eval_split is not None:
            if data.name is None:
                raise UserError(
                    "data.eval_split is set but the data are local files; set data.eval_files"
                )
            eval_source = _source(data, data.name, None, data.eval_split, seed)
        else:
            eval_source = train_source
        eval_data, used = read_blocks(
            eval_source,
            tokenizer,
            blocks,
            max_blocks=data.eval_blocks,
            what="the evaluation text",
            progress=progress,
        )
        skip = 0 if separate else used
    if data.streaming:
        return StreamedBlocks(
            train_source, tokenizer, blocks, skip=skip, max_blocks=data.max_train_blocks, repeat=True
        ), eval_data
    train_data, _ = read_blocks(
        train_source,
        tokenizer,
        blocks,
        max_blocks=data.max_train_blocks,
        skip=skip,
        what="the training text",
        progress=progress,
    )
    return train_data, eval_data


def _lookup_data(data: DataSection) -> tuple[TokenBlocks, TokenBlocks | None]:
    """Rows of the look-up language; evaluation rows have held-out problems without asides."""
    known = {"language": int, "seed": int, **typing.get_type_hints(lookup.TextMix)}
    settings: dict[str, Any] = {"language": 0, "seed": 0}
    for key, value in (data.lookup or {}).items():
        if key not in known:
            raise UserError(f"unknown key {key!r} in data.lookup; known keys: {', '.join(known)}")
        try:
            settings[key] = coerce(value, known[key])
        except Mismatch:
            raise UserError(f"data.lookup.{key} is {value!r}; expected {describe(known[key])}") from None
    language = lookup.LookupLanguage(settings.pop("language"))
    seed = settings.pop("seed")
    mix = lookup.TextMix(**settings)

    def rows(count: int, mix: lookup.TextMix, seed: int) -> TokenBlocks:
        tokens = language.blocks(count, data.block_size, mix, seed).astype(np.int32)
        return TokenBlocks(tokens, np.full(count, data.block_size, dtype=np.int32))

    assert data.max_train_blocks is not None  # checked with the recipe
    held_out = lookup.TextMix(held_out=True)
    evaluation = rows(data.eval_blocks, held_out, seed + 1_000_000) if data.eval_blocks else None
    return rows(data.max_train_blocks, mix, seed), evaluation


def _source(
    data: DataSection, name: str | None, files: list[str] | None, split: str, seed: int
) -> Callable[[], Iterator[Document]]:
    return open_documents(
        name=name,
        files=files,
        split=split,
        config_name=data.config_name,
        revision=data.revision,
        text_column=data.text_column,
        txt_documents=data.txt_documents,
        streaming=data.streaming,
        shuffle_buffer=data.shuffle_buffer,
        seed=seed,
    )


def _torch_dtype(name: str) -> Any:
    import torch

    return name if name == "auto" else getattr(torch, name)


def _load(section: ModelSection, quantize: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    assert section.name is not None  # checked with the recipe
    options: dict[str, Any] = {
        "dtype": _torch_dtype(section.dtype),
        "attn_implementation": section.attn_implementation,
        "revision": section.revision,
    }
    with blaming(f"cannot load model {section.name}"):
        options |= quantization(quantize, section.name, section.revision)
        decoder, _ = load_whole(
            AutoModelForCausalLM.from_pretrained,
            section.name,
            use_safetensors=True,
            **{key: value for key, value in options.items() if value is not None},
        )
        return decoder


def _random_decoder(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A decoder with random weights for ``model.config``, sized to the tokenizer."""
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = decoder_config(section.config or {}, len(tokenizer), ids)
    options: dict[str, Any] = {}
    if section.dtype != "auto":
        options["dtype"] = _torch_dtype(section.dtype)
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    return random_decoder(config, **options)
