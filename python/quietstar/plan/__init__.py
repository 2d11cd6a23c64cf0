"""``quietstar plan``: what a step costs, and what fits."""

from quietstar.lazy import lazy_attributes

# What the module of this name held in version 0.1.0.
_NAMES = (
    "CHUNK_BYTES CHUNK_ROWS CONTEXT_BYTES GAPS Rows Sizes Step activation_bytes decoder_sizes fits"
    " largest_batch peak_bytes rollout_bytes static_bytes step_flops step_of"
)
__getattr__ = lazy_attributes(__name__, dict.fromkeys(_NAMES.split(), "costs"))
