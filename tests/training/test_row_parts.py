"""rows_per_backward: thoughts for the whole micro-batch, gradients a few rows at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import LENGTH, rows, small_model, trainer
from torch.autograd.graph import saved_tensors_hooks

from quietstar.training.row_parts import rows_of

CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "stride": {"think_at": "stride:3"},
    "random": {"think_at": "random:0.4"},
    "entropy": {"think_at": "entropy:0.4"},
    "completion": {"think_at": "completion"},
    "loss": {"think_at": "loss:3.5:4.2"},
    "paper": {"policy_mean": "paper", "entropy_bonus": 0.1},
    "pause": {"thought_kind": "pause"},
    "information gain": {"reward": "information-gain"},
    "plain": {"thought_kind": "none"},
}
QUICK = ("all", "completion", "entropy", "information gain")


def uneven(count: int = 12) -> list[dict[str, torch.Tensor]]:
    """Rows of several lengths, some of them in two documents, one without a target."""
    torch.manual_seed(3)
    made = rows(count)
    for number, row in enumerate(made):
        row["labels"] = row["labels"].clone()
        row["document_ids"] = (torch.arange(LENGTH) > number % 5 + 2).long()
        row["completion_anchors"] = torch.tensor([1, 7][: 1 + number % 2])
    made[1]["labels"][:] = -100
    made[2]["labels"][:5] = -100
    return made


def train(folder: Path, data: list, model: Any = None, **settings: Any) -> tuple[dict, list[dict]]:
    """Weights after three steps, and the log. In float64: two ways to a sum differ in float32."""
    model = small_model(num_rationales=2).double() if model is None else model
    defaults = {"per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.05}
    run = trainer(folder, model, data, max_steps=3, in_order=True, **{**defaults, **settings})
    run.train()
    return {n: p.detach().clone() for n, p in model.named_parameters()}, run.state.log_history


def assert_same(found: tuple[dict, list[dict]], expected: tuple[dict, list[dict]]) -> None:
    start = {n: p.detach() for n, p in small_model().double().named_parameters()}
    moved = 0.0
    for name, value in expected[0].items():
        change = float((value - start[name]).abs().max())
        moved = max(moved, change)
        assert (found[0][name] - value).abs().max() <= 1e-5 * change + 1e-9, name
    assert moved > 1e-4
    for ours, theirs in zip(found[1], expected[1], strict=True):
        for name in (
            "loss",
            "base_loss",
            "talk_loss_0",
            "policy_loss",
            "reward",
            "gain",
            "thought_entropy",
        ):
            assert (name in ours) == (name in theirs)
            assert ours.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=2e-4, abs=2e-6), name


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=() if name in QUICK else pytest.mark.slow)
        for name, size in zip(CASES, (1, 2, 3, 1, 3, 2, 3, 2, 3, 1), strict=True)
    ],
)
def test_the_weights_are_those_of_the_whole_micro_batch(name: str, size: int, tmp_path):
    found = [
        train(tmp_path, uneven(), small_model(num_rationales=2, **CASES[name]).double(), **settings)
        for settings in ({"rows_per_backward": size}, {})
    ]
    assert_same(*found)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3},
        {"policy_max_grad_norm": 0.01},
        {"bf16": True},
    ],
    ids=str,
)
def test_with_other_options(settings: dict[str, Any], tmp_path):
    model = small_model(num_rationales=2)
    model = model if settings.get("bf16") else model.double()
    copy = small_model(num_rationales=2).to(model.dtype)
    found = train(tmp_path, uneven(18), model, rows_per_backward=2, **settings)
    expected = train(tmp_path, uneven(18), copy, **settings)
    if not settings.get("bf16"):
        return assert_same(found, expected)
    # One rounding of a gradient, and the next step draws other thoughts.
    assert found[1][0]["loss"] == pytest.approx(expected[1][0]["loss"], rel=1e-3)
    assert found[1][0]["thought_entropy"] == pytest.approx(expected[1][0]["thought_entropy"], rel=1e-4)


def test_given_thoughts_and_outputs_of_the_rollout(tmp_path):
    given = rows(12, thoughts=True)
    assert_same(train(tmp_path, given, rows_per_backward=3), train(tmp_path, given))
    # Where they stand is drawn once, for all rows.
    models = [small_model(num_rationales=2, think_at="random:0.4").double() for _ in range(2)]
    ways = zip(models, ({"rows_per_backward": 1}, {}), strict=True)
    assert_same(*(train(tmp_path, given, model, **settings) for model, settings in ways))
    kept = small_model(num_rationales=2).double()
    assert kept.reuse_rollout() > 0
    assert_same(train(tmp_path, uneven(), kept, rows_per_backward=1), train(tmp_path, uneven()))


def test_one_rollout_and_less_memory(tmp_path, monkeypatch):
    """The rollout runs once for four rows; what is held for the backward pass is that of one."""
    peaks = {}
    for size in (1, None):
        model = small_model(num_rationales=2)
        texts: list[int] = []
        inner = type(model)._think_and_predict

        def watched(self, batch, *args, inner=inner, texts=texts):
            texts.append(len(batch.input_ids) if batch.shard.only_thinks else 0)
            return inner(self, batch, *args)

        monkeypatch.setattr(type(model), "_think_and_predict", watched)
        held = [0, 0]

        def pack(tensor, held=held):
            held[0] += tensor.nbytes
            held[1] = max(held)
            return tensor

        run = trainer(tmp_path, model, uneven(4), max_steps=1, per_device_train_batch_size=4)
        run.args.rows_per_backward = size
        step = run._loss_to_send_back

        def done(output, held=held, step=step):
            held[0] = 0
            return step(output)

        monkeypatch.setattr(run, "_loss_to_send_back", done)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            run.train()
        monkeypatch.undo()
        peaks[size] = held[1]
        assert texts == ([4, 0, 0, 0, 0] if size else [0])
    assert peaks[1] < 0.35 * peaks[None]


def test_what_cannot_be_cut_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cu_seq_lens_q has shape \[3\] and rows_per_backward"):
        rows_of({"input_ids": torch.ones(2, 6), "cu_seq_lens_q": torch.tensor([0, 6, 12])}, slice(0, 1))
    with pytest.raises(ValueError, match="rows_per_backward is 2 with lomo"):
        trainer(tmp_path, small_model(), rows(4), rows_per_backward=2, optim="lomo")
    with pytest.raises(ValueError, match="rows_per_backward is 2 with galore_adamw_layerwise"):
        trainer(tmp_path, small_model(), rows(4), rows_per_backward=2, optim="galore_adamw_layerwise")
    with pytest.raises(ValueError, match="rows_per_backward is 0; expected 1 or more"):
        trainer(tmp_path, small_model(), rows(4), rows_per_backward=0)
