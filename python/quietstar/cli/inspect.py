"""``quietstar inspect``: a page that shows what a model thinks in a text and what that is worth."""

from __future__ import annotations

import argparse
from pathlib import Path

from quietstar.cli.arguments import Commands, add_model, check_at_least, open_model
from quietstar.errors import UserError, check_seed
from quietstar.files import RECIPE_FILE, check_writable_file, is_folder, read_text

CONTEXT = 512


def add_parser(commands: Commands) -> None:
    """The command and its arguments."""
    inspect = commands.add_parser(
        "inspect",
        help="a page that shows the thoughts in a text and what they gained",
        description="Write one HTML page: the text coloured by what thinking gained at each token, the"
        " thoughts at a token that is clicked, the gain by difficulty, and a run's training curves.",
        epilog="example: quietstar inspect quietstar-runs/tiny notes.txt --output page.html",
    )
    add_model(inspect)
    add = inspect.add_argument
    add("file", metavar="FILE", type=Path, help="a text")
    add("--output", metavar="PAGE", type=Path, help="default: the text's name with .html")
    add("--tokens", metavar="N", type=int, default=512, help="at most N (default: 512)")
    add("--context", metavar="N", type=int, help="tokens per row (default: as trained, otherwise 512)")
    add("--samples", metavar="N", type=int, default=3, help="thoughts sampled per token (default: 3)")
    add("--seed", metavar="N", type=int, default=0, help="of the samples")
    inspect.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the arguments, open the model, write the page."""
    check_at_least(args, tokens=2, samples=0, context=2)
    text = read_text(args.file, "text file")
    if not text.strip():
        raise UserError(f"text file {args.file} is empty")
    output = args.output or Path(args.file.stem + ".html")
    check_seed(args.seed)
    if is_folder(output) or not is_folder(output.resolve().parent):
        raise UserError(f"--output {output} cannot be written; expected a file in a folder that exists")
    check_writable_file(output)
    if output.exists() and args.file.exists() and output.samefile(args.file):
        raise UserError(f"the page would overwrite {args.file}; choose another --output")

    from quietstar.data.plain_text import plain_ids
    from quietstar.inspect.data import split_rows
    from quietstar.inspect.page import About, write_page

    model, tokenizer = open_model(args)
    ids = plain_ids(tokenizer, text)
    shortest = model.config.talk_length + 2
    if len(ids) < shortest:
        raise UserError(
            f"{args.file} has {len(ids)} tokens; expected at least {shortest} (talk_length + 2)"
        )
    context = args.context or _trained_length(args.model) or CONTEXT
    note = "" if len(ids) <= args.tokens else f", the first {args.tokens} of {len(ids)} tokens"
    write_page(
        model,
        tokenizer,
        split_rows(ids[: max(args.tokens, shortest)], max(context, shortest), shortest),
        output,
        about=About(
            title=f"{args.file.name}: what thinking gained",
            source=f"model {args.model}; text {args.file}{note}",
            run_folder=args.model,
        ),
        samples=args.samples,
        seed=args.seed,
        overlap=True,
    )
    print(f"page: {output}")
    return 0


def _trained_length(name: str) -> int | None:
    """Tokens per row in the run's training, if this is a run's folder: it saw no longer ones."""
    from quietstar.recipes.recipe import load_recipe

    path = Path(name) / RECIPE_FILE
    return load_recipe(str(path)).data.block_size if path.is_file() else None
