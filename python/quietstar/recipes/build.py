"""What a recipe names, built: the tokenizer, the model and the rows of tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quietstar.checkpoints.adapters import grow_embeddings, quantization
from quietstar.data.blocks import Blocks, StreamedBlocks, TokenBlocks, read_blocks
from quietstar.data.pause_tokens import PAUSE_TOKEN, add_pause_tokens
from quietstar.data.plain_text import read_special_tokens
from quietstar.data.sources import GENERATORS, TOKENIZERS, expand_files, open_documents
from quietstar.errors import UserError, blaming
from quietstar.modeling.meta_tokens import add_meta_tokens, check_tokenizer
from quietstar.modeling.model import QuietStarForCausalLM
from quietstar.modeling.pretrained import load_decoder, load_tokenizer
from quietstar.recipes.decoder import decoder_config, random_decoder
from quietstar.recipes.prompt_data import row_reader
from quietstar.recipes.recipe import DataSection, ModelSection, Recipe, longest_talk

# What the thought parts begin as: keys of the model section, and keywords of ``from_base``.
INITIAL = ("init_embedding_from", "init_start_from", "init_end_from", "init_mixing_weight")


def build_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer that the model section names."""
    if section.tokenizer in TOKENIZERS:
        tokenizer = TOKENIZERS[section.tokenizer](section.vocab_size)
    else:
        source = section.tokenizer or section.name
        assert source is not None  # checked with the recipe
        revision = section.revision if section.tokenizer is None else None
        with blaming(f"cannot load the tokenizer of {source}"):
            tokenizer = load_tokenizer(source, revision, of_model=section.tokenizer is None)
    if section.special_tokens is not None:
        read_special_tokens(tokenizer, section.special_tokens == "control")
    return tokenizer


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> QuietStarForCausalLM:
    """The model of a recipe: a decoder with thoughts added, or a Quiet-STaR checkpoint continued.

    Adds the meta tokens to ``tokenizer`` if they are new.
    """
    model, section = _model(recipe, tokenizer), recipe.model
    model.fuse_layers(section.fused_layers)
    if section.reuse_rollout:
        model.reuse_rollout()
    return model


def _model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> QuietStarForCausalLM:
    section, pauses = recipe.model, recipe.data.pause_tokens
    options: dict[str, Any] = {
        "dtype": section.dtype if section.dtype == "auto" else getattr(torch, section.dtype),
        "attn_implementation": section.attn_implementation,
    }
    options = {key: value for key, value in options.items() if value is not None}
    if section.config:
        decoder = _random_decoder(section.config, tokenizer, options)
    else:
        decoder = _load(section, recipe.adapter.quantize, options)
    if isinstance(decoder, QuietStarForCausalLM):
        config: Any = decoder.config
        check_tokenizer(tokenizer, config)
        if not section.base_only:
            if pauses is not None:
                _check_pause_token(tokenizer, section)
                add_pause_tokens(tokenizer, pauses)
            for key, value in recipe.thoughts.items():
                setattr(config, key, value)
            config.check_thoughts()
            return decoder
        decoder = decoder.base
    rows = int(decoder.config.get_text_config().vocab_size)
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's vocabulary has {rows}; they "
            "do not belong together (check model.tokenizer)"
        )
    if pauses is not None:
        add_pause_tokens(tokenizer, pauses)
    if recipe.adapter.rank is not None:
        add_meta_tokens(tokenizer)
        grow_embeddings(decoder, tokenizer)
    initial = {key: getattr(section, key) for key in INITIAL}
    return QuietStarForCausalLM.from_base(decoder, tokenizer, **initial, **recipe.thoughts)


def _check_pause_token(tokenizer: PreTrainedTokenizerBase, section: ModelSection) -> None:
    if PAUSE_TOKEN not in tokenizer.get_vocab():
        raise UserError(
            f"data.pause_tokens is given and {section.name}, which has thoughts already, was trained"
            " without pause tokens; expected one that was trained with them, or model.base_only=true"
        )


def _load(section: ModelSection, quantize: str, options: dict[str, Any]) -> PreTrainedModel:
    assert section.name is not None  # checked with the recipe
    if section.revision is not None:
        options["revision"] = section.revision
    with blaming(f"cannot load model {section.name}"):
        options |= quantization(quantize, section.name, section.revision)
        return load_decoder(section.name, **options)


def _random_decoder(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> PreTrainedModel:
    """A decoder with random weights for ``model.config``, sized to the tokenizer."""
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    if options["dtype"] == "auto":
        del options["dtype"]
    return random_decoder(decoder_config(fields, len(tokenizer), ids), **options)


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
    if data.name in GENERATORS:
        settings, limit = data.lookup or {}, data.max_train_blocks
        return GENERATORS[data.name](settings, data.block_size, limit, data.eval_blocks)
    blocks = Blocks(data.block_size, data.packing, longest_talk(recipe) + 2)
    seed = recipe.training.get("data_seed")
    seed = int(recipe.training.get("seed", 42) if seed is None else seed)
    shared = ("config_name", "revision", "txt_documents", "streaming", "shuffle_buffer")
    options = {"seed": seed, **{key: getattr(data, key) for key in shared}}
    options["text_column"] = row_reader(data, tokenizer, seed)
    source = open_documents(name=data.name, files=data.files, split=data.split, **options)
    eval_source, eval_data, skip = source, None, 0
    if data.eval_blocks:
        if data.eval_files is not None:
            eval_source = open_documents(name=None, files=data.eval_files, split=data.split, **options)
        elif data.eval_split is not None:
            if data.name is None:
                raise UserError(
                    f"data.eval_split is {data.eval_split!r} but the data are local files; set"
                    " data.eval_files, or data.eval_split=null"
                )
            eval_source = open_documents(name=data.name, files=None, split=data.eval_split, **options)
        limit, what = data.eval_blocks, "the evaluation text"
        eval_data, used = read_blocks(
            eval_source, tokenizer, blocks, max_blocks=limit, what=what, progress=progress
        )
        skip = used if eval_source is source else 0
    limits: dict[str, Any] = {"max_blocks": data.max_train_blocks, "skip": skip}
    if data.streaming:
        return StreamedBlocks(source, tokenizer, blocks, repeat=True, **limits), eval_data
    train_data, _ = read_blocks(
        source, tokenizer, blocks, what="the training text", progress=progress, **limits
    )
    return train_data, eval_data
