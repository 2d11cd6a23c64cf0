"""What saves memory or time changes nothing else: checkpointing, offload, accumulation, compile."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_decoder
from transformers import TrainingArguments

from quietstar import QuietStarForCausalLM, QuietStarTrainer

needs_kwargs = pytest.mark.skipif(
    "activation_checkpointing_kwargs" not in TrainingArguments.__dataclass_fields__,
    reason="this release of transformers has no activation_checkpointing_kwargs",
)
IDS = torch.randint(3, 30, (16, 10), generator=torch.Generator().manual_seed(4))


def small_model() -> QuietStarForCausalLM:
    model = QuietStarForCausalLM.from_base(
        tiny_decoder("llama", vocab_size=48, num_hidden_layers=3),
        start_token_id=39,
        end_token_id=40,
        thought_length=2,
        talk_length=2,
    )
    with torch.no_grad():
        model.mixing_head.fc3.weight.normal_(0, 0.3)
    return model


def train(folder: Path, dtype: torch.dtype = torch.float64, **settings: Any) -> dict[str, torch.Tensor]:
    """Weights after three steps on given thoughts.

    In float64, because two ways to the same sum differ in the last bit of float32, which a ReLU or a
    clamp near its kink turns into another gradient, on one processor and not on another.
    """
    thoughts = torch.randint(3, 30, (16, 2, 10, 2), generator=torch.Generator().manual_seed(5))
    rows = [
        {"input_ids": ids, "labels": ids, "thought_ids": thought}
        for ids, thought in zip(IDS, thoughts, strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        remove_unused_columns=False,
        **{"per_device_train_batch_size": 4, "optim": "sgd", **settings},
    )
    run = QuietStarTrainer(model=small_model().to(dtype), args=arguments, train_dataset=rows)
    run.train()
    return {n.replace("_orig_mod.", ""): p.detach().clone() for n, p in run.model.named_parameters()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, torch.Tensor]:
    return train(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        pytest.param(
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}},
            marks=[
                needs_kwargs,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="pins memory for a GPU"),
            ],
        ),
        pytest.param(
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
            marks=needs_kwargs,
        ),
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ],
    ids=lambda s: ",".join(s) + ("+" + ",".join(s.get("activation_checkpointing_kwargs", ()))),
)
def test_the_weights_are_the_same(plain: dict[str, torch.Tensor], settings: dict[str, Any], tmp_path):
    found = train(tmp_path, **settings)
    start = dict(small_model().double().named_parameters())
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        moved = (value - start[name].detach()).abs().max()
        assert (found[name] - value).abs().max() <= 1e-4 * moved + 1e-7, name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_the_same_direction(
    plain: dict[str, torch.Tensor], precision: str, tmp_path
):
    if precision == "fp16" and not torch.cuda.is_available():
        pytest.skip("fp16 training needs a gradient scaler on a GPU")
    found = train(tmp_path, torch.float32, **{precision: True})
    start = dict(small_model().named_parameters())
    ours = torch.cat([(found[n] - start[n].detach()).flatten() for n in plain])
    theirs = torch.cat([(plain[n].float() - start[n].detach()).flatten() for n in plain])
    assert all(p.dtype == torch.float32 for p in found.values())
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.7


def test_activations_may_lie_elsewhere():
    """Torch's own hooks for saved tensors, under checkpointing and without."""
    model = small_model().train()
    thoughts = torch.randint(3, 30, (2, 2, 10, 2))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(IDS[:2], labels=IDS[:2], thought_ids=thoughts).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    expected, moved = gradients(), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor.numel())
        return tensor.detach().clone()

    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        moved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = gradients()
        assert sum(moved) > 10_000
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name


@pytest.mark.slow
def test_the_packed_pass_compiles_in_one_graph():
    model = small_model().train()
    thoughts = torch.randint(3, 30, (2, 2, 10, 2))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(IDS[:2], labels=IDS[:2], thought_ids=thoughts).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    expected = gradients()
    body = model.base.base_model
    eager = body.forward
    body.forward = torch.compile(eager, fullgraph=True, backend="aot_eager")
    compiled = gradients()
    body.forward = eager
    # The whole model breaks into several graphs, where the host looks at the data.
    torch._dynamo.reset()
    model.zero_grad()
    whole = torch.compile(model, backend="aot_eager")
    whole(IDS[:2], labels=IDS[:2], thought_ids=thoughts).loss.backward()
    broken = {n: p.grad for n, p in model.named_parameters()}
    for found in (compiled, broken):
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name
