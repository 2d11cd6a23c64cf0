"""The part of the section data that makes prompts and completions of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quietstar.data.presets import PRESETS
from quietstar.data.readers import MessagesReader, RowReader, TemplateReader, check_preset
from quietstar.data.sources import CORPORA, GENERATORS
from quietstar.errors import UserError
from quietstar.recipes.sections import DataSection
from quietstar.recipes.star_section import SUMS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What makes a row a prompt and a completion.
KEYS = ("prompt", "completion", "messages", "preset")


def settled(content: dict[str, Any]) -> dict[str, Any]:
    """The content of the section with what follows from prompts and completions.

    They are one per row, come from no text column, and a preset knows its data set.

    Raises:
        UserError: if a text column is given, too.
    """
    given = next((key for key in KEYS if content.get(key) is not None), None)
    if given is None:
        return {"packing": "document", **content} if content.get("name") == SUMS else content
    column = content.get("text_column")
    if column is not None:
        raise UserError(
            f"data.text_column is {column!r} and data.{given} is given; expected one of them: a text, or"
            " prompts and completions"
        )
    content = {"packing": "document", **content, "text_column": None}
    check_preset(content.get("preset"))
    preset = PRESETS.get(str(content.get("preset")))
    if preset is not None and not content.get("name") and not content.get("files"):
        content["name"] = preset.hub_name
        content["config_name"] = content.get("config_name") or preset.config_name
    return content


def check_prompt_data(data: DataSection) -> None:
    """Raise :class:`UserError` for keys that do not go together, or templates that no row can fill."""
    given = [key for key in KEYS if getattr(data, key) is not None]
    if not given:
        if data.text_column is None:
            raise UserError(
                "data.text_column is null; expected the column that holds the text, or data.prompt and"
                " data.completion"
            )
        return
    if data.messages is not None and len(given) > 1:
        other = next(key for key in given if key != "messages")
        raise UserError(f"data.messages and data.{other} are given; expected one of them")
    if data.name in CORPORA or data.name in GENERATORS:
        raise UserError(
            f"data.{given[0]} is given, but data.name is {data.name}, which has no columns; expected"
            " files or a data set of the hub"
        )
    if data.packing == "concat":
        raise UserError(
            f"data.packing is 'concat' and data.{given[0]} is given; expected 'document' or 'packed',"
            " which keep prompts and completions whole"
        )
    if data.messages is None:
        _templates(data, 0)


def check_pauses(data: DataSection, *, adapter: bool) -> None:
    """Raise :class:`UserError` for pause tokens that have no place, or cannot be learnt."""
    if data.pause_tokens is None:
        return
    if data.pause_tokens < 1:
        raise UserError(
            f"data.pause_tokens is {data.pause_tokens}; expected a whole number >= 1, or null"
        )
    if all(getattr(data, key) is None for key in KEYS) and data.name != SUMS:
        raise UserError(
            f"data.pause_tokens is {data.pause_tokens} and the data have no prompts to put them behind;"
            " expected data.prompt and data.completion, data.messages, or data.preset"
        )
    if adapter:
        raise UserError(
            f"data.pause_tokens is {data.pause_tokens} and adapter.rank is given, which trains no"
            " embedding of a new token; expected one of them"
        )


def check_where_it_thinks(data: DataSection, thoughts: Mapping[str, Any], schedule: object) -> None:
    """Raise :class:`UserError` for thoughts at completions that the data do not have.

    Args:
        thoughts: that section; schedule: the stages of a ``thought_schedule``, if there is one.
    """
    if any(getattr(data, key) is not None for key in KEYS):
        return
    stages = schedule if isinstance(schedule, list) else []
    for where in (thoughts, *(stage for stage in stages if isinstance(stage, Mapping))):
        if where.get("think_at") == "completion":
            raise UserError(
                "thoughts.think_at is 'completion' and the data have no completions; expected"
                " data.prompt and data.completion, data.messages, data.preset, or another rule"
            )


def row_reader(data: DataSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> str | RowReader:
    """What reads a document from a row: the text column's name, or a reader.

    Raises:
        UserError: for messages and a tokenizer without a chat template.
    """
    if data.messages is not None:
        return MessagesReader(data.messages, tokenizer, lenient=data.streaming)
    if any(getattr(data, key) is not None for key in KEYS):
        return _templates(data, seed)
    assert data.text_column is not None  # checked with the recipe
    return data.text_column


def _templates(data: DataSection, seed: int) -> TemplateReader:
    return TemplateReader(
        data.prompt, data.completion, preset=data.preset, seed=seed, lenient=data.streaming
    )
