"""Modules of version 0.1.0 by their old names: importing one warns and gives the new.

The names on the left are those of the flat package; what a module held then is looked up in the modules
on the right, in their order.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from quietstar.lazy import lazy_attributes

# Modules that kept their name, by the room that they are in now.
KEPT = {
    "thinking": (
        *("anchors", "attention", "documents", "layout", "noise", "positions", "self_check"),
        *("supported", "text_part"),
    ),
    "training": ("arguments", "clipping", "ema", "guard", "metrics", "schedule", "trainer"),
    "recipes": ("build", "ranges", "recipe"),
    "data": ("left_out", "lookup", "sources", "streams", "tables"),
    "modeling": ("output",),
}
MOVED: dict[str, tuple[str, ...]] = {
    **{name: (f"{room}.{name}",) for room, names in KEPT.items() for name in names},
    "adapters": ("checkpoints.adapters", "modeling.loading", "cli.merge"),
    "batches": ("training.global_batch",),
    "caching": ("modeling.text_cache",),
    "checkpoint": ("checkpoints.load",),
    "checkpoint_folder": ("checkpoints.folder",),
    "checks": ("modeling.input_checks",),
    "collate": ("data.collator",),
    "corpora": ("data.stdlib",),
    "decoder_config": ("recipes.decoder",),
    "decoding": ("modeling.generation_checks",),
    "demo": ("demos.lookup",),
    "demo_report": ("demos.lookup_report",),
    "demo_text": ("demos.text",),
    "disk": ("recipes.disk", "files"),
    "entropy": ("quietstar_ext.linear_entropy",),
    "generate": ("cli.generate", "cli.thought_streamer"),
    "generation": ("modeling.generation", "thinking.next_token"),
    "graphs": ("thinking.cuda_graphs",),
    "head": ("thinking.output_layer",),
    "info": ("cli.info", "cli.installed"),
    "layers": ("thinking.linear_layers",),
    "learn": ("losses.policy", "losses.rewards", "thinking.text_batch"),
    "loading": ("modeling.loading", "config"),
    "objective": ("losses.rewards", "losses.policy"),
    "packages": ("training.optional_packages",),
    "optional_packages": ("training.optional_packages",),
    "parts": ("thinking.batch_share",),
    "passes": ("modeling.forward",),
    "paths": ("files",),
    "plain_state": ("checkpoints.state",),
    "plan_table": ("plan.table", "cli.plan"),
    "recipe_sections": ("recipes.sections",),
    "reference": ("checkpoints.upstream",),
    "report": ("inspect.page", "cli.inspect"),
    "report_data": ("inspect.data",),
    "report_svg": ("inspect.figures",),
    "rundir": ("recipes.run_folder", "files"),
    "saving": ("checkpoints.save", "checkpoints.weights", "checkpoints.folder", "checkpoints.state"),
    "sharding": ("thinking.fsdp2",),
    "talk": ("losses.language_model", "thinking.text_batch", "thinking.layers"),
    "think": (
        *("thinking.rollout", "thinking.layers", "thinking.packed", "thinking.slots"),
        *("thinking.text_pass", "thinking.self_check", "thinking.output_layer"),
    ),
    "tokens": ("modeling.meta_tokens",),
    "train": ("recipes.run",),
    "trainer_objective": ("training.trainer", "training.around_the_step"),
    "trainer_options": ("training.options",),
}

# Names that are others now, in any of those modules.
RENAMED = {
    "BatchPart": "BatchShard",
    "WHOLE": "WHOLE_BATCH",
    "Head": "OutputLayer",
    "CalledHead": "CalledOutputLayer",
    "output_head": "output_layer",
    "check_head": "check_logits",
    "Objective": "LossTerms",
    "add_up": "total_loss",
    "keep_gradients": "keep_4bit_differentiable",
    "settle_new_rows": "grow_embeddings",
    "count_what_counts": "loss_divisors",
    "MOST_CHAINS": "MAX_CHAINS",
    "whole": "full_on_cpu",
    "like": "sharded_like",
    "text_with_layout": "text_pass",
    "why_unreadable": "unsupported_reason",
    "why_no_column": "missing_column",
    "MOST_ROWS": "MAX_ROWS",
    "NoiseSource": "Probability",
    "rollout": "sample_thoughts",
}


class _Alias(ModuleType):
    """A module that looks every name up where it has gone."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for place in MOVED[self.__name__.removeprefix("quietstar.")]:
            module = importlib.import_module(
                place if place.startswith("quietstar_ext.") else f"quietstar.{place}"
            )
            if hasattr(module, name):
                return getattr(module, name)
        if name in RENAMED:
            return getattr(self, RENAMED[name])
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == "quietstar" and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Alias(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.removeprefix("quietstar.")
        warnings.warn(
            f"{module.__name__} has moved to quietstar.{MOVED[old][0]}; the old name goes with the next"
            " version",
            DeprecationWarning,
            stacklevel=2,
        )


def install() -> None:
    """Resolve old module names; after Python's own finders, so that existing modules never come here."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def package_attributes(places: Mapping[str, str]) -> Callable[[str], Any]:
    """The package's own ``__getattr__``: old modules, and names as :func:`lazy_attributes` has them."""
    others = lazy_attributes("quietstar", places)

    def get(name: str) -> Any:
        return importlib.import_module(f"quietstar.{name}") if name in MOVED else others(name)

    return get
