"""Everything that writes or opens a folder of a model."""
