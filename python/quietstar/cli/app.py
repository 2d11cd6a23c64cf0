"""The command line: all commands together, and errors as sentences.

A command's module holds its arguments and what it runs; it imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from quietstar.cli import completion, demo, generate, info, inspect, merge, plan, star, train
from quietstar.cli import eval as evaluate
from quietstar.cli.arguments import INTERRUPTED
from quietstar.cli.parser import Parser
from quietstar.training.process import keep_freed_memory, let_threads_sleep
from quietstar.versions import package_versions

COMMANDS = (info, train, star, plan, merge, generate, inspect, evaluate, demo, completion)
USER_ERROR = 2
TRACEBACK_VARIABLE = "QUIETSTAR_TRACEBACK"
# What is done by these is found again.
CONTINUED = ("train", "star", "eval", "demo")


def build_parser() -> Parser:
    """The argument parser with all commands."""
    parser = Parser(
        prog="quietstar",
        description="Quiet-STaR: language models that think before each token.",
        epilog=f"{TRACEBACK_VARIABLE}=1 shows where an error came from,\nQUIETSTAR_LOG=1 which operators"
        " are called.\n\nexample: quietstar demo --quick",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"quietstar {package_versions()['quietstar']}"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    for own in commands.choices.values():
        own.set_defaults(parser=own)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a user's error, 130 when interrupted."""
    parser = build_parser()
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser.check_first(words)
    args, rest = parser.parse_known_args(words)
    if args.command is None and not rest:
        parser.print_help(sys.stderr)
        return USER_ERROR
    options = [word for word in rest if word.startswith("-")]
    if rest and hasattr(args, "settings") and not options:
        args.settings = [*args.settings, *rest]  # key=value words after an option, which argparse leaves
    elif rest:
        owner = args.parser if args.command else parser
        owner.leftover(rest[rest.index(options[0]) :] if options else rest)
    let_threads_sleep()
    keep_freed_memory()
    # bitsandbytes asks for another package on some CPUs, where nothing here would use it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_about_something_else)
    try:
        importlib.import_module("quietstar.modeling.model")  # transformers knows the type from here on
        status = int(args.run(args) or 0)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        continues = "; the same command continues where it stopped"
        _say("interrupted" + (continues if args.command in CONTINUED else ""))
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as in `quietstar info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that closing it is quiet
        return 0
    except Exception as error:
        message = _users_fault(error)
        if message is None or os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0"):
            traceback.print_exc()
            return 1 if message is None else USER_ERROR
        _say(f"error: {message}")
        return USER_ERROR


def _is_about_something_else(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.getMessage()


def _say(message: str) -> None:
    # A progress bar may have left its line open.
    start = "\n" if sys.stderr.isatty() else ""
    print(f"{start}quietstar: {message}", file=sys.stderr, flush=True)


def _users_fault(error: Exception) -> str | None:
    """The message for what a user can fix (bad input, files, devices); None for a bug of ours.

    This package, transformers and datasets reject input with a ValueError.
    """
    words = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        place = error.filename if error.filename is not None else "writing"
        return f"{place}: {error.strerror}"
    if isinstance(error, ValueError | OSError):
        return words or None
    trainer = sys.modules.get("quietstar.training.trainer")
    if trainer is not None and isinstance(error, trainer.NonFiniteLoss):
        return words
    if type(error).__name__ == "SafetensorError" and "os error" in words:
        return f"a file cannot be read or written: {words}"
    if _is_out_of_memory(error, words):
        return (
            f"out of memory ({words}); lower the batch size or the length of rows, or see what fits with"
            " quietstar plan"
        )
    return None


def _is_out_of_memory(error: Exception, words: str) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    # The CPU's allocator has no error of its own.
    return torch is not None and (
        isinstance(error, torch.OutOfMemoryError)
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in words)
    )
