"""``quietstar completion``: a script with which a shell completes the command line at the tab key."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from quietstar.cli.arguments import Commands
from quietstar.errors import UserError

SHELLS = ("bash", "zsh")
FOLDERS = ("DIR", "ADAPTER")
# A folder counts as a file here: what is in it can be completed further.
FILES = ("MODEL", "M")
# Both complete with what they print: the names of shipped recipes, and files.
RECIPES = {
    "bash": '_quietstar_recipes() { compgen -W "$names" -- "$1"; compgen -f -- "$1"; }',
    "zsh": '_quietstar_recipes() { _alternative "recipes:recipe:($names)" "files:file:_files"; }',
}


def add_parser(commands: Commands) -> None:
    """The command and its argument."""
    completion = commands.add_parser(
        "completion",
        help="a script that completes commands at the tab key",
        description="Print a script with which bash or zsh completes commands, options, recipes and"
        " files (needs shtab: pip install 'quietstar[completion]'). bash loads it where it lies in"
        " ~/.local/share/bash-completion/completions/quietstar, zsh as _quietstar in a folder of its"
        " fpath.",
        epilog="example: quietstar completion bash > quietstar.sh",
    )
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    from quietstar.cli.app import build_parser

    print(script(build_parser(), args.shell))
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for ``bash`` or ``zsh``; :class:`UserError` where shtab is not installed."""
    from quietstar.recipes.recipe import shipped_recipes

    try:
        import shtab
    except ImportError:
        raise UserError(
            "completion needs shtab, which is not installed: pip install 'quietstar[completion]'"
        ) from None
    recipes = dict.fromkeys(SHELLS, "_quietstar_recipes")
    for action in _actions(parser):
        if action.metavar == "RECIPE":
            action.complete = recipes  # type: ignore[attr-defined]  # where shtab looks
        elif action.metavar in FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type is Path or action.metavar in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    function = RECIPES[shell].replace("$names", " ".join(shipped_recipes()))
    text: str = shtab.complete(parser, shell=shell, preamble=function)
    return text


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of all commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
