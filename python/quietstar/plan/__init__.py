"""``quietstar plan``: what a step costs, and what fits."""

from quietstar.lazy import lazy_attributes

# What the module of this name held in version 0.1.0.
__getattr__ = lazy_attributes(
    __name__,
    {
        "CHUNK_BYTES": "costs",
        "CHUNK_ROWS": "costs",
        "CONTEXT_BYTES": "costs",
        "GAPS": "costs",
        "Rows": "costs",
        "Sizes": "costs",
        "Step": "costs",
        "activation_bytes": "costs",
        "decoder_sizes": "costs",
        "fits": "costs",
        "largest_batch": "costs",
        "peak_bytes": "costs",
        "rollout_bytes": "costs",
        "static_bytes": "costs",
        "step_flops": "costs",
        "step_of": "costs",
    },
)
