#!/usr/bin/env python
"""Runs docs/tutorial.ipynb as it stands, on one thread, and keeps what it shows in the file.

``--output FILE`` leaves the notebook as it is and writes the run elsewhere. What varies from run to
run and tells nothing (times, versions of the kernel) is not kept.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "tutorial.ipynb"


def run(notebook: Path, output: Path) -> float:
    """Run a notebook in a folder of its own; returns the seconds of processor time that it took.

    Raises:
        nbclient.exceptions.CellExecutionError: shows the cell that failed.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    content = nbformat.read(notebook, as_version=4)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        # No cell and no start is too slow by the clock: what others do on the machine is not ours.
        patience = {"timeout": None, "startup_timeout": 600}
        NotebookClient(content, resources=resources, record_timing=False, **patience).execute()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    content.metadata.pop("widgets", None)
    content.metadata["language_info"] = {"name": "python"}
    for cell in content.cells:
        # What libraries write to the error stream, or with a date, is about this machine.
        cell["outputs"] = [
            o
            for o in cell.get("outputs", [])
            if o.get("name") != "stderr" and not re.match(r"\[\d{4}-", o.get("text", ""))
        ]
        if cell.cell_type != "code":
            del cell["outputs"]
    nbformat.write(content, output)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=NOTEBOOK)
    args = parser.parse_args()
    print(f"{run(NOTEBOOK, args.output):.0f} s of processor time")


if __name__ == "__main__":
    main()
