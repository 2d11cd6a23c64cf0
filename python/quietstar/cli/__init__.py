"""The command line: one module per command; ``app`` holds the parser."""

from quietstar.cli.app import INTERRUPTED, TRACEBACK_VARIABLE, USER_ERROR, build_parser, main

__all__ = ["INTERRUPTED", "TRACEBACK_VARIABLE", "USER_ERROR", "build_parser", "main"]
