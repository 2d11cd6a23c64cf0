"""The error that a user can mend: one sentence, shown without a traceback by the command line."""

from __future__ import annotations


class UserError(ValueError):
    """Something in a recipe, a data file or a folder is not as it should be.

    The message is one sentence that names the thing, says what came and what was expected.
    """
