"""Mixing the prediction after a thought with the one without it, fused."""

from quietstar_ext.mixing_head.api import mixing_head as mixing_head
