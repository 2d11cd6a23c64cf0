"""``quietstar merge``: make a model of an adapter and its decoder."""

from __future__ import annotations

import argparse
from pathlib import Path

from quietstar.cli.arguments import Commands


def add_parser(commands: Commands) -> None:
    """The command and its arguments."""
    merge = commands.add_parser(
        "merge",
        help="make a model of an adapter and its decoder",
        description="Add an adapter's updates into the weights of its decoder and save the model.",
        epilog="example: quietstar merge quietstar-runs/mistral-7b-lora mistral-7b-thinks",
    )
    merge.add_argument("model", metavar="ADAPTER", help="folder of a run with an adapter section")
    merge.add_argument("output", metavar="DIR", type=Path, help="a new folder for the model")
    merge.add_argument("--tokenizer", metavar="T", help="another tokenizer than the adapter's own")
    merge.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the folders, add the updates into the weights, save."""
    from quietstar.checkpoints.adapters import CONFIG_FILE, is_adapter
    from quietstar.checkpoints.load import folder_of_run, load_checkpoint
    from quietstar.errors import UserError
    from quietstar.files import check_writable, is_folder

    name = folder_of_run(args.model)
    if is_folder(Path(name)) and not is_adapter(name):
        raise UserError(
            f"{args.model} holds no adapter (no {CONFIG_FILE}); expected the folder of a run with an"
            " adapter section"
        )
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} already exists; expected a new folder")
    check_writable(output)
    model, tokenizer = load_checkpoint(args.model, device="cpu", tokenizer=args.tokenizer)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"merged: {output}")
    return 0
