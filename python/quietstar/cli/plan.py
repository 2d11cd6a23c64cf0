"""``quietstar plan``: which ways to run a recipe fit GPUs of a given size."""

from __future__ import annotations

import argparse
import math
import re

from quietstar.cli.arguments import Commands, add_recipe
from quietstar.errors import UserError

GB = 1e9
# Numbers without a unit up to this are gigabytes, as anybody would mean them.
PLAIN_GIGABYTES = 10_000


def add_parser(commands: Commands) -> None:
    """The command and its arguments."""
    plan = commands.add_parser(
        "plan",
        help="what of a recipe fits GPUs of a given size",
        description="Count the memory and the operations of a recipe's step, and what fits a GPU: batch"
        " size, gradient checkpointing, adapters, several GPUs. Reads no weights (docs/scaling.md).",
        epilog="example: quietstar plan mistral-7b-lora --gpu-memory 24G",
    )
    add_recipe(plan)
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
    # A bare number is shown with the unit that it was taken for.
    shown = args.gpu_memory if re.search("[A-Za-z]", args.gpu_memory) else f"{memory / GB:g}G"
    print_plan(Console(soft_wrap=True, highlight=False), recipe, memory, shown)
    return 0


def parse_bytes(text: str) -> float:
    """``24G``, ``24GB``, ``24`` or ``80e9`` as bytes (G is 10^9, as GPUs are sold); Gi is 2^30."""
    from quietstar.plan.costs import CONTEXT_BYTES

    number = r"(\d+\.?\d*|\.\d+)(?:e\d+)?"
    match = re.fullmatch(rf"\s*(?P<number>{number})\s*(?P<unit>[KMGT]?)(?P<binary>i?)B?\s*", text, re.I)
    size = float(match["number"]) if match else 0.0
    if match is None or size <= 0 or math.isinf(size):
        raise UserError(f"--gpu-memory is {text!r}; expected a size, e.g. 24G")
    unit = match["unit"].upper()
    if not unit and not match["binary"] and size <= PLAIN_GIGABYTES:
        unit = "G"
    size *= (1024.0 if match["binary"] else 1000.0) ** " KMGT".index(unit or " ")
    if size < CONTEXT_BYTES:
        raise UserError(
            f"--gpu-memory is {text!r}, {size / GB:.3g} GB; expected the size of a GPU, e.g. 24G"
        )
    return size
