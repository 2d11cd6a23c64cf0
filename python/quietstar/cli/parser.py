"""What argparse cannot read, said as one sentence with the nearest word that is known."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from quietstar.errors import did_you_mean

NUMBERS = {int: "a whole number", float: "a number"}


class Parser(argparse.ArgumentParser):
    """Ends the process with status 2 and one sentence, without the usage that argparse puts before."""

    def error(self, message: str) -> NoReturn:
        """Say the sentence, and where the words are listed that the command takes."""
        _, asked, names = message.partition("arguments are required: ")
        message = f"{self.prog} needs {names}" if asked else message
        if lacks := re.fullmatch(r"argument (?:.*/)?(\S+): expected one argument", message):
            message = f"{lacks[1]} needs a value"
        if both := re.fullmatch(r"argument (\S+): not allowed with argument (\S+)", message):
            message = f"{both[2]} and {both[1]} cannot be combined"
        self.exit(2, f"quietstar: error: {message} ({self.prog} --help)\n")

    def check_first(self, words: Sequence[str]) -> None:
        """End the process for an option before the command: argparse takes its value for the command."""
        first = words[0] if words else ""
        if not first.startswith("-") or first in ("-", "--"):
            return
        option, commands = first.partition("=")[0], self._commands()
        if any(known.startswith(option) for a in self._actions for known in a.option_strings):
            return
        places = [place for place, word in enumerate(words) if word in commands]
        takers = [place for place in places if option in commands[words[place]]._options()]
        if not places:
            self.leftover(list(words))
        place = (takers or places)[0]
        before, command, after = words[:place], words[place], words[place + 1 :]
        if not takers:
            commands[command].leftover(list(before))
        line = shlex.join([*self.prog.split(), command, *after, *before])
        commands[command].error(f"{option} belongs behind the command, as in {line}")

    def leftover(self, words: list[str]) -> NoReturn:
        """End the process for words that this command does not take, the first of them named."""
        first, *after = words
        if not first.startswith("-"):
            self.error(f"{self.prog} takes no {first!r}")
        option, equals, value = first.partition("=")
        near = did_you_mean(option.lstrip("-"), {name.lstrip("-"): name for name in self._options()})
        if (
            not near
            and option.startswith("--")
            and any(action.dest == "settings" for action in self._actions)
        ):
            given = value if equals else next((w for w in after if not w.startswith("-")), "VALUE")
            key = option.lstrip("-").replace("-", "_")
            near = f"; what a recipe sets is changed without dashes: {key}={given}"
        self.error(f"{self.prog} has no option {option}{near}")

    def _options(self) -> Iterable[str]:
        """The long ones."""
        names = (name for action in self._actions for name in action.option_strings)
        return [name for name in names if name.startswith("--")]

    def _commands(self) -> Mapping[str, Parser]:
        subparsers = (a for a in self._actions if isinstance(a, argparse._SubParsersAction))
        return {name: parser for action in subparsers for name, parser in action.choices.items()}

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = list(map(str, action.choices))
        near = did_you_mean(str(value), known)
        if isinstance(action, argparse._SubParsersAction):
            asked = {"help": "--help", "version": "--version"}  # what others have as commands
            near = did_you_mean(str(value), {**{name: name for name in known}, **asked})
            raise argparse.ArgumentError(None, f"no command {value!r}{near or _one_of(known)}")
        what = f"{action.option_strings[-1]} is {value!r}" if action.option_strings else f"no {value!r}"
        raise argparse.ArgumentError(None, f"{what}{_one_of(known)}{near}")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            if not (action.option_strings and action.type in NUMBERS):
                raise
            expected = NUMBERS[action.type]
            message = f"{action.option_strings[-1]} is {arg_string!r}; expected {expected}"
            raise argparse.ArgumentError(None, message) from error


def _one_of(known: list[str]) -> str:
    return f"; expected one of {', '.join(known)}"
