"""What argparse cannot read, said as one sentence with the nearest word that is known."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, NoReturn

from quietstar.errors import did_you_mean

NUMBERS = {int: "a whole number", float: "a number"}


class Parser(argparse.ArgumentParser):
    """Ends the process with status 2 and one sentence, without the usage that argparse puts before."""

    def error(self, message: str) -> NoReturn:
        """Say the sentence, and where the words are listed that the command takes."""
        _, asked, names = message.partition("arguments are required: ")
        message = f"{self.prog} needs {names}" if asked else message
        self.exit(2, f"quietstar: error: {message} ({self.prog} --help)\n")

    def leftover(self, words: list[str]) -> NoReturn:
        """End the process for words that this command does not take, the first of them named."""
        first, *after = words
        if not first.startswith("-"):
            self.error(f"{self.prog} takes no {first!r}")
        option, equals, value = first.partition("=")
        if option in self._options():
            self.error(f"{option} belongs behind the command, as in {self.prog} {first}")
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

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = list(map(str, action.choices))
        near = did_you_mean(str(value), known)
        if isinstance(action, argparse._SubParsersAction):
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
