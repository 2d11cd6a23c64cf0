"""The averaged copy: how it follows, what it predicts, saved and resumed."""

import copy
from typing import Any

import pytest
import seeds
import torch
from safetensors.torch import load_file
from small_training import LENGTH, Interrupt, rows, small_model, trainer
from torch import nn

from quietstar import QuietStarForCausalLM, QuietStarTrainer
from quietstar.training.ema import EmaCopy


def test_the_copy_follows_and_predicts_without_thoughts():
    seeds.reseed()
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
    seeds.reseed()
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
    seeds.reseed()
    data = rows()
    settings = {"max_steps": 6, "save_steps": 3, "ema_decay": 0.9}

    whole = trainer(tmp_path / "whole", small_model(reward=reward), data, **settings)
    whole.train()
    first = trainer(tmp_path / "parts", small_model(reward=reward), data, **settings)
    first.add_callback(Interrupt(4))
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
