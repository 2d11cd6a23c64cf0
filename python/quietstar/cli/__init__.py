"""The command line: one module per command; ``app`` holds the parser."""

from quietstar.cli.app import main

__all__ = ["main"]
