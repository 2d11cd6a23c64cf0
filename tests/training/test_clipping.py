"""Two gradients, clipped apart."""

import copy
import math
from typing import Any

import pytest
import seeds
import torch
from small_training import rows, small_model, trainer
from transformers import TrainerCallback

from quietstar import QuietStarTrainer


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


def first_step(tmp_path, model, data: list, **settings: Any) -> tuple[Any, list[dict]]:
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
    seeds.reseed()
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
    assert not run.policy_clipper.gradients


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
