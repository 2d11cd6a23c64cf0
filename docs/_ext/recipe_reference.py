"""The directive ``recipe-section``: the keys of a recipe's section, with type, default and meaning.

Keys, types and defaults are those of the classes that read a recipe, meanings stand in their docstrings;
a key without a meaning fails the build.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from typing import Any, NamedTuple

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from quietstar.config import QuietStarConfig
from quietstar.recipes.recipe import CLASSES, SET_ELSEWHERE, known_keys, load_recipe, shipped_recipes
from quietstar.training.arguments import QuietStarArguments


class Key(NamedTuple):
    """One key of a section, as it is shown."""

    name: str
    type: str
    default: str
    meaning: str


def section_keys(section: str) -> list[Key]:
    """The keys of a section that a recipe may set; of ``training`` those that transformers has not.

    Raises:
        ValueError: if the docstring says nothing about one of them.
    """
    owner: Any = {"thoughts": QuietStarConfig, "training": QuietStarArguments}.get(section)
    owner = owner or CLASSES[section]
    names = [name for name in known_keys(section) if (section, name) not in SET_ELSEWHERE]
    if section == "training":
        names = [name for name in names if name in inspect.get_annotations(owner)]
    told = argument_meanings(inspect.getdoc(owner) or "")
    missing = [name for name in names if name not in told]
    if missing:
        raise ValueError(f"the docstring of {owner.__name__} does not describe {', '.join(missing)}")
    defaults = {f.name: f.default for f in dataclasses.fields(owner)} if section != "thoughts" else {}
    return [
        Key(
            name,
            type_words(known_keys(section)[name]),
            value_words(defaults.get(name, getattr(owner, name, None))),
            told[name],
        )
        for name in names
    ]


def argument_meanings(docstring: str) -> dict[str, str]:
    """What a docstring's section ``Args`` says of each name; several names may share an entry."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, flags=re.M | re.S)
    found = {}
    for entry in re.split(r"^    (?=\S)", section[1] if section else "", flags=re.M)[1:]:
        names, _, meaning = entry.partition(":")
        for name in names.split(","):
            found[name.strip()] = " ".join(meaning.split())
    return found


def type_words(annotation: Any) -> str:
    """A type as one who writes YAML would say it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_words(argument) for argument in arguments)
    if origin is list:
        return "list" if arguments[0] is Any else f"list of {type_words(arguments[0])}"
    words = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "mapping"}
    return words.get(origin or annotation, "null")


def value_words(value: Any) -> str:
    """A default as YAML spells it."""
    if value is None or isinstance(value, bool):
        return str({None: "null", True: "true", False: "false"}[value])
    return f'"{value}"' if isinstance(value, str) and not value[:1].isalpha() else str(value)


class RecipeSection(SphinxDirective):
    """``.. recipe-section:: NAME``"""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        section = self.arguments[0]
        lines = []
        for key in section_keys(section):
            lines += [f".. confval:: {section}.{key.name}", f"   :type: {key.type}"]
            lines += [f"   :default: ``{key.default}``", "", f"   {key.meaning}", ""]
        return self.parse_text_to_nodes("\n".join(lines))


class ShippedRecipes(SphinxDirective):
    """``.. shipped-recipes::``: names and descriptions."""

    def run(self) -> list[nodes.Node]:
        lines = []
        for name in shipped_recipes():
            lines += [f"``{name}``", f"    {load_recipe(name).description}", ""]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("recipe-section", RecipeSection)
    app.add_directive("shipped-recipes", ShippedRecipes)
    return {"parallel_read_safe": True}
