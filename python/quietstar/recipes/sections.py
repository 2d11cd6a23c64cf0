"""The sections of a recipe that are not another class's fields: model, data, adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class ModelSection:
    """Which decoder is wrapped, and its tokenizer.

    Args:
        name: a model on the hub, a local folder or a GGUF file; a Quiet-STaR checkpoint is continued.
        config: instead of ``name``, a Hugging Face configuration (``model_type`` and its fields):
            the model starts from random weights. ``vocab_size`` and token ids come from the
            tokenizer.
        tokenizer: a tokenizer on the hub, a local folder, a GGUF file, or ``stdlib`` (a small
            byte-level BPE trained on the Python standard library); the model's own where null.
        special_tokens: what a text of the data becomes that spells a special token, ``<|endoftext|>``
            say: ``text`` like any other, or that token (``control``), for data with a template's tokens
            written into them; null: what the tokenizer was saved with, ``text`` if with none.
        vocab_size: size of the ``stdlib`` tokenizer.
        dtype: ``auto`` (as stored; of a GGUF file float32), ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: attention of ordinary passes and of the text in passes with thoughts:
            ``sdpa`` or ``eager``; the family's own where null.
        revision: branch, tag or commit on the hub.
        base_only: of a Quiet-STaR checkpoint take only the decoder and start the thought parts
            anew.
        init_embedding_from: the start and end embeddings begin as the mean embedding of this text's
            tokens.
        init_start_from: the same for the start embedding alone; null: ``init_embedding_from``.
        init_end_from: the same for the end embedding alone; null: ``init_embedding_from``.
        init_mixing_weight: the weight that the mixing head gives every thought at first; null: 0, or 0.5
            with ``thoughts.mixing_activation: sigmoid``. Of a new model alone, like the three
            before it: one with thoughts that is trained on keeps its own.
        fused_layers: norms, rotary embeddings, gates and residual adds as fused kernels
            (:mod:`quietstar.thinking.fused_layers`): ``auto`` (compiled on CUDA), ``compile``, ``liger``
            or ``off``.
        reuse_rollout: linear layers take their outputs of the rollout's rows from the rollout, for the
            memory of these outputs (:mod:`quietstar.thinking.kept_outputs`).
    """

    name: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    special_tokens: Literal["text", "control"] | None = None
    vocab_size: int = 2048
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    attn_implementation: Literal["sdpa", "eager"] | None = None
    revision: str | None = None
    base_only: bool = False
    init_embedding_from: str = "---"
    init_start_from: str | None = None
    init_end_from: str | None = None
    init_mixing_weight: float | None = None
    fused_layers: Literal["auto", "compile", "liger", "off"] = "auto"
    reuse_rollout: bool = False


@dataclass
class DataSection:
    """Which text, and how it is cut into rows of tokens.

    Args:
        name: a data set on the hub, ``stdlib`` (splits ``train``, ``heldout``), or ``lookup`` (a
            small language of serial look-ups, :mod:`quietstar.data.lookup`; needs ``max_train_blocks``).
        lookup: of the language ``lookup``: ``language`` (its seed), ``seed`` (of the text), and the
            shares of :class:`quietstar.data.lookup.TextMix`.
        config_name: configuration of a hub data set.
        revision: branch, tag or commit of a hub data set.
        files: instead of ``name``, local files or globs: jsonl, json, csv, tsv, parquet, anything else
            as plain text (all but parquet also as .gz).
        split: which part of the data set ``name`` to train on.
        eval_split: which to evaluate on.
        eval_files: local files to evaluate on.
        text_column: the column that holds the text.
        prompt, completion: instead of text, templates over the columns of a row
            (:mod:`quietstar.data.templates`), e.g. ``"Q: {question}"`` and ``" {answer:number}"``; the
            loss is on the completion. ``completion`` may be a list of templates, or of ``{template,
            share}``, of which each row draws one by its share and the data seed.
        messages: instead of text, the column that holds a conversation, a list of ``{role, content}``;
            it goes through the tokenizer's chat template, and the assistant's last message is the
            completion.
        preset: a known question set (:mod:`quietstar.data.presets`): its templates, and its name on the
            hub where neither ``name`` nor ``files`` is given.
        txt_documents: what one document is in a text file: ``file``, ``paragraph`` or ``line``.
        streaming: read while training instead of before it; needs ``training.max_steps``.
        shuffle_buffer: rows held for shuffling while streaming from the hub.
        packing: ``concat`` (documents one after another), ``packed`` (the same, kept apart: no
            attention, no talk from one to the next) or ``document`` (one per row, padded; the default of
            prompts and completions, which ``packed`` does not cut).
        pause_tokens: so many learnable pause tokens end every prompt, in the stream itself: no loss is
            on them, and later tokens see them (:mod:`quietstar.data.pause_tokens`).
        padding_side: ``right`` or ``left``.
        block_size: tokens in a row.
        max_train_blocks: stop reading after so many rows.
        eval_blocks: rows to evaluate on; without ``eval_split`` or ``eval_files`` they are taken,
            whole documents at a time, from the front of the training text, which then starts after
            them.
            0: no evaluation.
    """

    name: str | None = None
    lookup: dict[str, Any] | None = None
    config_name: str | None = None
    revision: str | None = None
    files: list[str] | None = None
    split: str = "train"
    eval_split: str | None = None
    eval_files: list[str] | None = None
    text_column: str | None = "text"
    prompt: str | None = None
    completion: str | list[Any] | None = None
    messages: str | None = None
    preset: str | None = None
    txt_documents: Literal["file", "paragraph", "line"] = "file"
    streaming: bool = False
    shuffle_buffer: int = 1000
    packing: Literal["concat", "document", "packed"] = "concat"
    pause_tokens: int | None = None
    padding_side: Literal["right", "left"] = "right"
    block_size: int = 256
    max_train_blocks: int | None = None
    eval_blocks: int = 0


@dataclass
class AdapterSection:
    """Train adapters (:mod:`quietstar.checkpoints.adapters`) instead of the whole model.

    Args:
        rank: of the low-rank updates; null: the whole model is trained.
        alpha: the updates are scaled by ``alpha / rank``.
        targets: last parts of the names of the layers to adapt; null: every linear layer of the decoder.
        quantize: ``4bit``: load the frozen decoder in 4 bits (QLoRA; needs bitsandbytes).
    """

    rank: int | None = None
    alpha: int = 32
    targets: list[str] | None = None
    quantize: Literal["none", "4bit"] = "none"
