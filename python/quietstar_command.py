"""The command ``quietstar``; where this module is loaded, the package imports nothing heavy at once."""

from __future__ import annotations


def main() -> int:
    """Run the command line of this process."""
    from quietstar.cli.app import main as run

    return run()
