"""``quietstar info``: versions, what was compiled, what torch offers, which implementation runs."""

from __future__ import annotations

import argparse
import json
from typing import Any

from quietstar.cli.arguments import Commands


def add_parser(commands: Commands) -> None:
    """The command and its argument."""
    info = commands.add_parser(
        "info",
        help="versions, what was compiled, what will run where",
        description="Say what is installed: versions, what was compiled, what torch offers, and which"
        " implementation each operator takes.",
        epilog="example: quietstar info --json",
    )
    info.add_argument("--json", action="store_true", help="the same as data, for a bug report")
    info.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from quietstar.cli.installed import report

    facts = report()
    print(json.dumps(facts, indent=2) if args.json else as_text(facts))
    return 0


def as_text(report: dict[str, dict[str, Any]]) -> str:
    """The report for a reader: a paragraph per part, a line per fact."""
    lines = []
    for title, facts in report.items():
        if title == "operators":
            for device, operators in facts.items():
                lines += _paragraph(f"operators on {device}", operators)
        else:
            lines += _paragraph(title, {name.replace("_", " "): fact for name, fact in facts.items()})
    return "\n".join(lines)


def _paragraph(title: str, facts: dict[str, Any]) -> list[str]:
    width = max(map(len, facts))
    return [title, *(f"  {name:<{width}}  {_words(fact)}" for name, fact in facts.items()), ""]


def _words(fact: Any) -> str:
    if isinstance(fact, dict):
        first, *more = fact.values()
        return f"{first} ({', '.join(map(_words, more))})" if more else str(first)
    if isinstance(fact, list):
        return ", ".join(map(str, fact)) or "none"
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    return "none" if fact in (None, "") else str(fact)
