"""``quietstar star``: a model learns from its own rationales, iteration by iteration."""

from __future__ import annotations

import argparse
import functools
import logging
from pathlib import Path

from quietstar.cli.arguments import Commands, add_recipe, add_run_folder


def add_parser(commands: Commands) -> None:
    """The command and its arguments."""
    star = commands.add_parser(
        "star",
        help="let a model learn from its own rationales (STaR)",
        description="STaR (arXiv 2203.14465): the model writes rationales, keeps those that lead to the"
        " right answer, tries what failed again with the answer as a hint, is fine-tuned on both, and"
        " begins anew. The recipe's section star says how (docs/star.md).",
        epilog="example: quietstar star star-svamp star.iterations=4",
    )
    add_recipe(star)
    add_run_folder(star)
    star.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the iterations that are not there yet, and print their table as it fills."""
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from quietstar.recipes.recipe import load_recipe
    from quietstar.star.loop import run_star
    from quietstar.star.report import REPORT, print_row

    recipe = load_recipe(args.recipe, args.settings)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers_logging.disable_progress_bar()  # its bars for loading files
    console = Console(soft_wrap=True, highlight=False)
    result = run_star(
        recipe,
        args.output or Path("quietstar-runs") / recipe.name,
        resume=args.resume,
        overwrite=args.overwrite,
        progress=not args.quiet,
        show=functools.partial(print_row, console),
    )
    console.print(f"\nreport: {result.output / REPORT}")
    return 0
