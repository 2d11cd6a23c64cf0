"""What saves memory or time changes nothing else: checkpointing, offload, accumulation, compile."""

from pathlib import Path
from typing import Any

import pytest
import small_training
import torch
from families import gradients
from small_training import trainer
from torch.profiler import ProfilerActivity, profile
from transformers import TrainingArguments

from quietstar import QuietStarForCausalLM
from quietstar.errors import UserError

needs_kwargs = pytest.mark.skipif(
    "activation_checkpointing_kwargs" not in TrainingArguments.__dataclass_fields__,
    reason="this release of transformers has no activation_checkpointing_kwargs",
)
IDS = torch.randint(3, 30, (16, 10), generator=torch.Generator().manual_seed(4))


def small_model() -> QuietStarForCausalLM:
    return small_training.small_model(layers=3)


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
    settings = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "optim": "sgd", **settings}
    run = trainer(folder, small_model().to(dtype), rows, max_steps=3, **settings)
    run.train()
    return {n.replace("_orig_mod.", ""): p.detach().clone() for n, p in run.model.named_parameters()}


def step(model: QuietStarForCausalLM, thoughts: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS[:2], labels=IDS[:2], thought_ids=thoughts).loss.backward()
    return gradients(model)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, torch.Tensor]:
    return train(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"keep": "products"}},
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

    expected, moved = step(model, thoughts), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor.numel())
        return tensor.detach().clone()

    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        moved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = step(model, thoughts)
        assert sum(moved) > 10_000
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name


@pytest.mark.slow
def test_the_packed_pass_compiles_in_one_graph():
    model = small_model().train()
    thoughts = torch.randint(3, 30, (2, 2, 10, 2))

    expected = step(model, thoughts)
    body = model.base.base_model
    eager = body.forward
    body.forward = torch.compile(eager, fullgraph=True, backend="aot_eager")
    compiled = step(model, thoughts)
    body.forward = eager
    # The whole model breaks into several graphs, where the host looks at the data.
    torch._dynamo.reset()
    whole = torch.compile(model, backend="aot_eager")
    broken = step(whole, thoughts)
    broken = {name.removeprefix("_orig_mod."): gradient for name, gradient in broken.items()}
    for found in (compiled, broken):
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("autocast", [False, True])
def test_products_kept(autocast: bool):
    """Gradients, of a second pass through the graph, too, are those without; memory lies between."""
    gradients_of, held = {}, {}
    for way in ("none", "products", "all"):
        torch.manual_seed(0)
        model = small_training.small_model(layers=3).train()
        if way != "none":
            settings = {"keep": "products"} if way == "products" else None
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        thoughts = torch.randint(3, 30, (2, 2, 10, 2), generator=torch.Generator().manual_seed(5))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(IDS[:2], labels=IDS[:2], thought_ids=thoughts).loss
        loss.backward(retain_graph=True)
        gradients_of[way] = gradients(model)
        model.zero_grad()
        loss.backward()
        for name, value in gradients(model).items():
            torch.testing.assert_close(value, gradients_of[way][name], msg=name)
        layer = model.base.model.layers[1]
        held[way] = bytes_held(layer, autocast)
    for name, value in gradients_of["none"].items():
        for way in ("products", "all"):
            torch.testing.assert_close(gradients_of[way][name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert held["all"] < held["products"] < held["none"]


def bytes_held(layer: torch.nn.Module, autocast: bool) -> int:
    """How much memory a layer's forward pass leaves behind for the backward pass."""
    x = torch.randn(4, 64, 32, requires_grad=True)
    rope = torch.randn(4, 64, 8), torch.randn(4, 64, 8)
    casts = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record, casts:
        out = layer(x, position_embeddings=rope)
    assert out is not None  # and there until here
    found = record.profiler.kineto_results.events()
    return sum(event.nbytes() for event in found if event.name() == "[memory]")


def test_what_excludes_products_kept():
    model = small_training.small_model()
    for settings, message in (
        ({"keep": "all"}, "keep is 'all' for checkpointing; expected 'products'"),
        ({"keep": "products", "use_reentrant": True}, "cannot be combined"),
    ):
        with pytest.raises(UserError, match=message):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    model.fuse_layers("compile")
    with pytest.raises(ValueError, match="checkpointing keeps products and fused_layers is 'compile'"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"keep": "products"})
    model.fuse_layers("auto")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"keep": "products"})
    assert "forward" not in vars(model.base.model.layers[0])
    with pytest.raises(ValueError, match="fused_layers is 'compile', but checkpointing keeps products"):
        model.fuse_layers("compile")
