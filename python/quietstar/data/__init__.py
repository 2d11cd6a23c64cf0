"""Rows of tokens: where text comes from, how it is cut and padded."""

from quietstar.lazy import lazy_attributes

# What the module of this name held in version 0.1.0.
__getattr__ = lazy_attributes(
    __name__,
    {
        "PACKINGS": "blocks",
        "TOKENIZER_BATCH": "blocks",
        "Block": "blocks",
        "Blocks": "blocks",
        "PackedBlock": "blocks",
        "StreamedBlocks": "blocks",
        "TokenBlocks": "blocks",
        "cut_blocks": "blocks",
        "read_blocks": "blocks",
        "tokenize": "blocks",
        "PaddingCollator": "collator",
        "collator_for": "collator",
    },
)
