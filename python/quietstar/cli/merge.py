"""``quietstar merge``: a model out of an adapter and its decoder."""

from __future__ import annotations

import argparse
from pathlib import Path

from quietstar.checkpoints.adapters import CONFIG_FILE, is_adapter
from quietstar.checkpoints.load import folder_of_run, load_checkpoint
from quietstar.errors import UserError
from quietstar.files import check_writable, is_folder


def main(args: argparse.Namespace) -> int:
    """``quietstar merge``: a model out of an adapter and its decoder."""
    name = folder_of_run(args.model)
    if is_folder(Path(name)) and not is_adapter(name):
        raise UserError(
            f"{args.model} holds no adapter (no {CONFIG_FILE}); expected the folder of a run with an"
            " adapter section"
        )
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already; expected a new folder")
    check_writable(output)
    model, tokenizer = load_checkpoint(args.model, device="cpu", tokenizer=args.tokenizer)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"merged: {output}")
    return 0
