"""Steps that are not finite are skipped, and nothing poisoned is saved."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from small_training import Snapshots, rows, small_model, trainer
from torch import nn
from transformers import TrainerCallback

from quietstar import QuietStarForCausalLM, QuietStarTrainer
from quietstar.errors import UserError
from quietstar.recipes.recipe import load_recipe
from quietstar.training.arguments import QuietStarArguments
from quietstar.training.guard import NonFiniteGuard, NonFiniteLoss


class Poison:
    """Turns the gradient of chosen backward passes (counted from 0) into infinity."""

    def __init__(self, model: QuietStarForCausalLM, passes: set[int], value: float = float("inf")):
        self.count, self.passes, self.value = -1, passes, value
        model.thought_embedding.start.register_hook(self)

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return torch.full_like(gradient, self.value) if self.count in self.passes else gradient


@pytest.mark.parametrize(
    ("apart", "value"), [(False, float("inf")), (True, float("nan"))], ids=["one-clip", "two-clips"]
)
def test_a_step_with_a_bad_gradient_changes_nothing(tmp_path, apart: bool, value: float):
    """Only the first of the two micro-batches of step 3 is bad."""
    settings = {"policy_max_grad_norm": 1.0} if apart else {}
    model = small_model(reward="information-gain")
    Poison(model, {8 if apart else 4}, value)
    settings |= {"max_steps": 5, "gradient_accumulation_steps": 2, "save_steps": 1}
    run = trainer(tmp_path, model, rows(), **settings)
    after = Snapshots(run)
    run.train()
    assert [e["skipped_steps"] for e in run.state.log_history if "skipped_steps" in e] == [0, 0, 1, 1, 1]
    assert run.guard.in_a_row == 0
    assert run.ema is not None and after.same(1, 2) and not after.same(2, 3, "copy")
    for earlier in (0, 2, 3):
        assert not after.same(earlier, earlier + 1, "weights")
    for folder in tmp_path.glob("checkpoint-*"):
        for file in folder.glob("*.safetensors"):
            assert all(torch.isfinite(t).all() for t in load_file(file).values()), file
    assert len(list(tmp_path.glob("checkpoint-*"))) == 5


def test_a_step_with_a_bad_loss_is_skipped_and_left_out_of_the_means(tmp_path):
    class Bad(QuietStarTrainer):
        def run_model(self, model, inputs):
            output = super().run_model(model, inputs)
            if self.state.global_step == 1:
                output.loss = output.loss * float("nan")
                output.base_loss = output.base_loss * float("nan")
            return output

    run = trainer(tmp_path, small_model(), rows(), logging_steps=4)
    run.__class__ = Bad
    run.train()
    (entry,) = [e for e in run.state.log_history if "skipped_steps" in e]
    assert entry["skipped_steps"] == 1
    assert math.isfinite(entry["base_loss"]) and entry["base_loss"] > 0.1
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_it_stops_after_too_many_skipped_steps_in_a_row(tmp_path):
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    # Steps 1 and 2 are bad, 3 is good, and then all are bad.
    Poison(model, {0, 1, *range(3, 20)})
    run = trainer(tmp_path, model, rows(), max_steps=12, max_skipped_steps=3, save_steps=3)
    at = Snapshots(run)
    with pytest.raises(
        NonFiniteLoss, match=r"gradient at step 7 is not finite \(4 skipped steps in a row\)"
    ):
        run.train()
    equal = [all(map(torch.equal, at.steps[n]["weights"], before.values())) for n in (1, 2)]
    assert equal == [True, False]
    # What was saved on the way holds the weights of the last good step.
    kept = dict(zip(before, at.steps[2]["weights"], strict=True))
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert torch.equal(saved["mixing_head.fc1.weight"], kept["mixing_head.fc1.weight"])


def test_a_resumed_run_counts_on(tmp_path):
    settings = {"max_steps": 4, "save_steps": 2}
    model = small_model()
    Poison(model, {0})
    first = trainer(tmp_path, model, rows(), **{**settings, "max_steps": 2})
    first.train()
    second = trainer(tmp_path, small_model(), rows(), **settings)
    second.train(resume_from_checkpoint=True)
    assert second.state.log_history[-2]["skipped_steps"] == 1


def test_poisoned_weights_are_never_saved(tmp_path):
    class PoisonWeights(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    model.mixing_head.fc1.bias[0] = float("inf")

    run = trainer(tmp_path, small_model(), rows(), save_steps=2)
    run.add_callback(PoisonWeights())
    with pytest.raises(
        NonFiniteLoss, match="weights after step 4 are not finite.*last checkpoint is kept"
    ):
        run.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_guard_asks_all_processes():
    """A loss that is bad elsewhere skips the step here, too."""
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    guard = NonFiniteGuard(limit=1)
    guard.saw(torch.tensor(1.0))
    assert not guard.skips([parameter], 1)
    assert parameter.grad is not None
    guard.saw(torch.tensor(1.0))
    assert guard.skips([parameter], 2, add_up=lambda own: own + torch.tensor([1.0, 0.0]))
    assert parameter.grad is None and guard.skipped == 1
    guard.saw(torch.tensor(float("nan")))
    with pytest.raises(
        NonFiniteLoss, match=r"loss at step 3 is not finite \(2 skipped steps in a row\)"
    ):
        guard.skips([parameter], 3)


def test_a_gradient_scaler_skips_and_lowers_its_scale():
    parameter = nn.Parameter(torch.ones(3))
    optimiser = torch.optim.AdamW([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**125)
    guard = NonFiniteGuard(limit=0)
    moved = []
    for step in range(1, 8):
        loss = (parameter * 100).sum()
        guard.saw(loss)
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        moved.append(not guard.skips([parameter], step, scale=scaler.get_scale()))
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
    # 100 times the scale is beyond fp32 until the scale has been halved often enough; none of it counts.
    assert moved == [False] * 4 + [True] * 3
    assert guard.skipped == 4 and optimiser.state[parameter]["step"] == 3
    parameter.grad = torch.full((3,), float("inf"))
    with pytest.raises(NonFiniteLoss, match="gradient at step 8 is not finite;"):
        guard.skips([parameter], 8, scale=1.0)


def test_clipping_apart_is_refused_where_it_cannot_work(tmp_path):
    with pytest.raises(ValueError, match="policy_max_grad_norm is 1.0 with .*lomo.*; expected null"):
        trainer(tmp_path, small_model(), rows(4), policy_max_grad_norm=1.0, optim="lomo")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"policy_max_grad_norm": 0.0}, "policy_max_grad_norm is 0.0; expected a number > 0, or null"),
        ({"max_skipped_steps": -1}, "max_skipped_steps is -1; expected 0 or more"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; expected a number from 0 to below 1"),
    ],
)
def test_refused_arguments(tmp_path, settings: dict, words: str):
    from quietstar.recipes.run import training_arguments

    with pytest.raises(ValueError) as error:
        QuietStarArguments(output_dir=str(tmp_path), **settings)
    assert words in str(error.value)
    with pytest.raises(UserError) as refused:
        training_arguments(load_recipe("tiny").changed(training=settings), tmp_path, progress=False)
    assert words in str(refused.value)
