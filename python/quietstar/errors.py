"""Errors that users can fix: one sentence each, shown without a traceback by the command line."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

LONGEST_REASON = 400
OURS = ("quietstar", "quietstar_ext")


class UserError(ValueError):
    """Something is wrong with a recipe, a data file or a folder.

    The message is one sentence that names the thing, says what came and what was expected.
    """


def did_you_mean(word: str, known: Iterable[str] | Mapping[str, str]) -> str:
    """The end of an error about an unknown word: the nearest known one; empty where none is near.

    Args:
        known: the known words; a mapping gives what to call each.
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    if not near:
        return ""
    return f"; did you mean {known[near[0]] if isinstance(known, Mapping) else near[0]}?"


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Turn what other packages raise while they work on a user's setting or file into a UserError.

    The block hands nothing but a user's input to another package; whatever that raises, of any type,
    becomes a :class:`UserError`. What this package raises passes unchanged: it has its own words, or is
    a bug of ours and keeps its traceback.

    Args:
        what: begins the sentence: ``model.config``, ``cannot load model x``.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _is_ours(error.__traceback__):
            raise
        raise UserError(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What an error says, in one line that is not too long."""
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename is not None else ""
        return f"{name}{error.strerror}"
    if type(error).__name__.startswith("StrictDataclass") and error.__cause__ is not None:
        return reason(error.__cause__)  # which class found it is of no interest
    words = " ".join(str(error).split())
    if "ignore_mismatched_sizes" in words:
        words = "its weights have other shapes than its configuration says"
    if unknown := re.match(r"Unrecognized configuration class <class '[\w.]*?(\w+)'> .*CausalLM", words):
        # Transformers' words go on with every class that it has.
        words = (
            f"transformers has no causal language model for a {unknown[1]}; expected a decoder of text"
        )
    if isinstance(error, KeyError | ZeroDivisionError | AttributeError) or not words:
        words = f"{type(error).__name__} {words}".strip()
    return words if len(words) <= LONGEST_REASON else f"{words[:LONGEST_REASON]} ..."


def _is_ours(traceback: TracebackType | None) -> bool:
    """Whether an error that has come out of a block was raised by this package's code.

    The last frame decides that is of this package or of another than torch, which does what it is told.
    """
    ours = False
    # The first two frames are this context manager's own and that of the block.
    below = traceback.tb_next.tb_next if traceback and traceback.tb_next else None
    while below is not None:
        package = str(below.tb_frame.f_globals.get("__name__")).partition(".")[0]
        if package in OURS:
            ours = True
        elif package != "torch" and package not in sys.stdlib_module_names:
            ours = False
        below = below.tb_next
    return ours


def check_seed(seed: int | None) -> None:
    """Raise :class:`UserError` for a ``--seed`` that torch does not take."""
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise UserError(f"--seed is {seed}; expected a whole number of at most 63 bits")
