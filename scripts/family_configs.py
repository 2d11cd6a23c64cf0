"""A tiny configuration of every causal model type of transformers, with what its family is known for
switched on: windows shorter than the text, experts, latent attention, soft-caps, mixed layers.

``SIZES`` holds for every field of that name that a configuration class takes; ``EXTRA`` says what a
family needs besides, and overrides. A value that is a dictionary with a ``model_type`` is the
configuration of a part and gets the same treatment.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 99
# Smaller ids are ordinary tokens in every family; images and sounds have theirs above.
ORDINARY = 90
# Shorter than the text, and shorter than a thought with its two meta tokens.
WINDOW = 4

CAUSAL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _fields(value: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, value)


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **_fields(32, "hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "embedding_dim"),
    **_fields(
        48, "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "dff"
    ),
    **_fields(48, "ffn_hidden_size", "dim_ff", "d_inner", "expert_ffn_hidden_size", "feed_forward_size"),
    **_fields(24, "moe_intermediate_size", "shared_expert_intermediate_size"),
    **_fields(24, "shared_intermediate_size", "shared_experts_intermediate_size"),
    **_fields(2, "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    **_fields(2, "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
    **_fields(4, "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    **_fields(4, "encoder_attention_heads", "decoder_attention_heads"),
    **_fields(4, "num_encoder_attention_heads", "num_decoder_attention_heads"),
    **_fields(2, "num_key_value_heads", "num_kv_heads"),
    **_fields(8, "head_dim", "dim_head", "d_head", "kv_channels", "attention_head_size"),
    **_fields(128, "max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    # A decoder, even where the family also has an encoder.
    **{"is_decoder": True, "is_encoder_decoder": False, "add_cross_attention": False},
    **_fields(
        WINDOW, "sliding_window", "sliding_window_size", "local_attention", "attention_window_size"
    ),
    "use_sliding_window": True,
    "max_window_layers": 1,
    **_fields(4, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    **_fields(2, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
    **_fields(1, "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    **{"first_k_dense_replace": 1, "num_dense_layers": 1},
    **_fields(2, "n_group", "num_expert_group"),
    "topk_group": 1,
    "mlp_layer_types": ["dense", "sparse"],
    # Latent attention: keys of 4 + 8 against values of 8.
    **{"kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8},
    "v_head_dim": 8,
    **{"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 5.0,
    **_fields(8.0, "final_logit_softcapping", "logits_soft_cap"),
    **{"logit_scale": 0.5, "logits_scaling": 2.0, "embedding_multiplier": 1.5},
    **{"residual_multiplier": 0.7, "attention_multiplier": 0.4},
    # State space and linear attention layers.
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_num_heads": 8},
    **{"mamba_head_dim": 8, "ssm_state_size": 8, "state_size": 8, "mamba_dt_rank": 4},
    **{"time_step_rank": 4, "chunk_size": 8, "mamba_chunk_size": 8, "n_mamba_heads": 2},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
    **{"linear_value_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 4},
}

_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_PER_TYPE_ROPE = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 100000.0},
    }
}
# Parts that text never runs through, as small as they can be.
_IMAGES = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 16, "patch_size": 8},
}
_PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
_GEMMA4 = {
    **{"num_hidden_layers": 4, "layer_types": _MIXED["layer_types"] * 2},
    **{"num_kv_shared_layers": 2, "global_head_dim": 16},
}
_GEMMA4_TOKENS = {"image_token_id": 90, "video_token_id": 91, "audio_token_id": 92}
_BLT_PART = {
    **{"hidden_size": 32, "hidden_size_global": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "intermediate_size": 48, "cross_attn_k": 1},
}
_MAMBA_OF_64 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}

EXTRA: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**_LINEAR, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        **{"encoder_hash_byte_group_vocab": 50, "cross_attn_k": 1},
        **{f"{part}_config": _BLT_PART for part in ("patcher", "encoder", "decoder", "global")},
    },
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {**_MIXED, **_PER_TYPE_ROPE},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
        **{"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8, "hc_mult": 2, "head_dim": 16},
    },
    "dots1": {"max_window_layers": 0},
    "dots3_note": {
        "vision_config": {**_IMAGES, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    },
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"],
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 12},
        **{"swa_kv_lora_rank": 16, "swa_head_dim": 12, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
        "head_dim": 12,
    },
    "emu3": {"vq_config": {"base_channels": 32, "hidden_size": 32, "codebook_size": 16}},
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA_OF_64},
    "fuyu": {**{"image_size": 16, "patch_size": 8, "image_token_id": 94}},
    "gemma3": {
        # This class leaves the logits as they are.
        "text_config": {**_MIXED, "final_logit_softcapping": None},
        **{"vision_config": _IMAGES, "mm_tokens_per_image": 4, "image_token_index": 94},
    },
    "gemma3n_text": {
        **{"num_hidden_layers": 4, "layer_types": _MIXED["layer_types"] * 2, "num_kv_shared_layers": 2},
        **{**_PER_LAYER, "laurel_rank": 8, "altup_num_inputs": 2},
        "activation_sparsity_pattern": [0.0] * 4,
    },
    # The larger checkpoints: experts, keys that are values. The small ones are gemma4_text below.
    "gemma4": {
        "text_config": {
            **{**_MIXED, "num_hidden_layers": 2, "num_kv_shared_layers": 0},
            **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
            **{"global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
            "enable_moe_block": True,
        },
        **_GEMMA4_TOKENS,
    },
    "gemma4_unified": _GEMMA4_TOKENS,
    "gemma4_text": {**_GEMMA4, **_PER_LAYER},
    "gemma4_unified_text": _GEMMA4,
    "gemma4_assistant": {
        "backbone_hidden_size": 32,
        "text_config": {
            **{"model_type": "gemma4_text", **_GEMMA4, "num_kv_shared_layers": 4},
            **{"vocab_size_per_layer_input": 0, "hidden_size_per_layer_input": 0},
        },
    },
    "gemma4_unified_assistant": {
        "backbone_hidden_size": 32,
        "text_config": {"model_type": "gemma4_unified_text", **_GEMMA4, "num_kv_shared_layers": 4},
    },
    "git": {"vision_config": _IMAGES},
    "got_ocr2": {"vision_config": {**_IMAGES, "output_channels": 16}, "image_token_index": 94},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_LINEAR, **_MAMBA_OF_64},
    "hrm_text": {"H_cycles": 2, "L_cycles": 2},
    "inkling2_text": {
        "layer_types": ["hybrid_sliding", "hybrid"],
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
        **{"unpadded_vocab_size": VOCABULARY, "d_rel": 4, "rel_extent": 16},
    },
    "inkling_text": {
        "layer_types": ["hybrid_sliding", "hybrid"],
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
        **{"d_rel": 4, "rel_extent": 16},
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "jetmoe": {"num_key_value_heads": 4},
    "kimi_linear": _LINEAR,
    "laguna": {**_MIXED, "num_attention_heads_per_layer": [4, 4]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"vision_config": {**_IMAGES, "vision_output_dim": 32}},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"],
        **{"no_rope_layers": [1, 0], "attention_chunk_size": 8, "intermediate_size_mlp": 48},
        **{"num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
    },
    "longcat_flash": {"head_dim": 4},
    "mellum": _MIXED,
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 4,
    },
    "lara_mini": _LINEAR,
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "mllama": {"vision_config": {**_IMAGES, "num_global_layers": 1, "attention_heads": 2}},
    "mllama_text_model": {"cross_attention_layers": []},
    "modernbert-decoder": _MIXED,
    "moshi": {
        "audio_encoder_config": {"num_filters": 4, "codebook_size": 16, "codebook_dim": 8},
        **{"ffn_dim": 48, "audio_vocab_size": 16},
        "depth_decoder_config": {"input_size": 32, "ffn_dim": 48},
    },
    "moss_transcribe_diarize": {"audio_token_id": 94},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention"],
        **{
            "num_hidden_layers": ...,
            "n_groups": 1,
            "expand": 2,
            "moe_shared_expert_intermediate_size": 24,
        },
    },
    "olmo_hybrid": _LINEAR,
    "openai-gpt": {},
    "phi3": {"original_max_position_embeddings": 128},
    "phi4_multimodal": {
        "original_max_position_embeddings": 128,
        "vision_config": _IMAGES,
        "audio_config": {"num_blocks": 1, "ext_pw_out_channel": 32, "nemo_conv_channels": 8},
    },
    "prophetnet": {"encoder_ffn_dim": 48},
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        **{"hc_count": 2, "hc_lowrank": 8, "ngram_vocab_size_base": 50, "ple_embed_dim": 32},
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "reformer": {
        **{
            "attn_layers": ["local", "local"],
            "axial_pos_shape": [8, 16],
            "axial_pos_embds_dim": [16, 16],
        },
        **{"local_attn_chunk_length": 8, "num_hidden_layers": ...},
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "smollm3": {"no_rope_layers": [1, 0]},
    "whisper": {"num_mel_bins": 8, "max_source_positions": 16},
    "xlm": {"causal": True, "n_langs": 1},
    "xlstm": {"num_blocks": 2},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        **{"use_mamba_kernels": False, "num_hidden_layers": 2, "adapter_rank": 4},
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def config_class(family: str) -> type[PretrainedConfig]:
    return CONFIG_MAPPING[family]


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """The configuration of ``family`` (a model type), with ``changes`` to what the tables say."""
    kind = config_class(family)
    return kind(**_settings(kind, {**EXTRA.get(family, {}), **changes}))


def _settings(kind: type[PretrainedConfig], extra: dict[str, Any]) -> dict[str, Any]:
    taken = inspect.signature(kind.__init__).parameters
    settings = {name: value for name, value in SIZES.items() if name in taken}
    if "qk_rope_head_dim" in taken:
        settings.pop("head_dim", None)  # follows from the parts
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    if "layer_types" in taken and "sliding_attention" in (kind().layer_types or []):
        settings |= _MIXED
    settings |= extra
    for name, part in _parts(kind).items():
        given = settings.get(name, {})
        part = CONFIG_MAPPING[given["model_type"]] if "model_type" in given else part
        own = EXTRA.get(part.model_type, {})
        settings[name] = {**_settings(part, {**own, **given}), "model_type": part.model_type}
    return {name: value for name, value in settings.items() if value is not ...}


def _parts(kind: type[PretrainedConfig]) -> dict[str, type[PretrainedConfig]]:
    """The configurations that a composite one holds."""
    found = {}
    # The older versions of transformers have the classes alone.
    classes = {n: part for n, part in kind.sub_configs.items() if hasattr(part, "model_type")}
    for name, part in getattr(kind, "sub_configs_defaults", classes).items():
        if not isinstance(part, type):
            if part.optional:
                continue
            part = CONFIG_MAPPING[part.model_type] if part.model_type else part.config_class
        found[name] = part
    return found


def switched_on(decoder: PreTrainedModel) -> str:
    """What is special about a decoder, read from its configuration, as in "window 4, grouped keys"."""
    config = decoder.config.get_text_config(decoder=True)

    def first(*names: str) -> Any:
        for name in names:
            with suppress(RuntimeError):  # a field that differs from layer to layer
                if found := getattr(config, name, None):
                    return found
        return None

    types = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    experts = first("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    chosen = first("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token")
    shared = first("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
    heads, groups = first("num_attention_heads"), first("num_key_value_heads", "num_kv_heads")
    window = first("sliding_window", "sliding_window_size", "attention_window_size", "window_size")
    rotary = getattr(config, "rope_parameters", None) or {}
    rotary = [rotary, *(part for part in rotary.values() if isinstance(part, dict))]
    kinds = {part.get("rope_type", "default") for part in rotary} - {"default"}
    partial = [part["partial_rotary_factor"] for part in rotary if "partial_rotary_factor" in part]
    names = [name for name, _ in decoder.named_parameters()]
    found = [
        " and ".join(types).replace("_attention", "") + " layers" if len(types) > 1 else "",
        f"window {window}" if window and (not types or any("sliding" in t for t in types)) else "",
        f"{experts} experts, {chosen} per token" if experts and chosen else "",
        f"{shared} shared by all tokens" if experts and shared else "",
        "latent attention" if first("kv_lora_rank") else "",
        "grouped keys" if heads and groups and groups < heads else "",
        f"rotary type {', '.join(sorted(kinds))}" if kinds else "",
        f"partial rotary {min(partial):g}" if partial and min(partial) < 1 else "",
        "learned positions" if any("position_emb" in n or ".wpe." in n for n in names) else "",
        "attention sinks" if any("sink" in name for name in names) else "",
        "query and key norms"
        if any("q_norm" in name or "q_layernorm" in name for name in names)
        else "",
        "soft-cap on attention" if first("attn_logit_softcapping") else "",
        "soft-cap on logits" if first("final_logit_softcapping", "logits_soft_cap") else "",
        "scaled logits" if first("logits_scaling", "logit_scale") else "",
        "keys shared between layers" if first("num_kv_shared_layers") else "",
        "per-layer embeddings" if first("hidden_size_per_layer_input") else "",
    ]
    return ", ".join(part for part in found if part)
