"""What training logs, read back from each logger: a table, TensorBoard and Weights & Biases."""

import csv
import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_recipes import content, run_python
from small_training import rows, small_model, trainer

from quietstar.recipes.recipe import parse_recipe
from quietstar.recipes.run import run_recipe
from quietstar.training import csv_log

METRICS = ("loss", "gain", "reward", "mixing_weight", "eval_loss", "eval_gain")
EVALUATES = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2}


def logged(run: Any) -> dict[str, list[tuple[int, float]]]:
    """Of the trainer's own history: steps and values by name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in run.state.log_history:
        for name, value in entry.items():
            found.setdefault(name, []).append((entry["step"], value))
    return found


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class TestCsv:
    def test_rows_are_the_log(self, tmp_path) -> None:
        run = trainer(tmp_path, small_model(), rows(8), report_to=["csv"], **EVALUATES)
        run.train()
        found, history = table(tmp_path / "log.csv"), run.state.log_history
        assert [*found[0]][:3] == ["step", "epoch", "loss"]
        assert len(found) == len(history) == 6  # three steps, two evaluations, the training's end
        for row, entry in zip(found, history, strict=True):
            given = {name: value for name, value in row.items() if value != ""}
            assert {name: float(value) for name, value in given.items()} == entry
        run.evaluate()
        assert len(table(tmp_path / "log.csv")) == 7

    def test_a_row_is_there_as_soon_as_it_is_logged(self, tmp_path) -> None:
        counts: list[int] = []
        run = trainer(tmp_path, small_model(), rows(8), report_to=["csv"])
        log = run.log

        def counted(*given: Any) -> None:
            log(*given)
            counts.append(len(table(tmp_path / "log.csv")))

        run.log = counted
        run.train()
        assert counts == [1, 2, 3, 4, 5]

    def test_a_continued_recipe_has_the_rows_of_one_that_was_not(self, tmp_path) -> None:
        training = {"report_to": "csv", "logging_steps": 1, "save_steps": 2}
        short = parse_recipe(content(data={"eval_blocks": 0}, training=training))
        whole = run_recipe(short, tmp_path / "whole", progress=False)
        run_recipe(short, tmp_path / "parts", progress=False)
        parts = tmp_path / "parts"
        # As a run that was killed behind its second step's checkpoint, while it wrote a row.
        (parts / "metrics.json").unlink()
        for leftover in parts.glob("checkpoint-4/*"):
            leftover.unlink()
        (parts / "checkpoint-4").rmdir()
        text = (parts / "log.csv").read_text().splitlines(keepends=True)
        (parts / "log.csv").write_text("".join(text[:4]) + text[4][:20])
        assert [row["step"] for row in csv_log.read(parts / "log.csv")] == ["1", "2", "3"]
        run_recipe(short, parts, progress=False)
        expected, found = table(whole.output / "log.csv"), table(parts / "log.csv")
        assert [row["step"] for row in found] == ["1", "2", "3", "4", "4"]
        for one, other in zip(expected, found, strict=True):
            assert (one["step"], one["loss"], one["reward"]) == (
                *(other["step"], other["loss"], other["reward"]),
            )

    def test_a_new_training_starts_a_new_file(self, tmp_path) -> None:
        (tmp_path / "log.csv").write_text("step,epoch,loss\n1,0.1,9.0\n")
        trainer(tmp_path, small_model(), rows(8), max_steps=1, report_to=["csv"]).train()
        assert [row["step"] for row in table(tmp_path / "log.csv")] == ["1", "1"]

    def test_what_is_no_such_table_has_no_rows(self, tmp_path) -> None:
        path = tmp_path / "log.csv"
        assert csv_log.read(path) == []
        for text in ("", "a,b\n1,2\n", "step,epoch\none,2\n3\n4,5,6\n"):
            path.write_text(text)
            assert csv_log.read(path) == []
        path.write_text("step,epoch,loss\n1,0.1,9.25\n2,0.2,8.1")  # of 8.125
        assert [row["loss"] for row in csv_log.read(path)] == ["9.25"]

    def test_a_full_disk_costs_no_row(self, tmp_path, monkeypatch, caplog) -> None:
        whole = csv_log.write_whole
        failing = [True, True, False]

        def fails(path: Path, text: str) -> None:
            if failing and failing.pop(0):
                raise OSError(28, "No space left on device")
            whole(path, text)

        monkeypatch.setattr(csv_log, "write_whole", fails)
        with caplog.at_level(logging.WARNING, logger="quietstar"):
            run = trainer(tmp_path, small_model(), rows(8), report_to=["csv"])
            run.train()
        assert caplog.text.count("log.csv cannot be written: No space left on device") == 2
        assert [row["step"] for row in table(tmp_path / "log.csv")] == ["1", "2", "3", "4", "4"]

    def test_other_processes_write_nothing(self, tmp_path) -> None:
        run = trainer(tmp_path, small_model(), rows(8), report_to=[])
        callback = csv_log.CsvLog()
        run.state.is_world_process_zero = False
        callback.on_train_begin(run.args, run.state, run.control)
        callback.on_log(run.args, run.state, run.control, logs={"loss": 1.0})
        assert not (tmp_path / "log.csv").exists()


def test_tensorboard(tmp_path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = trainer(tmp_path, small_model(), rows(8), report_to=["tensorboard"], **EVALUATES)
    run.train()
    (folder,) = (tmp_path / "runs").iterdir()
    read = events.EventAccumulator(str(folder)).Reload()
    for name in METRICS:
        tag = f"eval/{name.removeprefix('eval_')}" if "eval_" in name else f"train/{name}"
        found = [(event.step, event.value) for event in read.Scalars(tag)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged(run)[name]]
        assert len(found) == (2 if "eval_" in name else 3)


@pytest.mark.slow
def test_wandb_without_a_network(tmp_path) -> None:
    pytest.importorskip("wandb")
    code = """
import json
from pathlib import Path
from small_training import rows, small_model, trainer
run = trainer(Path("out"), small_model(), rows(8), report_to=["wandb"], max_steps=3,
              eval_strategy="steps", eval_steps=2)
run.train()
Path("history.json").write_text(json.dumps(run.state.log_history))
"""
    support = str(Path(__file__).parents[1] / "support")
    variables = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    code = f"import sys; sys.path.insert(0, {support!r})\n{code}"
    run_python("-c", code, cwd=tmp_path, **variables)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    history = json.loads((tmp_path / "history.json").read_text())
    found = wandb_rows(file)
    for name in METRICS:
        key = f"eval/{name.removeprefix('eval_')}" if "eval_" in name else f"train/{name}"
        values = [(row["train/global_step"], row[key]) for row in found if key in row]
        assert values == [(entry["step"], entry[name]) for entry in history if name in entry], name


def wandb_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of an offline run's file."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
    return found


def leveldb_records(content: bytes, block: int = 2**15, header: int = 7) -> Iterator[bytes]:
    """What a file of LevelDB's log format holds, which begins with a header of Weights & Biases' own.

    Blocks hold pieces: a checksum (4 bytes), a length (2), a kind (whole, first, middle, last) and data.
    """
    assert content[:4] == b":W&B"
    at, record = header, b""
    while at + header <= len(content):
        if block - at % block < header:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):
            yield record
            record = b""
