"""Runs as data: YAML, its sections, what they build, the folder of a run."""
