"""``quietstar demo``: thoughts being learned, on a task that needs them or on real text; and STaR."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from quietstar.cli.arguments import Commands
from quietstar.errors import UserError


def add_parser(commands: Commands) -> None:
    """The command and its arguments."""
    demo = commands.add_parser(
        "demo",
        help="see thoughts being learned, on this machine, without a download",
        description="Train a small model and show what thoughts do: on a task that needs them "
        "(the default), on real text, the Python standard library (text), or in a real language model on"
        " word problems (words; needs SmolLM2-135M-Instruct and SVAMP); or how a model learns from"
        " rationales of its own (star).",
        epilog="example: quietstar demo text --quick",
    )
    add = demo.add_argument
    whats = ["task", "text", "words", "star"]
    add("what", nargs="?", choices=whats, default="task", help="which demo (default: task)")
    add("--quick", action="store_true", help="fewer steps and controls")
    add("--fresh", action="store_true", help="start anew instead of continuing")
    add("--sweep", action="store_true", help="task: also try several thought lengths")
    add("--seed", metavar="N", type=int, help="all that is drawn (default: task 4, words 1, star 0)")
    add("--model", metavar="M", help="words: the base model, a GGUF file, folder or name on the hub")
    add(
        "--data",
        metavar="DIR",
        type=Path,
        help="words: SVAMP's train.jsonl and test.jsonl (default: hub)",
    )
    add("--output", metavar="DIR", type=Path, help="output folder")
    demo.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the parts of the demo that are not done yet, and show the result."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("model", "data"):
        if args.what != "words" and getattr(args, name, None) is not None:
            raise UserError(f"--{name} is for demo words, and this is demo {args.what}")
    if args.what == "text":
        from quietstar.demos import text

        default = "quietstar-demo-text-quick" if args.quick else "quietstar-demo-text"
        text.run_demo(args.output or Path(default), quick=args.quick, fresh=args.fresh)
    elif args.what == "words":
        from quietstar.demos import words

        words.run_demo(
            args.output or Path("quietstar-demo-words-quick" if args.quick else "quietstar-demo-words"),
            model=args.model,
            data=args.data,
            sizes=words.QUICK if args.quick else words.DEMO,
            seeds=(1 if args.seed is None else args.seed,),
            fresh=args.fresh,
        )
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
