"""``quietstar train``: run a recipe, then say what came out and where it lies."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from quietstar.cli.arguments import Commands, add_recipe, add_run_folder


def add_parser(commands: Commands) -> None:
    """The command and its arguments."""
    train = commands.add_parser(
        "train",
        help="train as a recipe says",
        description="Train as a recipe says: a YAML file, or one that is shipped by its name.",
        epilog="example: quietstar train tiny max_steps=50 thoughts.thought_length=8",
    )
    add_recipe(train)
    add_run_folder(train)
    train.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the recipe and print its losses."""
    from rich.console import Console

    from quietstar.recipes.recipe import load_recipe
    from quietstar.recipes.run import run_recipe

    recipe = load_recipe(args.recipe, args.settings)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.quiet:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    result = run_recipe(
        recipe,
        args.output or Path("quietstar-runs") / recipe.name,
        resume=args.resume,
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    if int(os.environ.get("RANK", "0")):
        return 0  # the first of several processes speaks
    console = Console(soft_wrap=True, highlight=False)
    metrics = result.metrics
    console.print(f"{metrics['steps']} steps of recipe {metrics['recipe']}: {result.output}")
    words = {"base_nll": "NLL without thoughts", "mixed_nll": "NLL with thoughts", "gain": "gain"}
    for key in words if "evaluation" in metrics else ():
        found = metrics["evaluation"][key]
        error = found["standard_error"]
        spread = "" if error is None else f" ± {error:.4f}"
        console.print(f"  {words[key]}: {found['mean']:.4f}{spread} nats per token")
    return 0
