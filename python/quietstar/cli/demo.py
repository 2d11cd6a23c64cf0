"""``quietstar demo``: thoughts being learned, on a task that needs them or on real text; and STaR."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from quietstar.cli.arguments import Commands


def add_parser(commands: Commands) -> None:
    """The command and its arguments."""
    demo = commands.add_parser(
        "demo",
        help="see thoughts being learned, on this machine, without a download",
        description="Train a small model and show what thoughts do: on a task that needs them "
        "(the default), or on real text, the Python standard library (text); or how a model learns from"
        " rationales of its own (star).",
    )
    add = demo.add_argument
    add("what", nargs="?", choices=["task", "text", "star"], default="task")
    add("--quick", action="store_true", help="fewer steps and controls")
    add("--fresh", action="store_true", help="start anew instead of continuing")
    add("--sweep", action="store_true", help="task: also try several thought lengths")
    add("--seed", type=int, help="task (default: 4) and star (0): all that is drawn")
    add("--output", metavar="DIR", type=Path, help="output folder")
    demo.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the parts of the demo that are not done yet, and show the result."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.what == "text":
        from quietstar.demos import text

        default = "quietstar-demo-text-quick" if args.quick else "quietstar-demo-text"
        text.run_demo(args.output or Path(default), quick=args.quick, fresh=args.fresh)
    elif args.what == "star":
        from quietstar.demos import star

        output = args.output or Path(
            "quietstar-demo-star-quick" if args.quick else "quietstar-demo-star"
        )
        star.run_demo(output, seed=args.seed or 0, quick=args.quick, fresh=args.fresh)
    else:
        from quietstar.demos import lookup

        output, seed = args.output or Path("quietstar-demo"), 4 if args.seed is None else args.seed
        lookup.run_demo(output, seed=seed, quick=args.quick, sweep=args.sweep, fresh=args.fresh)
    return 0
