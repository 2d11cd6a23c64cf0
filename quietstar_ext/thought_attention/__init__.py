"""Attention of thought slots over the text and their own column, fused or composed of stock kernels."""

from quietstar_ext.thought_attention.api import thought_attention as thought_attention
from quietstar_ext.thought_attention.api import thought_attention_with_lse as thought_attention_with_lse
