"""A small Llama with a byte-level BPE tokenizer as a GGUF file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_decoder
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from quietstar.data.stdlib import END_OF_TEXT, PAD, train_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog; 51 and 7.\n" * 40
# A width of 32, the least that can be quantized.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "tie_word_embeddings": True}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHERS = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def write_gguf(
    path: Path, architecture: str = "llama"
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Write the file; returns the model, as it is there, and the tokenizer.

    The layers' linear weights are quantized (Q8_0). The test is skipped where gguf is not installed.
    """
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    tokenizer: Any = train_tokenizer([TEXT], 300)
    model = tiny_decoder("llama", vocab_size=len(tokenizer), **SIZES)
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(gguf, writer, tokenizer)
    state = dict(model.named_parameters())
    for name, weight in state.items():
        if name in _OTHERS:
            writer.add_tensor(_OTHERS[name], weight.detach().numpy())
            continue
        number, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        theirs, data = f"blk.{number}.{_LAYER[part]}.weight", weight.detach().numpy()
        if weight.dim() == 1:
            writer.add_tensor(theirs, data)
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quants.quantize(data, kind)
        with torch.no_grad():
            weight.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind)))
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if (count := heads.get(_LAYER[part])) is not None:
            # The rows of a head in the order of the original Llama: real and imaginary parts in turn.
            halves = packed.reshape(count, 2, packed.shape[0] // count // 2, -1)
            packed = halves.swapaxes(1, 2).reshape(packed.shape)
        writer.add_tensor(theirs, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval(), tokenizer


def _add_tokenizer(gguf: Any, writer: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    names = sorted(core["vocab"], key=core["vocab"].get)
    special = set(tokenizer.all_special_tokens)
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([kinds.CONTROL if name in special else kinds.NORMAL for name in names])
    writer.add_token_merges([" ".join(pair) for pair in core["merges"]])
    end = core["vocab"][END_OF_TEXT]
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(core["vocab"][PAD])
    writer.add_add_bos_token(False)
