"""The Hugging Face model: forward, generate, and the checks before them."""

from quietstar.lazy import lazy_attributes

# What the module of this name held in version 0.1.0.
__getattr__ = lazy_attributes(
    __name__,
    {
        "QuietStarForCausalLM": "model",
        "QuietStarOutput": "model",
    },
)
