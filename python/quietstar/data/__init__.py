"""Rows of tokens: where text comes from, how it is cut and padded."""

from quietstar.lazy import lazy_attributes

_NAMES = (
    *("PACKINGS", "TOKENIZER_BATCH", "Block", "Blocks", "PackedBlock", "StreamedBlocks", "TokenBlocks"),
    *("cut_blocks", "read_blocks", "tokenize", "PaddingCollator", "collator_for"),
)
# What the module of this name held in version 0.1.0.
__getattr__ = lazy_attributes(__name__, dict.fromkeys(_NAMES, "blocks"))
