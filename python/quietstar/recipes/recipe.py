"""A training run as data: a YAML file with the sections model, data, thoughts, training and, for
adapters, adapter; for `quietstar star`, star.

    name: my-run
    model:    {name: Qwen/Qwen2.5-0.5B, dtype: bfloat16}
    data:     {files: [books/*.txt], block_size: 256}
    thoughts: {thought_length: 8, talk_length: 4}
    training: {learning_rate: 1e-6, max_steps: 1000}

``thoughts`` takes every field of :class:`~quietstar.config.QuietStarConfig`, ``training`` every
field of :class:`~quietstar.training.arguments.QuietStarArguments`, which are those of
``transformers.TrainingArguments`` and a few more, but ``output_dir``. An unknown key is an error that
names the nearest known one; ``key=value`` words change a recipe from the command line.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from quietstar.config import QuietStarConfig, check_mixing_weight, settings
from quietstar.data.sources import GENERATORS
from quietstar.errors import UserError, did_you_mean
from quietstar.files import RECIPE_FILE, is_file, is_folder, read_text
from quietstar.recipes import prompt_data
from quietstar.recipes.ranges import check_training
from quietstar.recipes.sections import AdapterSection, DataSection, ModelSection
from quietstar.recipes.star_section import StarSection, check_star
from quietstar.training import schedule
from quietstar.training.arguments import QuietStarArguments
from quietstar.values import load_word, load_yaml, typed


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
    star: StarSection = field(default_factory=StarSection)

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain data."""
        content = dataclasses.asdict(self)
        if not self.star.is_given():
            del content["star"]
        return content

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that :func:`load_recipe` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    def changed(self, **sections: Any) -> Recipe:
        """A copy with some keys set, section by section, e.g. ``training={"max_steps": 9}``."""
        content = self.to_dict()
        for name, values in sections.items():
            content[name] = {**content.get(name, {}), **values} if isinstance(values, dict) else values
        return parse_recipe(content, f"recipe {content['name']}")

    def relevant_settings(self) -> dict[str, Any]:
        """The resolved recipe without what leaves the result unchanged: names, speed, logging, saves."""
        content = self.to_dict()
        del content["name"], content["description"]
        del content["model"]["fused_layers"], content["model"]["reuse_rollout"]
        for key in ("init_start_from", "init_end_from", "init_mixing_weight", "special_tokens"):
            if content["model"][key] is None:  # as in runs from before there were these keys
                del content["model"][key]
        if self.adapter == AdapterSection():
            del content["adapter"]
        if "star" in content:
            del content["star"]["iterations"]  # a run goes on with more of them
            if content["star"]["steps_added"] is None:
                del content["star"]["steps_added"]
        # Which recipes of version 0.1.0 do not have.
        for key in (*prompt_data.KEYS, "pause_tokens"):
            if content["data"][key] is None:
                del content["data"][key]
        content["training"] = {
            key: value
            for key, value in content["training"].items()
            if not key.startswith(HARMLESS_PREFIXES)
        }
        return content

    def fingerprint(self) -> str:
        """A hash of everything that changes the result."""
        content = json.dumps(self.relevant_settings(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


# The sections, after name and description, and what each is made of.
CLASSES: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Recipe)[2:]}
SECTIONS = tuple(CLASSES)
# Training settings that change what is written down, not what is learned: a run may be continued
# with other values.
HARMLESS_PREFIXES = (
    "logging_", "log_level", "save_", "eval_", "per_device_eval", "report_to", "run_name",
    "disable_tqdm", "rows_per_backward", "dataloader_num_workers", "dataloader_p", "push_to_hub", "hub_",
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
    if section == "thoughts":
        return settings()
    if section == "training":
        hints = typing.get_type_hints(QuietStarArguments)
        # transformers takes `fsdp: true`, and does not say so in its annotation.
        hints["fsdp"] = bool | hints["fsdp"]
        return {f.name: hints[f.name] for f in dataclasses.fields(QuietStarArguments) if f.init}
    return typing.get_type_hints(CLASSES[section])


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
        text, where = read_text(path, "recipe"), str(path)
    elif name_or_path and is_folder(path):
        inside = path / RECIPE_FILE
        hint = f", e.g. {inside}" if inside.is_file() else ""
        raise UserError(f"recipe {path} is a folder; expected a file{hint}")
    else:
        raise UserError(
            f"no recipe {name_or_path or repr('')}: it is neither a file nor one of the shipped ones "
            f"({', '.join(shipped)}){did_you_mean(name_or_path, list(shipped))}"
        )
    content = load_yaml(text, where)
    if not isinstance(content, dict):
        raise UserError(f"{where} is not a YAML mapping; expected the sections {', '.join(SECTIONS)}")
    content.setdefault("name", path.stem)
    return parse_recipe(apply_overrides(content, overrides), where)


def parse_recipe(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Check plain data and make a :class:`Recipe` of it (see :func:`load_recipe`)."""
    recipe: dict[str, Any] = {}
    try:
        for key, value in content.items():
            if key in SECTIONS:
                recipe[key] = _checked_section(key, value)
            elif key in known_keys(""):
                recipe[key] = _checked_value("", key, value)
            else:
                raise UserError(_unknown("", str(key)))
        result = Recipe(**recipe)
        check_together(result)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error.__cause__
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
            raise UserError(f"{word!r} is not a setting; expected key=value, e.g. max_steps=100")
        path = resolve_key(key)
        value = load_word(value_text, word) if value_text else None
        target = changed
        for part in path[:-1]:
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
            if not isinstance(target, dict):
                raise UserError(f"{word!r}: {part} is not a mapping, so it has no {path[-1]}")
        target[path[-1]] = value
    return changed


def resolve_key(key: str) -> list[str]:
    """The path of an override's key, e.g. ``["training", "learning_rate"]``."""
    parts = key.split(".")
    if parts[0] in SECTIONS:
        if len(parts) == 1:
            raise UserError(f"{key} is a section; set one of its keys, e.g. {key}.KEY=VALUE")
        parts[1] = _known_name(parts[0], parts[1])
        if parts[1] not in known_keys(parts[0]):
            raise UserError(_unknown(parts[0], parts[1]))
        return parts
    homes = [s for s in ("", *SECTIONS) if _known_name(s, parts[0]) in known_keys(s)]
    if not homes:
        raise UserError(_unknown("", parts[0]))
    if len(homes) > 1:
        options = ", ".join(f"{s}.{parts[0]}" if s else parts[0] for s in homes)
        if "" not in homes:
            raise UserError(f"{parts[0]} is ambiguous: it could be {options}")
        homes = [""]
    parts[0] = _known_name(homes[0], parts[0])
    return [*([homes[0]] if homes[0] else []), *parts]


def _known_name(section: str, key: str) -> str:
    """A key by the name that its section knows, where it has several; otherwise as it came."""
    key = ALIASES.get((section, key), key)
    known = known_keys(section)
    return RENAMED[key] if key not in known and RENAMED.get(key) in known else key


def _checked_section(section: str, content: Any) -> Any:
    """A section's content, its values converted to the types of their keys."""
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UserError(f"section {section} is {type(content).__name__}; expected a mapping")
    checked = {}
    for key, value in content.items():
        key = _known_name(section, key)
        if key not in known_keys(section):
            raise UserError(_unknown(section, str(key)))
        if (section, key) in SET_ELSEWHERE:
            raise UserError(f"{section}.{key} is not set in a recipe: {SET_ELSEWHERE[section, key]}")
        checked[key] = _checked_value(section, key, value)
    if section == "data":
        checked = prompt_data.settled(checked)
    result = CLASSES[section](**checked)
    if section == "star":
        # Every recipe that was saved before there was steps_added has all the rest of the section.
        saved_by_itself = known_keys(section).keys() - checked.keys() == {"steps_added"}
        result.given = bool(content) and not saved_by_itself
    return result


def _checked_value(section: str, key: str, value: Any) -> Any:
    if key in ("files", "eval_files", "replay_files") and isinstance(value, str):
        value = [value]
    return typed(_dotted(section, key), value, known_keys(section)[key])


def _dotted(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _unknown(section: str, key: str) -> str:
    """A sentence that names the unknown key, its section and the nearest known key anywhere."""
    where = f"section {section}" if section else "a recipe"
    unknown = f"unknown key {_dotted(section, key)!r} in {where}"
    for other in SECTIONS:
        if key in known_keys(other):
            return f"{unknown}; did you mean {other}.{key}?"
    if section:
        near = {name: f"{section}.{name}" for name in known_keys(section)}
    else:
        near = {name: name for name in (*SECTIONS, *known_keys(""))}
        near |= {name: f"{other}.{name}" for other in SECTIONS for name in known_keys(other)}
    known = known_keys(section) if section else SECTIONS
    listing = f"; known keys: {', '.join(known)}" if len(known) < 40 else ""
    return unknown + (did_you_mean(key, near) or listing)


def check_together(recipe: Recipe) -> None:
    """Raise :class:`UserError` for the first setting that is out of range or at odds with another."""
    model, data, rank = recipe.model, recipe.data, recipe.adapter.rank
    if (model.name is None) == (model.config is None):
        raise UserError(f"model needs exactly one of name and config; {_how_many(model.name)}")
    if model.config is not None and not isinstance(model.config.get("model_type"), str):
        raise UserError("model.config has no model_type, e.g. model_type: llama")
    if model.config is not None and model.tokenizer is None:
        raise UserError("a model from model.config needs model.tokenizer (a name, path or stdlib)")
    activation = recipe.thoughts.get("mixing_activation", "identity")
    try:
        check_mixing_weight(model.init_mixing_weight, activation)
    except ValueError as error:
        raise UserError(f"model.{error}") from error
    if rank is not None and rank < 1:
        raise UserError(f"adapter.rank is {rank}; expected 1 or more, or null")
    if rank is None and recipe.adapter != AdapterSection():
        raise UserError("section adapter has no rank; set it, e.g. adapter.rank=16")
    if rank is not None and model.name is None:
        raise UserError(
            f"adapter.rank is {rank} and model.name is null; expected a decoder by name, without which"
            " an adapter is of no use"
        )
    if data.lookup is not None and data.name != "lookup":
        raise UserError(f"data.lookup is given, but data.name is {data.name!r}, not 'lookup'")
    if data.name in GENERATORS and data.max_train_blocks is None:
        raise UserError(f"data.name is {data.name}, which never ends; set data.max_train_blocks")
    if (data.name is None) == (not data.files):
        remedy = " (data.name=null leaves the name out)" if data.name else ""
        raise UserError(f"data needs exactly one of name and files; {_how_many(data.name)}{remedy}")
    if data.eval_blocks < 0 or (data.max_train_blocks is not None and data.max_train_blocks < 1):
        raise UserError(
            f"data.eval_blocks is {data.eval_blocks} and data.max_train_blocks"
            f" {data.max_train_blocks}; expected 0 or more, and 1 or more"
        )
    if data.shuffle_buffer < 0:
        raise UserError(f"data.shuffle_buffer is {data.shuffle_buffer}; expected 0 or more")
    if data.streaming and recipe.training.get("max_steps", -1) < 1:
        raise UserError(
            "data.streaming has no known length; set training.max_steps to the steps to train"
        )
    prompt_data.check_prompt_data(data)
    prompt_data.check_pauses(data, adapter=rank is not None)
    stages = recipe.training.get("thought_schedule")
    prompt_data.check_where_it_thinks(data, recipe.thoughts, stages)
    check_training(recipe.training)
    check_star(recipe)
    least = longest_talk(recipe) + 2
    if data.block_size < least:
        raise UserError(
            f"data.block_size is {data.block_size}; expected at least {least} (talk_length + 2)"
        )


def _how_many(first: object) -> str:
    return "both are given" if first else "neither is given"


def longest_talk(recipe: Recipe) -> int:
    """The greatest talk_length of the run.

    Raises:
        UserError: if the section thoughts or the schedule in training does not fit.
    """
    section = "thoughts"
    try:
        thoughts = QuietStarConfig(**recipe.thoughts)
        section = "training"
        return schedule.longest_talk(thoughts, recipe.training)
    except ValueError as error:
        raise UserError(f"{section}.{error}") from error
