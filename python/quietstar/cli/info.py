"""``quietstar info``: versions, what was compiled, what torch offers, which implementation runs."""

from __future__ import annotations

import argparse

from quietstar.cli.arguments import Commands


def add_parser(commands: Commands) -> None:
    """The command, which has no arguments."""
    info = commands.add_parser("info", help="versions, what was compiled, what will run where")
    info.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    import torch

    from quietstar.cli.installed import PROBES, compiled, implementation, torch_offers
    from quietstar.versions import package_versions

    for title, facts in (
        ("versions", {**package_versions(), "torch": torch.__version__}),  # which build, too
        ("compiled", compiled()),
        ("torch", torch_offers()),
    ):
        _show(title, facts)
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        _show(f"operators on {device}", {name: implementation(name, device) for name in PROBES})
    return 0


def _show(title: str, facts: dict[str, str]) -> None:
    print(title)
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"  {key:<{width}}  {value}")
    print()
