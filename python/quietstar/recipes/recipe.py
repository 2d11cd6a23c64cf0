"""A training run as data: a YAML file with the sections model, data, thoughts, training and, for
adapters, adapter.

    name: my-run
    model:    {name: Qwen/Qwen2.5-0.5B, dtype: bfloat16}
    data:     {files: [books/*.txt], block_size: 256}
    thoughts: {thought_length: 8, talk_length: 4}
    training: {learning_rate: 1e-6, max_steps: 1000}

``thoughts`` takes every field of :class:`~quietstar.config.QuietStarConfig`, ``training`` every
field of :class:`~quietstar.training.arguments.QuietStarArguments`, which are those of
``transformers.TrainingArguments`` and a few more, but ``output_dir``. An unknown key is refused and the
nearest known one named; ``key=value`` words change a recipe from the command line.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from quietstar.errors import UserError
from quietstar.files import is_file, is_folder
from quietstar.recipes.ranges import check_training
from quietstar.recipes.sections import AdapterSection, DataSection, ModelSection
from quietstar.values import Mismatch, coerce, describe, load_word, load_yaml


@dataclass
class Recipe:
    """A checked recipe. Build one with :func:`load_recipe` or :func:`parse_recipe`."""

    name: str = "unnamed"
    description: str = ""
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    thoughts: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    adapter: AdapterSection = field(default_factory=AdapterSection)

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain data."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that :func:`load_recipe` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    def changed(self, **sections: Any) -> Recipe:
        """A copy with some keys set, section by section, e.g. ``training={"max_steps": 9}``."""
        content = self.to_dict()
        for name, values in sections.items():
            content[name] = {**content[name], **values} if isinstance(values, dict) else values
        return parse_recipe(content, f"recipe {content['name']}")

    def fingerprint(self) -> str:
        """A hash of everything that changes the result (not of logging, saving and names)."""
        content = self.to_dict()
        del content["name"], content["description"]
        if self.adapter == AdapterSection():
            del content["adapter"]
        content["training"] = {
            key: value
            for key, value in content["training"].items()
            if not key.startswith(HARMLESS_PREFIXES)
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


SECTIONS = ("model", "data", "thoughts", "training", "adapter")
# Training settings that change what is written down, not what is learned: a run may be continued
# with other values.
HARMLESS_PREFIXES = (
    "logging_", "log_level", "save_", "eval_", "per_device_eval", "report_to", "run_name",
    "disable_tqdm", "dataloader_num_workers", "dataloader_p", "push_to_hub", "hub_",
)  # fmt: skip
ALIASES = {("thoughts", "kind"): "thought_kind"}
# Either name of what transformers has renamed, taken where this release knows the other alone.
RENAMED = {"activation_checkpointing": "gradient_checkpointing"}
RENAMED |= {old: new for new, old in RENAMED.items()}
SET_ELSEWHERE = {
    ("training", "output_dir"): "give the folder with --output",
    ("training", "resume_from_checkpoint"): "a run continues by itself, or with --resume",
    ("training", "do_train"): "`quietstar train` trains",
    ("training", "remove_unused_columns"): "the data are built with the right columns",
    ("thoughts", "start_token_id"): "it comes from the tokenizer",
    ("thoughts", "end_token_id"): "it comes from the tokenizer",
}


@functools.cache
def known_keys(section: str) -> dict[str, Any]:
    """The keys of a section and their type annotations."""
    if section == "":
        return {"name": str, "description": str}
    classes = {"model": ModelSection, "data": DataSection, "adapter": AdapterSection}
    if section in classes:
        return typing.get_type_hints(classes[section])
    if section == "thoughts":
        from quietstar.config import QuietStarConfig

        hints = typing.get_type_hints(QuietStarConfig.__init__)
        names = list(inspect.signature(QuietStarConfig.__init__).parameters)
        skip = ("self", "text_config", "kwargs")
        return {name: hints[name] for name in names if name not in skip}
    from quietstar.training.arguments import QuietStarArguments

    hints = typing.get_type_hints(QuietStarArguments)
    return {f.name: hints[f.name] for f in dataclasses.fields(QuietStarArguments) if f.init}


def shipped_recipes() -> dict[str, str]:
    """Name and text of every recipe inside the package."""
    folder = resources.files("quietstar") / "recipes"
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda e: e.name)
        if entry.name.endswith(".yaml")
    }


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or any by its path, and apply ``key=value`` words.

    Raises :class:`UserError` for whatever is not right, naming the key.
    """
    shipped = shipped_recipes()
    path = Path(name_or_path).expanduser()
    if name_or_path in shipped:
        text, where = shipped[name_or_path], f"recipe {name_or_path}"
    elif is_file(path):
        try:
            text, where = path.read_text(encoding="utf-8-sig"), str(path)
        except UnicodeDecodeError as error:
            raise UserError(f"recipe {path} is not UTF-8 text") from error
        except OSError as error:
            raise UserError(f"recipe {path} cannot be read: {error.strerror}") from error
    elif name_or_path and is_folder(path):
        inside = path / "recipe.yaml"
        hint = f", e.g. {inside}" if inside.is_file() else ""
        raise UserError(f"recipe {path} is a folder; expected a file{hint}")
    else:
        near = difflib.get_close_matches(name_or_path, shipped, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"no recipe {name_or_path or repr('')}: it is neither a file nor one of the shipped ones "
            f"({', '.join(shipped)}){hint}"
        )
    content = load_yaml(text, where)
    if not isinstance(content, dict):
        raise UserError(f"{where} holds no mapping; expected the sections {', '.join(SECTIONS)}")
    content.setdefault("name", path.stem)
    return parse_recipe(apply_overrides(content, overrides), where)


def parse_recipe(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Check plain data and make a :class:`Recipe` of it (see :func:`load_recipe`)."""
    recipe: dict[str, Any] = {}
    for key, value in content.items():
        if key in SECTIONS:
            recipe[key] = _check_section(key, value, where)
        elif key in known_keys(""):
            recipe[key] = _check_value("", key, value, where)
        else:
            raise UserError(f"{where}: {_unknown('', str(key))}")
    result = Recipe(
        **{
            **recipe,
            "model": ModelSection(**recipe.get("model", {})),
            "data": DataSection(**recipe.get("data", {})),
            "adapter": AdapterSection(**recipe.get("adapter", {})),
        }
    )
    _check_together(result, where)
    return result


def apply_overrides(content: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set ``key=value`` words in plain recipe data; the original is left as it was.

    A key is dotted (``training.learning_rate``; ``model.config.hidden_size`` reaches into a
    mapping) or, where no other section knows it, its last part alone. Values are read as YAML, but a
    word that only means something to YAML (``*.txt``) stays a word.
    """
    changed = copy.deepcopy(dict(content))
    for word in overrides:
        key, equals, value_text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} is no setting; expected key=value, e.g. max_steps=100")
        path = resolve_key(key)
        value = load_word(value_text, word) if value_text else None
        target = changed
        for part in path[:-1]:
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
            if not isinstance(target, dict):
                raise UserError(f"{word!r}: {part} is no mapping, so it has no {path[-1]}")
        target[path[-1]] = value
    return changed


def resolve_key(key: str) -> list[str]:
    """The path of an override's key, e.g. ``["training", "learning_rate"]``."""
    parts = key.split(".")
    if parts[0] in SECTIONS and len(parts) > 1:
        parts[1] = _known_name(parts[0], parts[1])
        if parts[1] not in known_keys(parts[0]):
            raise UserError(_unknown(parts[0], parts[1]))
        return parts
    if parts[0] in SECTIONS:
        raise UserError(f"{key} is a section; set one of its keys, e.g. {key}.KEY=VALUE")
    homes = [s for s in ("", *SECTIONS) if _known_name(s, parts[0]) in known_keys(s)]
    if not homes:
        raise UserError(_unknown("", parts[0]))
    if len(homes) > 1:
        options = ", ".join(f"{s}.{parts[0]}" if s else parts[0] for s in homes)
        if "" not in homes:
            raise UserError(f"{parts[0]} could be {options}; write which")
        homes = [""]
    parts[0] = _known_name(homes[0], parts[0])
    return [*([homes[0]] if homes[0] else []), *parts]


def _known_name(section: str, key: str) -> str:
    """A key by the name that its section knows, where it has several; otherwise as it came."""
    key = ALIASES.get((section, key), key)
    known = known_keys(section)
    return RENAMED[key] if key not in known and RENAMED.get(key) in known else key


def _check_section(section: str, content: Any, where: str) -> dict[str, Any]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{where}: section {section} is {type(content).__name__}; expected a mapping")
    checked = {}
    for key, value in content.items():
        key = _known_name(section, key)
        if key not in known_keys(section):
            raise UserError(f"{where}: {_unknown(section, str(key))}")
        if (section, key) in SET_ELSEWHERE:
            raise UserError(
                f"{where}: {section}.{key} is not set in a recipe: {SET_ELSEWHERE[section, key]}"
            )
        checked[key] = _check_value(section, key, value, where)
    return checked


def _check_value(section: str, key: str, value: Any, where: str) -> Any:
    annotation = known_keys(section)[key]
    if (section, key) in (("data", "files"), ("data", "eval_files")) and isinstance(value, str):
        value = [value]
    try:
        return coerce(value, annotation)
    except Mismatch:
        full = f"{section}.{key}" if section else key
        raise UserError(f"{where}: {full} is {value!r}; expected {describe(annotation)}") from None


def _unknown(section: str, key: str) -> str:
    """A sentence that names the unknown key, its section and the nearest known key anywhere."""
    full = f"{section}.{key}" if section else key
    here = f"section {section}" if section else "a recipe"
    if section and key in known_keys(section):
        return full
    for other in SECTIONS:
        if other != section and key in known_keys(other):
            return f"unknown key {full!r} in {here}; did you mean {other}.{key}?"
    near = difflib.get_close_matches(key, known_keys(section), n=1, cutoff=0.5)
    if not section:
        every = dict.fromkeys((*SECTIONS, *known_keys("")), "")
        for other in SECTIONS:
            every.update(dict.fromkeys(known_keys(other), f"{other}."))
        near = difflib.get_close_matches(key, every, n=1, cutoff=0.5)
        near = [every[k] + k for k in near]
    if near:
        prefix = f"{section}." if section else ""
        return f"unknown key {full!r} in {here}; did you mean {prefix}{near[0]}?"
    known = known_keys(section) if section else SECTIONS
    listing = f"; known keys: {', '.join(known)}" if len(known) < 40 else ""
    return f"unknown key {full!r} in {here}{listing}"


def _check_together(recipe: Recipe, where: str) -> None:
    """Conditions on several values at once."""
    model, data = recipe.model, recipe.data
    if (model.name is None) == (model.config is None):
        count = "both are given" if model.name else "neither is given"
        raise UserError(f"{where}: model needs exactly one of name and config; {count}")
    if model.config is not None:
        if not isinstance(model.config.get("model_type"), str):
            raise UserError(f"{where}: model.config has no model_type, e.g. model_type: llama")
        if model.tokenizer is None:
            raise UserError(
                f"{where}: a model from model.config needs model.tokenizer (a name, path or stdlib)"
            )
    adapter = recipe.adapter
    if adapter.rank is not None and adapter.rank < 1:
        raise UserError(f"{where}: adapter.rank is {adapter.rank}; expected 1 or more, or null")
    if adapter.rank is None and adapter != AdapterSection():
        raise UserError(f"{where}: section adapter has no rank; set it, e.g. adapter.rank=16")
    if adapter.rank is not None and model.name is None:
        raise UserError(
            f"{where}: adapter.rank is {adapter.rank} and model.name null; expected a decoder by name,"
            " an adapter is nothing without it"
        )
    if data.lookup is not None and data.name != "lookup":
        raise UserError(f"{where}: data.lookup is given, but data.name is {data.name!r}, not 'lookup'")
    if data.name == "lookup" and data.max_train_blocks is None:
        raise UserError(f"{where}: data.name is lookup, which never ends; set data.max_train_blocks")
    if (data.name is None) == (not data.files):
        count = "both are given" if data.name else "neither is given"
        raise UserError(f"{where}: data needs exactly one of name and files; {count}")
    from quietstar.config import QuietStarConfig
    from quietstar.training.schedule import longest_talk

    try:
        thoughts = QuietStarConfig(**recipe.thoughts)
    except ValueError as error:
        raise UserError(f"{where}: thoughts.{error}") from error
    try:
        least = longest_talk(thoughts, recipe.training) + 2
    except ValueError as error:
        raise UserError(f"{where}: training.{error}") from error
    if data.block_size < least:
        raise UserError(
            f"{where}: data.block_size is {data.block_size}; expected at least {least} (talk_length + 2)"
        )
    if data.eval_blocks < 0 or (data.max_train_blocks is not None and data.max_train_blocks < 1):
        raise UserError(
            f"{where}: data.eval_blocks is {data.eval_blocks} and data.max_train_blocks "
            f"{data.max_train_blocks}; expected 0 or more, and 1 or more"
        )
    try:
        check_training(recipe.training)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if data.shuffle_buffer < 0:
        raise UserError(f"{where}: data.shuffle_buffer is {data.shuffle_buffer}; expected 0 or more")
    if data.streaming and recipe.training.get("max_steps", -1) < 1:
        raise UserError(
            f"{where}: data.streaming has no known length; set training.max_steps to the steps to train"
        )
