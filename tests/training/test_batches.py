"""One step over accumulated micro-batches is the step over all of them; rows without a target."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from learn_cases import FIELDS, Row, build, lay, rows
from small_training import Interrupt, Snapshots, small_model, trainer
from torch import Tensor

from quietstar import QuietStarTrainer


def data(layout: str) -> list[list[Row]]:
    """Eight rows of uneven lengths, each some documents; one has no target, one a single token."""
    texts = rows(False) + [
        {name: value[:4] if name != "thought_ids" else value[:, :4] for name, value in row.items()}
        for row in rows(False)
    ]
    texts[4] = {**texts[4], "labels": torch.full_like(texts[4]["labels"], -100)}
    texts[6] = {name: v[:, :1] if name == "thought_ids" else v[:1] for name, v in texts[6].items()}
    if layout == "packed":
        return [[texts[i], texts[i - 1]] for i in range(8)]
    return [[text] for text in texts]


def step(folder: Path, layout: str, batch: int, fields: dict, **settings: Any) -> tuple[Tensor, dict]:
    """What one step of plain gradient descent does to all weights, and the log entry."""
    model = build(**{"policy_weight": 2.0, **fields})
    before = [p.detach().clone() for p in model.parameters()]
    settings |= {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch}
    run = trainer(folder, model, data(layout), lr_scheduler_type="constant", **settings)

    def collate(texts: list[list[Row]]) -> Row:
        found = lay(texts, right=layout != "left")
        if layout != "packed":
            del found["document_ids"]
        return found

    run.data_collator = collate
    run.train()
    moved = [(old - p.detach()).flatten() for old, p in zip(before, model.parameters(), strict=True)]
    return torch.cat(moved), run.state.log_history[0]


def in_order(folder: Path, data: list[Row], model: Any = None, **settings: Any) -> QuietStarTrainer:
    """Row after row."""
    settings = {"per_device_train_batch_size": 1, "in_order": True, **settings}
    return trainer(folder, model or small_model(), data, **settings)


@pytest.mark.parametrize(
    ("layout", "fields", "settings"),
    [
        ("right", "default", {}),
        ("left", "stride", {}),
        ("packed", "grpo", {}),
        ("packed", "stride", {"policy_max_grad_norm": 0.5}),
        ("right", "rlp", {"policy_max_grad_norm": 0.5}),
    ],
)
def test_eight_small_batches_are_one_large(tmp_path, layout: str, fields: str, settings: dict):
    (whole, entry), (pieces, other) = (
        step(tmp_path, layout, batch, FIELDS[fields], **settings) for batch in (8, 1)
    )
    assert whole.norm() > 0.1
    assert (whole - pieces).norm() < 1e-5 * whole.norm()
    same = [
        name for name in entry if name.startswith(("base", "talk", "gain", "reward", "policy", "pos"))
    ]
    assert len(same) >= 7
    for name in (*same, "loss", "mixing_weight", "rows_without_targets"):
        assert other[name] == pytest.approx(entry[name], rel=1e-4, abs=1e-6), name
    assert entry["rows_without_targets"] == (0 if layout == "packed" else 2)


@pytest.mark.parametrize("rule", ["entropy:0.5", "loss:4:4.6"])
def test_where_positions_follow_from_the_pass_micro_batches_weigh_as_their_targets(tmp_path, rule: str):
    """The base prediction's mean is exact; an empty micro-batch weighs nothing."""
    fields = {"think_at": rule, "base_loss_weight": 1.0, "clamp_advantage": False}
    (whole, _), (pieces, _) = (
        step(tmp_path, "right", n, {**fields, "policy_weight": 0.0}) for n in (8, 1)
    )
    assert whole.norm() > 0.1
    assert (whole - pieces).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["anchors", "completion_anchors"])
def test_rows_with_anchors_of_their_own(tmp_path, side: str, name: str):
    """Collated by the trainer, ragged: eight micro-batches of one row are one batch of eight."""
    found = []
    made = [row for (row,) in data("right")]
    for number, row in enumerate(made):
        length = len(row["input_ids"])
        row[name] = torch.arange(0, length, 2 + number % 3)[: 1 + number % 4]
    for batch in (8, 1):
        model = build(policy_weight=2.0, think_at="completion" if name.startswith("c") else "all")
        before = [p.detach().clone() for p in model.parameters()]
        settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
        settings |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch}
        run = trainer(tmp_path, model, made, lr_scheduler_type="constant", **settings)
        run.data_collator.padding_side = side
        run.train()
        moved = [(o - p.detach()).flatten() for o, p in zip(before, model.parameters(), strict=True)]
        found.append(torch.cat(moved))
        bare = [{k: v for k, v in row.items() if k != "thought_ids"} for row in made]
        assert run.evaluate(bare)["eval_talk_loss_0"] > 0
        # Predictions are at every position, whatever thinks.
        run.compute_metrics = lambda given: {"width": given.predictions.shape[1]}
        assert run.evaluate(bare)["eval_width"] == max(len(row["input_ids"]) for row in made)
    whole, pieces = found
    assert whole.norm() > 0.1 and (whole - pieces).norm() < 1e-5 * whole.norm()


# ---- without a target ---------------------------------------------------------------------------


def texts(count: int, without: set[int]) -> list[Row]:
    generator = torch.Generator().manual_seed(6)
    made = []
    for number in range(count):
        ids = torch.randint(3, 30, (10,), generator=generator)
        labels = torch.full_like(ids, -100) if number in without else ids
        made.append({"input_ids": ids, "labels": labels})
    return made


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"policy_max_grad_norm": 1.0}],
    ids=["plain", "accumulated", "two-clips"],
)
@pytest.mark.parametrize(
    "fields", [{}, {"reward": "information-gain", "think_at": "random:0.5"}], ids=str
)
def test_a_step_without_a_target_changes_nothing(tmp_path, caplog, settings: dict, fields: dict):
    per_step = settings.get("gradient_accumulation_steps", 1)
    # All rows of the second step, and one of the third if it has two.
    without = set(range(per_step, 2 * per_step)) | ({5} if per_step == 2 else set())
    run = in_order(
        tmp_path, texts(4 * per_step, without), small_model(**fields), max_skipped_steps=0, **settings
    )
    after = Snapshots(run)
    with caplog.at_level(logging.WARNING, "quietstar"):
        run.train()
    entries = [e for e in run.state.log_history if "steps_without_targets" in e]
    assert [e["steps_without_targets"] for e in entries] == [0, 1, 1, 1]
    assert entries[-1]["rows_without_targets"] == len(without)
    assert entries[-1]["skipped_steps"] == 0
    assert "base_loss" in entries[0] and "base_loss" not in entries[1]
    assert [after.same(step, step + 1) for step in range(3)] == [True, False, False]
    said = [r.getMessage() for r in caplog.records if "no target" in r.getMessage()]
    assert len(said) == 2 and "of step 2 have no target" in said[0]
    assert f"{len(without)} rows of the training had no target, and 1 of 4 steps" in said[1]


def test_the_counts_go_on_in_a_resumed_run(tmp_path):
    for steps in (2, 4):
        run = in_order(tmp_path, texts(8, {1, 2}), max_steps=steps, save_steps=2)
        run.train(resume_from_checkpoint=steps == 4)
    entries = [e["rows_without_targets"] for e in run.state.log_history if "loss" in e]
    assert entries == [0, 1, 2, 2]


def test_data_without_any_target_are_an_error(tmp_path):
    run = trainer(tmp_path, small_model(), texts(8, set(range(8))), max_steps=20)
    with pytest.raises(ValueError, match="none of the rows of 4 steps has a target"):
        run.train()
    assert run.state.global_step == 4  # seen once, not three times
    with pytest.raises(ValueError, match="the evaluation data have no target"):
        run.evaluate()


def test_evaluation_is_over_targets(tmp_path):
    """Rows without a target, and how the rows are batched, do not change the mean."""
    made = texts(6, {1, 4})
    made[0]["labels"] = made[0]["labels"].clone()
    made[0]["labels"][3:] = -100
    run = trainer(tmp_path, small_model(), made, per_device_eval_batch_size=1)
    found = [run.evaluate(made), run.evaluate([row for n, row in enumerate(made) if n not in (1, 4)])]
    run.args.per_device_eval_batch_size = 6
    found.append(run.evaluate(made))
    for name in ("eval_loss", "eval_base_loss", "eval_talk_loss_1", "eval_gain", "eval_reward"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5), name
        assert found[2][name] == pytest.approx(found[0][name], rel=1e-5), name


def test_short_rows_alone_in_a_batch_are_trained_on(tmp_path):
    """Two tokens have one to predict, one token none: neither ends the run."""
    made = [
        {"input_ids": row["input_ids"][:n], "labels": row["labels"][:n]}
        for row, n in zip(texts(4, set()), (10, 1, 2, 3), strict=True)
    ]
    run = in_order(tmp_path, made)
    run.train()
    entries = [e for e in run.state.log_history if "loss" in e]
    assert [e["steps_without_targets"] for e in entries] == [0, 1, 1, 1]
    assert all(e["base_loss"] > 0 for n, e in enumerate(entries) if n != 1)


@pytest.mark.parametrize("first", [{3}, {0, 1}], ids=["later", "before"])
def test_a_resumed_run_has_perhaps_learnt_before(tmp_path, first: set[int]):
    """The steps of one call are not the whole training, nor is the last log entry its last step."""
    reward = "information-gain" if 0 in first else "mixture-gain"
    ends = []
    for folder, stops in (("whole", (4,)), ("parts", (1 if 0 in first else 3, 4))):
        for steps in stops:
            settings = {"max_steps": steps, "logging_steps": 3 if steps < 4 else 4, "save_steps": 1}
            run = in_order(tmp_path / folder, texts(4, first), small_model(reward=reward), **settings)
            if steps == 1:
                # Killed after its first checkpoint, not at an end.
                run.add_callback(Interrupt(at_save=True))
                with pytest.raises(KeyboardInterrupt):
                    run.train()
                continue
            run.train(resume_from_checkpoint=steps == 4 and folder == "parts")
        ends.append(dict(run.without_targets))
    assert ends[0] == ends[1] == {n: len(first) for n in ends[0]}


def test_mean_losses_are_over_steps_with_a_target(tmp_path):
    run = in_order(tmp_path, texts(4, {1, 2, 3}), small_model(thought_kind="none"), logging_steps=2)
    result = run.train()
    first, second = [e for e in run.state.log_history if "loss" in e]
    assert first["loss"] == pytest.approx(first["base_loss"], rel=1e-4)
    assert second["loss"] == first["loss"] and "base_loss" not in second
    assert result.training_loss == pytest.approx(first["base_loss"], rel=1e-4)
    assert result.metrics["train_loss"] == result.training_loss


def test_a_gradient_scaler_without_clipping_meets_a_step_without_a_target(tmp_path):
    run = in_order(tmp_path, texts(3, {1}), max_grad_norm=0.0, max_steps=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    accelerator = run.accelerator
    accelerator.scaler, accelerator.native_amp = scaler, True
    accelerator.state._mixed_precision = "fp16"
    after = Snapshots(run)
    try:
        run.train()
    finally:
        accelerator.state._mixed_precision = "no"
    assert after.same(0, 1) and run.without_targets["steps_without_targets"] == 1


def test_predictions_need_no_target(tmp_path):
    made = texts(2, {0, 1})
    run = trainer(tmp_path, small_model(), made)
    found = run.predict(made)
    assert len(found.predictions) == 2 and "test_loss" not in found.metrics
    with pytest.raises(ValueError, match="the evaluation data have no target"):
        run.evaluate(made)


def test_rows_with_losses_to_measure_against_are_refused(tmp_path):
    made = [{**row, "baseline_losses": torch.zeros(9)} for row in texts(4, set())]
    run = trainer(tmp_path, small_model(reward="information-gain"), made)
    with pytest.raises(ValueError, match="the batch has baseline_losses, but QuietStarTrainer"):
        run.train()
