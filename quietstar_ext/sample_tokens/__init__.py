"""One token drawn from every row of logits, fused."""

from quietstar_ext.sample_tokens.api import sample_tokens as sample_tokens
