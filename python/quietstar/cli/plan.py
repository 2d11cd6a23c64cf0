"""``quietstar plan``: what of a recipe fits GPUs of a given size."""

from __future__ import annotations

import argparse
import math
import re
from typing import TYPE_CHECKING

from quietstar.errors import UserError

if TYPE_CHECKING:
    from quietstar.cli.arguments import Commands

GB = 1e9
# Numbers without a unit up to this are gigabytes, as anybody would mean them.
PLAIN_GIGABYTES = 10_000
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def add_parser(commands: Commands) -> None:
    """The command and its arguments."""
    plan = commands.add_parser(
        "plan",
        help="what of a recipe fits GPUs of a given size",
        description="Count the memory and the operations of a recipe's step, and what fits a GPU: batch"
        " size, gradient checkpointing, adapters, several GPUs. Reads no weights (docs/scaling.md).",
        epilog="example: quietstar plan mistral-7b-lora --gpu-memory 24G",
    )
    plan.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
    plan.add_argument("settings", metavar="KEY=VALUE", nargs="*", help="changes to the recipe")
    plan.add_argument(
        "--gpu-memory", metavar="SIZE", default="24G", help="of a GPU, e.g. 80G (default: 24G)"
    )
    plan.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the step's size and a table of what fits."""
    from rich.console import Console

    from quietstar.plan.table import print_plan
    from quietstar.recipes.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.settings)
    memory = parse_bytes(args.gpu_memory)
    print_plan(Console(soft_wrap=True, highlight=False), recipe, memory, args.gpu_memory)
    return 0


def parse_bytes(text: str) -> float:
    """``24G``, ``24GB``, ``24`` or ``80e9`` as bytes (G is 10^9, as GPUs are sold); Gi is 2^30."""
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][0-9]+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    try:
        number = float(match.group(1)) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or number <= 0 or math.isinf(number):
        raise UserError(f"--gpu-memory is {text!r}; expected a size, e.g. 24G")
    unit, binary = match.group(2).upper(), bool(match.group(3))
    if not unit and not binary and number <= PLAIN_GIGABYTES:
        unit = "G"
    power = "KMGT".index(unit) + 1 if unit else 0
    size = number * (1024.0**power if binary else _UNITS[unit])
    from quietstar.plan.costs import CONTEXT_BYTES

    if size < CONTEXT_BYTES:
        raise UserError(
            f"--gpu-memory is {text!r}, {size / GB:.3g} GB; expected the size of a GPU, e.g. 24G"
        )
    return size
