"""Fused operators for Quiet-STaR, each with a plain PyTorch reference behind the same function."""

from quietstar_ext.dispatch import use_impl
from quietstar_ext.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sum
from quietstar_ext.linear_sample import linear_sample
from quietstar_ext.mixing_head import mixing_head
from quietstar_ext.native import build_info, use_simd
from quietstar_ext.sample_tokens import sample_tokens
from quietstar_ext.thought_attention import thought_attention, thought_attention_with_lse

__all__ = [
    "build_info",
    "linear_cross_entropy",
    "linear_cross_entropy_sum",
    "linear_sample",
    "mixing_head",
    "sample_tokens",
    "thought_attention",
    "thought_attention_with_lse",
    "use_impl",
    "use_simd",
]
