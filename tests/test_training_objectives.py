"""The trainer's part in the objectives: two clips, the averaged copy, the schedule, skipped steps."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_decoder
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from quietstar import QuietStarConfig, QuietStarForCausalLM, QuietStarTrainer
from quietstar.arguments import QuietStarArguments
from quietstar.ema import EmaCopy
from quietstar.errors import UserError
from quietstar.guard import NonFiniteGuard, NonFiniteLoss
from quietstar.recipe import load_recipe
from quietstar.schedule import Schedule

LENGTH, THOUGHT = 10, 2


def small_model(**fields: Any) -> QuietStarForCausalLM:
    settings = {"thought_length": THOUGHT, "talk_length": 2, **fields}
    model = QuietStarForCausalLM.from_base(
        tiny_decoder("llama", vocab_size=48), start_token_id=39, end_token_id=40, **settings
    )
    with torch.no_grad():
        model.mixing_head.fc3.weight.normal_(0, 0.3)
    return model


def rows(count: int = 32, thoughts: bool = False) -> list[dict[str, torch.Tensor]]:
    made = []
    for _ in range(count):
        ids = torch.randint(3, 30, (LENGTH,))
        row = {"input_ids": ids, "labels": ids}
        if thoughts:
            row["thought_ids"] = torch.randint(3, 30, (2, LENGTH, THOUGHT))
        made.append(row)
    return made


def trainer(folder: Path, model: QuietStarForCausalLM, data: list, **settings: Any) -> QuietStarTrainer:
    defaults = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 3e-3}
    defaults |= {"logging_steps": 1, "save_strategy": "no"}
    arguments = QuietStarArguments(
        output_dir=str(folder),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=7,
        **{**defaults, **settings},
    )
    return QuietStarTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:4])


class AtTheStep(TrainerCallback):
    """Keeps the gradients that the optimiser gets; added last, so that it sees the merged ones."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        self.gradients.append({name: gradient.clone() for name, gradient in found.items()})


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


def two_gradients(model, batches: list[dict]) -> list[dict[str, torch.Tensor]]:
    """Gradients of the language-model loss and of the thinking loss, each the mean over batches."""
    model.train()
    parts = []
    for part in ("language_loss", "thinking_loss"):
        model.zero_grad()
        for batch in batches:
            (getattr(model(**batch), part) / len(batches)).backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        parts.append({name: gradient.clone() for name, gradient in found.items()})
    return parts


def first_step(tmp_path: Path, model, data: list, **settings: Any) -> tuple[Any, list[dict]]:
    """One optimiser step; the gradients that it was given, and the two of its batches by hand."""
    by_hand = copy.deepcopy(model)
    seen: list[dict] = []

    class Batches(QuietStarTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append({key: value.clone() for key, value in inputs.items()})
            return super().training_step(model, inputs, *args, **kwargs)

    run = trainer(tmp_path, model, data, max_steps=1, **settings)
    run.__class__ = Batches
    at = AtTheStep()
    run.add_callback(at)
    run.train()
    (gradients,) = at.gradients
    return (run, gradients), two_gradients(by_hand, seen)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_two_gradients_are_clipped_apart(tmp_path, accumulate: int, checkpointing: bool):
    torch.seed()
    data = rows(thoughts=True)
    (run, gradients), (language, thinking) = first_step(
        tmp_path,
        small_model(policy_weight=1e6),
        data,
        max_grad_norm=0.5,
        policy_max_grad_norm=0.2,
        gradient_accumulation_steps=accumulate,
        gradient_checkpointing=checkpointing,
    )
    assert norm(language) > 0.5 and norm(thinking) > 0.2
    for name, gradient in gradients.items():
        expected = 0.5 / norm(language) * language[name]
        if name in thinking:
            expected = expected + 0.2 / norm(thinking) * thinking[name]
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, name
    logged = run.state.log_history[0]
    assert logged["grad_norm"] == pytest.approx(norm(language), rel=1e-3)
    assert logged["policy_grad_norm"] == pytest.approx(norm(thinking), rel=1e-3)
    # The logged loss is still the whole one.
    assert logged["loss"] > 1e3
    assert not run._policy_gradient.gradients


def test_small_gradients_are_left_alone(tmp_path):
    data = rows(thoughts=True)
    (_, gradients), (language, thinking) = first_step(
        tmp_path, small_model(policy_weight=2.0), data, max_grad_norm=0.0, policy_max_grad_norm=1e4
    )
    for name, gradient in gradients.items():
        expected = language[name] + thinking.get(name, 0.0)
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, name


def test_one_global_clip_leaves_next_to_nothing_of_the_language_model_loss(tmp_path):
    """With the reference's weight of 1e6, and what becomes of it with the two clipped apart."""
    shares = {}
    for kind, settings in {"global": {}, "apart": {"policy_max_grad_norm": 1.0}}.items():
        data = rows(thoughts=True)
        (_, gradients), (language, thinking) = first_step(
            tmp_path / kind, small_model(policy_weight=1e6), data, max_grad_norm=1.0, **settings
        )
        # What the update holds of the language model's direction: a least-squares fit of both.
        first, second = ([part.get(n, torch.zeros_like(g)) for n, g in gradients.items()]
                         for part in (language, thinking))  # fmt: skip
        columns = torch.stack([torch.cat([g.flatten() for g in v]) for v in (first, second)], 1).double()
        scale = columns.norm(dim=0)
        update = torch.cat([g.flatten() for g in gradients.values()]).double()
        share = torch.linalg.lstsq(columns / scale, update[:, None]).solution[:, 0]
        shares[kind] = share.tolist()
        assert norm(gradients) <= 2.001
    # Of a unit of clipped gradient the language-model loss keeps less than a ten-thousandth ...
    assert abs(shares["global"][0]) < 1e-4 and shares["global"][1] == pytest.approx(1, abs=1e-3)
    # ... and apart it has its own unit.
    assert shares["apart"] == pytest.approx([1, 1], abs=1e-3)


# ---- the averaged copy ----------------------------------------------------------------------------


def test_the_copy_follows_and_predicts_without_thoughts():
    torch.seed()
    model = small_model()
    began = copy.deepcopy(model)
    ema = EmaCopy(model, decay=0.75)
    assert not any("mixing_head" in name or "thought_embedding" in name for name in ema.values)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ema.update(model)
    moved = copy.deepcopy(model)
    expected = copy.deepcopy(began)
    with torch.no_grad():
        for e, b, m in zip(expected.parameters(), began.parameters(), moved.parameters(), strict=True):
            e.copy_(0.75 * b + 0.25 * m)
    ids = torch.randint(3, 30, (2, LENGTH))
    model.train()
    losses = ema.base_losses(model, model, {"input_ids": ids, "labels": ids, "thought_ids": None})
    logits = expected.base(ids).logits[:, :-1]
    by_hand = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    assert torch.allclose(losses, by_hand, atol=1e-4)
    # The model has its own weights again, to the bit, and its mode and kind of thoughts.
    for ours, before in zip(model.parameters(), moved.parameters(), strict=True):
        assert torch.equal(ours, before)
    assert model.training and model.config.thought_kind == "sampled"


def test_a_copy_of_bf16_weights_moves_in_fp32():
    model = small_model().to(torch.bfloat16)
    ema = EmaCopy(model, decay=0.999)
    name = "base.model.norm.weight"
    before = ema.values[name].clone()
    with torch.no_grad():
        model.base.model.norm.weight.add_(1.0)
    ema.update(model)
    assert ema.values[name].dtype == torch.float32
    assert torch.allclose(ema.values[name] - before, torch.tensor(0.001), rtol=1e-2)


def test_what_is_not_trained_has_no_copy():
    model = small_model()
    for parameter in model.base.parameters():
        parameter.requires_grad_(False)
    model.base.lm_head.weight.requires_grad_(True)
    assert list(EmaCopy(model, 0.9).values) == ["base.lm_head.weight"]


def test_training_measures_against_the_copy(tmp_path):
    """The rewards of three steps, by hand: SGD, the copy after each step, the losses of each batch."""
    torch.seed()
    model, data = small_model(reward="information-gain"), rows(thoughts=True)
    seen: list[tuple[dict, Any]] = []

    class Watching(QuietStarTrainer):
        def run_model(self, model, inputs):
            output = super().run_model(model, inputs)
            seen.append(({key: inputs[key].clone() for key in ("input_ids", "thought_ids")}, output))
            weights.append(copy.deepcopy(model))
            return output

    weights: list[QuietStarForCausalLM] = []
    run = trainer(tmp_path, model, data, max_steps=3, optim="sgd", learning_rate=1.0, ema_decay=0.5)
    run.__class__ = Watching
    run.train()
    average = copy.deepcopy(weights[0])
    for step in range(3):
        if step:
            with torch.no_grad():
                for a, w in zip(average.parameters(), weights[step].parameters(), strict=True):
                    a.mul_(0.5).add_(w, alpha=0.5)
        inputs, output = seen[step]
        ids = inputs["input_ids"]
        with torch.no_grad():
            losses = average.eval()(ids, labels=ids).base_losses
            again = weights[step].train()(ids, labels=ids, thought_ids=inputs["thought_ids"],
                                          baseline_losses=losses)  # fmt: skip
        assert torch.allclose(output.reward, again.reward, atol=2e-4)
        if step:
            difference = (losses - output.base_losses).abs().max()
            assert difference > 1e-3, "the copy is the model itself"
    assert run.ema is not None and len(run.ema.values) == len(list(model.base.parameters()))


@pytest.mark.parametrize("reward", ["information-gain", "base-gain"])
def test_the_copy_is_saved_and_resumed(tmp_path, reward: str):
    torch.seed()
    data = rows()
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "ema_decay": 0.9}

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    whole = trainer(tmp_path / "whole", small_model(reward=reward), data, **settings)
    whole.train()
    first = trainer(tmp_path / "parts", small_model(reward=reward), data, **settings)
    first.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = trainer(tmp_path / "parts", small_model(reward=reward), data, **settings)
    second.train(resume_from_checkpoint=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    saved = tmp_path / "parts" / "checkpoint-6" / "ema.safetensors"
    if reward == "base-gain":
        # Unused, there is no copy, in memory or on disk.
        assert whole.ema is None and not saved.exists()
        return
    assert whole.ema is not None and second.ema is not None
    for name, value in whole.ema.values.items():
        assert torch.equal(value, second.ema.values[name]), name
        assert torch.equal(value, load_file(saved)[name]), name
    saved.unlink()
    third = trainer(tmp_path / "parts", small_model(reward=reward), data, **settings)
    with pytest.raises(ValueError, match="has no ema.safetensors; expected a checkpoint of training"):
        third.train(resume_from_checkpoint=True)


# ---- the schedule -----------------------------------------------------------------------------------

STAGES = [
    {"steps": 2, "thought_length": 4, "talk_length": 3, "thought_kind": "sampled"},
    {"steps": 1, "thought_length": 3, "talk_length": 2},
    {"steps": 2, "thought_length": 1},
    {"thought_kind": "none"},
]


def test_stages_follow_from_the_step():
    schedule = Schedule(STAGES, QuietStarConfig())
    assert [schedule.stage(step) for step in range(8)] == [0, 0, 1, 2, 2, 3, 3, 3]
    for step, expected in {0: (4, 3, "sampled"), 2: (3, 2, "sampled"), 7: (1, 2, "none")}.items():
        # Whatever the configuration said before: a checkpoint's may be of another stage.
        config = QuietStarConfig(thought_length=9, talk_length=7, thought_kind="pause")
        assert schedule.apply(config, step)
        assert (config.thought_length, config.talk_length, config.thought_kind) == expected
        assert not schedule.apply(config, step)
    assert schedule.describe(2).startswith("step 2: stage 2 of 4 (thought_length 3, talk_length 2")


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([], "thought_schedule is []; expected a list of stages"),
        ({"steps": 1}, "expected a list of stages"),
        ([7], "stage 1 is 7; expected a mapping"),
        ([{"thought_length": 3}, {"thought_length": 2}], "stage 1: steps is None; expected a whole"),
        ([{"steps": 0, "thought_length": 3}], "stage 1: steps is 0; expected a whole number >= 1"),
        (
            [{"steps": 1, "thought_lenght": 3}],
            "stage 1 sets 'thought_lenght'; expected steps and any of",
        ),
        ([{"steps": 1, "reward": "base-gain"}], "stage 1 sets 'reward'; expected steps and any of"),
        ([{"thought_length": 0}], "stage 1: thought_length is 0; expected a whole number >= 1"),
        ([{"thought_length": "long"}], "stage 1: thought_length is 'long'; expected a whole number"),
        (
            [{"steps": 1, "thought_length": 3}, {"talk_length": 2}],
            "stage 2 sets talk_length, which stage 1 does not; set it there too",
        ),
    ],
)
def test_refused_schedules(stages: Any, words: str):
    with pytest.raises(ValueError) as error:
        Schedule(stages, QuietStarConfig())
    assert words in str(error.value)
    with pytest.raises(UserError) as refused:
        load_recipe("tiny").changed(training={"thought_schedule": stages})
    assert "thought_schedule" in str(refused.value)


@pytest.mark.parametrize("interrupted_after", [2, 3, 5])
def test_a_schedule_survives_a_resume(tmp_path, caplog, interrupted_after: int):
    torch.seed()
    data = rows()
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, "thought_schedule": STAGES}
    lengths: dict[int, tuple[int, int, str]] = {}

    class Note(TrainerCallback):
        def __init__(self, stop: int | None):
            self.stop = stop

        def on_step_end(self, args, state, control, model=None, **kwargs):
            config = model.config
            lengths[state.global_step] = config.thought_length, config.talk_length, config.thought_kind
            if state.global_step == self.stop:
                raise KeyboardInterrupt

    with caplog.at_level(logging.INFO, logger="quietstar"):
        whole = trainer(tmp_path / "whole", small_model(), data, **settings)
        whole.add_callback(Note(None))
        whole.train()
    said = [r.message for r in caplog.records if ": stage " in r.message]
    assert [line.partition(" (")[0] for line in said] == [
        "step 0: stage 1 of 4",
        "step 2: stage 2 of 4",
        "step 3: stage 3 of 4",
        "step 5: stage 4 of 4",
    ]
    stages = [entry["stage"] for entry in whole.state.log_history if "stage" in entry]
    assert stages == [1, 1, 2, 3, 3, 4, 4]
    expected = {1: (4, 3, "sampled"), 2: (4, 3, "sampled"), 3: (3, 2, "sampled")}
    expected |= {4: (1, 2, "sampled"), 5: (1, 2, "sampled"), 6: (1, 2, "none"), 7: (1, 2, "none")}
    assert lengths == expected
    lengths.clear()
    first = trainer(tmp_path / "parts", small_model(), data, **settings)
    first.add_callback(Note(interrupted_after + 1))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    checkpoint = tmp_path / "parts" / f"checkpoint-{interrupted_after}"
    # Built from the checkpoint, whose configuration is that of its stage, as well as from anew.
    for model, tolerance in (
        (small_model(), 0.0),
        # Mapped from a file, weights lie at addresses at which sums may be rounded another way.
        (QuietStarForCausalLM.from_pretrained(checkpoint), 1e-4),
    ):
        second = trainer(tmp_path / "again", model, data, **settings)
        second.add_callback(Note(None))
        second.train(resume_from_checkpoint=str(checkpoint))
        for name, value in whole.model.state_dict().items():
            assert (value - second.model.state_dict()[name]).abs().max() <= tolerance, name
    assert lengths == expected


def test_the_longest_talk_of_a_schedule_has_to_fit():
    stages = [{"steps": 5, "talk_length": 30}, {"talk_length": 2}]
    with pytest.raises(UserError, match=r"block_size is 20; expected at least 32 \(talk_length \+ 2\)"):
        load_recipe("tiny").changed(training={"thought_schedule": stages}, data={"block_size": 20})


# ---- steps that are not finite ------------------------------------------------------------------------


class Poison:
    """Turns the gradient of chosen backward passes (counted from 0) into infinity."""

    def __init__(self, model: QuietStarForCausalLM, passes: set[int], value: float = float("inf")):
        self.count, self.passes, self.value = -1, passes, value
        model.thought_embedding.start.register_hook(self)

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return torch.full_like(gradient, self.value) if self.count in self.passes else gradient


class Snapshots(TrainerCallback):
    """Weights and optimiser state after every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict, dict]] = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        optimiser = optimizer.state_dict()["state"]
        self.steps.append(copy.deepcopy((model.state_dict(), optimiser)))


def same(first: dict, second: dict) -> bool:
    if first.keys() != second.keys():
        return False
    for key, value in first.items():
        other = second[key]
        if isinstance(value, dict) and not same(value, other):
            return False
        if isinstance(value, torch.Tensor) and not torch.equal(value, other):
            return False
    return True


@pytest.mark.parametrize(
    ("apart", "value"), [(False, float("inf")), (True, float("nan"))], ids=["one-clip", "two-clips"]
)
def test_a_step_with_a_bad_gradient_changes_nothing(tmp_path, apart: bool, value: float):
    """Only the first of the two micro-batches of step 3 is bad."""
    settings = {"policy_max_grad_norm": 1.0} if apart else {}
    model = small_model(reward="information-gain")
    Poison(model, {8 if apart else 4}, value)
    run = trainer(
        tmp_path,
        model,
        rows(),
        max_steps=5,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=1,
        **settings,
    )
    after = Snapshots()
    run.add_callback(after)
    copies = []

    class Copies(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            copies.append(copy.deepcopy(run.ema.values))

    run.add_callback(Copies())
    run.train()
    assert [e["skipped_steps"] for e in run.state.log_history if "skipped_steps" in e] == [0, 0, 1, 1, 1]
    assert run.guard.in_a_row == 0
    assert same(after.steps[1][0], after.steps[2][0]) and same(after.steps[1][1], after.steps[2][1])
    assert same(copies[1], copies[2]) and not same(copies[2], copies[3])
    for earlier, later in ((0, 1), (2, 3), (3, 4)):
        assert not same(after.steps[earlier][0], after.steps[later][0])
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
    run = trainer(
        tmp_path, model, rows(), max_steps=12, max_skipped_steps=3, save_strategy="steps", save_steps=3
    )
    at = Snapshots()
    run.add_callback(at)
    with pytest.raises(
        NonFiniteLoss, match=r"gradient at step 7 is not finite \(4 skipped steps in a row\)"
    ):
        run.train()
    assert same(at.steps[1][0], before) and not same(at.steps[2][0], before)
    # What was saved on the way holds the weights of the last good step.
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert torch.equal(saved["mixing_head.fc1.weight"], at.steps[2][0]["mixing_head.fc1.weight"])


def test_a_resumed_run_counts_on(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
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

    run = trainer(tmp_path, small_model(), rows(), save_strategy="steps", save_steps=2)
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
    from quietstar.train import training_arguments

    with pytest.raises(ValueError) as error:
        QuietStarArguments(output_dir=str(tmp_path), **settings)
    assert words in str(error.value)
    with pytest.raises(UserError) as refused:
        training_arguments(load_recipe("tiny").changed(training=settings), tmp_path, progress=False)
    assert words in str(refused.value)
