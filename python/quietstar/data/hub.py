"""The Hugging Face Hub: asked once whether it can be reached, and one sentence where it cannot.

By itself huggingface_hub asks six times for every file, for half a minute and with a warning each time,
before it looks into its cache.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quietstar.errors import UserError, reason
from quietstar.files import is_file, is_folder

# Seconds for which an answer holds: a model is several files, and a network may come back.
HOLDS = 60.0
_answers: dict[str, tuple[float, str | None]] = {}  # by endpoint: when, and why it cannot be reached


class NotOnHub(UserError, OSError):
    """A name that stands for nothing; an OSError as well, which is what transformers raises for one."""


@contextmanager
def from_hub(kind: str, name: str, instead: str = "") -> Iterator[None]:
    """Within, a name on the hub is read from the local cache alone where the hub cannot be reached.

    Args:
        kind: what the name stands for in a sentence, ``model`` or ``data set``; empty where that is not
            known, as of a tokenizer, which may be the model's.
        name: nothing is asked about files and folders.
        instead: what could be given instead, for the end of the sentence.

    Raises:
        NotOnHub: for a name that is neither in the cache nor, as far as can be seen, on the hub.
    """
    if is_folder(name) or is_file(name):
        yield
        return
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    what = f"{kind} {name}".strip()
    nowhere = f"{what} is neither a folder nor a name on the Hugging Face Hub"
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise NotOnHub(f"{nowhere}{instead}") from None
    why_not = None
    try:
        with cached_if_unreachable() as why_not:
            yield
    except UserError:
        raise
    except OSError as error:
        if error.errno is not None and not isinstance(error, FileNotFoundError):
            raise  # a full disk, a file that may not be read
        if why_not is not None and _has_part(name):
            raise NotOnHub(
                f"{what} is not wholly in the local cache of the Hugging Face Hub, which cannot be"
                f" reached ({why_not}): {reason(error)}{instead}"
            ) from error
        if why_not is not None:
            raise NotOnHub(
                f"{what} is neither a folder nor in the local cache of the Hugging Face Hub,"
                f" which cannot be reached ({why_not}){instead}"
            ) from error
        found = error if error.__cause__ is None else error.__cause__
        if isinstance(found, RepositoryNotFoundError) and not isinstance(found, GatedRepoError):
            raise NotOnHub(f"{nowhere} (a private one needs `hf auth login`){instead}") from error
        raise


@contextmanager
def cached_if_unreachable() -> Iterator[str | None]:
    """Within, the local cache alone is read where the hub cannot be reached; gives why it cannot."""
    why_not = unreachable()
    with _offline(why_not is not None):
        yield why_not


def _has_part(name: str) -> bool:
    """Whether the cache holds anything under a name."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    kinds = (repo_folder_name(repo_id=name, repo_type=kind) for kind in ("model", "dataset"))
    return any(is_folder(Path(constants.HF_HUB_CACHE) / folder) for folder in kinds)


def unreachable() -> str | None:
    """Why the hub cannot be reached; None where it answers, whatever its answer is."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    when, why_not = _answers.get(constants.ENDPOINT, (-HOLDS, None))
    if time.monotonic() - when > HOLDS:
        for wait in (1.0, 0.0):  # a name server may have a bad moment
            try:
                get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            except Exception as error:  # of the HTTP client, which differs between releases
                why_not = f"{constants.ENDPOINT}: {reason(error)}"
                time.sleep(wait)
            else:
                why_not = None
                break
        _answers[constants.ENDPOINT] = time.monotonic(), why_not
    return why_not


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """HF_HUB_OFFLINE for as long as the block runs."""
    from huggingface_hub import constants

    # datasets has a copy of its own.
    places = [p for p in (constants, sys.modules.get("datasets.config")) if p is not None and wanted]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]
