"""Tiny random models of every tested family."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from quietstar import QuietStarForCausalLM
from quietstar.thinking.layout import TextRanges
from quietstar.thinking.rollout import Thoughts
from quietstar.thinking.text_batch import TextBatch

VOCABULARY = 96

_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_WINDOWED = {
    **_LLAMA_LIKE,
    "head_dim": 16,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"],
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# A window of 7 is shorter than the tests' texts, so that it is active.
FAMILIES: dict[str, dict] = {
    "llama": {**_LLAMA_LIKE},
    "mistral": {**_LLAMA_LIKE, "sliding_window": 7},
    "qwen2": {**_LLAMA_LIKE, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {**_LLAMA_LIKE, "head_dim": 16},
    "gemma2": {
        **_WINDOWED,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3_text": {**_WINDOWED, "query_pre_attn_scalar": 16},
    "phi": {**_LLAMA_LIKE, "num_key_value_heads": 4},  # its output layer has a bias
    "phi3": {**_LLAMA_LIKE, "sliding_window": 7},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {**_LLAMA_LIKE, "rotary_pct": 0.5},
    "olmo2": {**_LLAMA_LIKE},
    "gpt_oss": {**_WINDOWED, **_EXPERTS},
    # Latent attention: keys of 8 + 4 against values of 8, and a cache of what both are made from.
    "deepseek_v3": {
        **_LLAMA_LIKE,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    },
    # Keys are repeated for the experts behind its cache.
    "jetmoe": {**_LLAMA_LIKE, **_EXPERTS, "num_key_value_heads": 4, "kv_channels": 8},
}

_CONVOLVED = {**_LLAMA_LIKE, "layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}
_LINEAR = {
    **_LLAMA_LIKE,
    **{"layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 16},
    **{"num_hidden_layers": 3, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_conv_kernel_dim": 4},
}
_STATE_SPACES = {
    **{**_LLAMA_LIKE, "num_hidden_layers": 3, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    **{"mamba_expand": 2, "mamba_n_groups": 2, "mamba_chunk_size": 4, "mamba_proj_bias": True},
}
_SHARED_EXPERTS = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "shared_expert_intermediate_size": 24,
}
# Some layers hand a state from token to token. Biases make padding visible where it is not left out.
HYBRIDS: dict[str, dict] = {
    "lfm2": {**_CONVOLVED, "conv_bias": True},
    "lfm2_moe": {
        **{**_CONVOLVED, "conv_bias": True, "num_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 24, "num_dense_layers": 1},
    },
    "qwen3_next": {**_LINEAR, **_SHARED_EXPERTS},
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": {**_LINEAR, **_SHARED_EXPERTS},
    # A decay for each element of the keys, and latent attention without positions.
    "kimi_linear": {
        **{**_LLAMA_LIKE, "num_key_value_heads": 4, "num_hidden_layers": 3, "linear_num_heads": 4},
        **{"layer_types": _LINEAR["layer_types"], "linear_head_dim": 8, "linear_conv_kernel_dim": 4},
        **{"kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4},
        **{"v_head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
        **{"topk_group": 1, "moe_intermediate_size": 24},
    },
    "bamba": {**_STATE_SPACES, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **{**_STATE_SPACES, **_EXPERTS, "shared_intermediate_size": 24},
        "position_embedding_type": "rope",
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        **{"embedding_multiplier": 1.5, "residual_multiplier": 0.6, "attention_multiplier": 0.3},
        "logits_scaling": 1.7,
    },
    # Every layer attends and hands a state on, and there is a multiplier at every door. (Its gated norm,
    # where it is on, loses a dimension of single tokens in transformers 5.17.)
    "falcon_h1": {
        **{**_STATE_SPACES, "num_hidden_layers": 2, "mamba_d_ssm": 64},
        **{"embedding_multiplier": 1.6, "lm_head_multiplier": 0.4, "mlp_multipliers": [0.8, 1.3]},
        **{"key_multiplier": 0.7, "attention_in_multiplier": 1.2, "attention_out_multiplier": 0.9},
        **{"ssm_in_multiplier": 1.1, "ssm_out_multiplier": 0.8},
        "ssm_multipliers": [0.9, 1.1, 1.2, 0.8, 0.7],
    },
    "nemotron_h": {
        **{name: value for name, value in _LLAMA_LIKE.items() if name != "num_hidden_layers"},
        "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention"],
        **{"head_dim": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2},
        **{
            "expand": 2,
            "chunk_size": 4,
            "use_bias": True,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
        },
        **{"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 24},
        "moe_shared_expert_intermediate_size": 24,
    },
    "olmo_hybrid": {**_LINEAR, "linear_num_key_heads": 4, "linear_allow_neg_eigval": True},
}


def tiny_gemma3(**changes) -> PreTrainedModel:
    """A decoder for text and images, with random weights; ``changes`` are to its text's part."""
    text = {name: value for name, value in FAMILIES["gemma3_text"].items() if not name.endswith("_id")}
    vision = {
        **{"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8},
    }
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**text, "max_position_embeddings": 128, **changes},
        vision_config=vision,
        mm_tokens_per_image=4,
        **{"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    )
    return _drawn(config, 0)


def tiny_decoder(family: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A random decoder whose weights are large enough for its attention to matter."""
    sizes = {**FAMILIES, **HYBRIDS}[family]
    decoder = _drawn(AutoConfig.for_model(family, **{**sizes, **changes}), seed)
    if family in HYBRIDS:
        with torch.no_grad():
            for parameter in decoder.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return decoder


def _drawn(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
            elif "sinks" in name:
                parameter.normal_(0, 1.0)
    return model


def thinking_model(
    decoder: str | PreTrainedModel = "llama",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    seed: int | None = None,
    mixing: float = 0.0,
    embeddings: float = 0.0,
    **fields: Any,
) -> QuietStarForCausalLM:
    """A model with thoughts around a decoder, or around the tiny one of a family.

    A new one predicts what its decoder does. With ``mixing`` and ``embeddings`` the mixing head's last
    layer and the start and end embeddings are drawn with that deviation, from a seed if there is one.
    """
    if isinstance(decoder, str):
        decoder = tiny_decoder(decoder)
    if tokenizer is None:
        start = 94 if decoder.config.get_text_config().vocab_size == VOCABULARY else 39
        fields = {"start_token_id": start, "end_token_id": start + 1, **fields}
    model = QuietStarForCausalLM.from_base(decoder, tokenizer, **fields)
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        if embeddings:
            model.thought_embedding.start.normal_(0, embeddings)
            model.thought_embedding.end.normal_(0, embeddings)
        if mixing:
            model.mixing_head.fc3.weight.normal_(0, mixing)
    return model


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of every gradient that there is, by its parameter's name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def packed_pass(model: Any, ids: Tensor, ranges: TextRanges, anchors: Tensor, thoughts: Tensor | None):
    """Hidden states of text [B, N, d] and slots [B, S, M, d]; anchors [B, M], thoughts [B, M, T]."""
    batch = TextBatch(model.config, ids, ranges, anchors=anchors)
    return model.thought_decoder.packed(batch, Thoughts(anchors, thoughts))
