"""Linear layers that take the rollout's rows from the rollout: same losses and gradients, fewer rows."""

import copy
from collections.abc import Iterator

import pytest
import torch
from sampled_steps import IDS, Step, build, same, step
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from quietstar.thinking import kept_outputs
from quietstar.thinking.cuda_graphs import use_graphs
from quietstar.thinking.kept_outputs import KeptOutputs, keeping, taking

WAYS = [
    pytest.param(("cpu", "off"), id="cpu"),
    pytest.param(("cpu", "buffers"), id="buffers"),
    pytest.param(("cuda", "auto"), id="graph", marks=pytest.mark.gpu),
]


@pytest.fixture(params=WAYS)
def device(request) -> Iterator[str]:
    device, mode = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with use_graphs(mode):
        yield device


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, int]]:
    """Rows of the inputs of layers that took outputs, and how many of them were multiplied."""
    seen: list[tuple[int, int]] = []
    apply = kept_outputs._KnownRows.apply

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None, *known: Tensor) -> Tensor:
        seen.append((x.shape[1], x.shape[1] - sum(part.shape[1] for part in known)))
        return apply(x, weight, bias, *known)

    monkeypatch.setattr(kept_outputs._KnownRows, "apply", counted)
    return seen


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen2"])
def test_the_same_losses_and_gradients(family: str, device: str, products):
    model = build(family).to(device)
    for _ in range(3):
        wanted = step(model)
    assert not products
    layers = model.reuse_rollout()
    assert layers == 7 * model.base.config.num_hidden_layers
    for _ in range(3):  # as it is, captured, replayed
        products.clear()
        same(step(model), wanted)
        # The last thought token, the end token and one talk token are new.
        slot = 9 * model.config.num_rationales
        assert products == [(9 + 9 + 5 * slot, 3 * slot)] * layers
    assert model.reuse_rollout(False) == 0
    products.clear()
    same(step(model), wanted)
    assert not products


def test_thoughts_of_another_length(device: str, products):
    model = build().to(device)
    model.reuse_rollout()
    for thought, talk in ((1, 1), (4, 3), (1, 1)):
        model.config.thought_length, model.config.talk_length = thought, talk
        wanted = step(copy.deepcopy(model).requires_grad_(True))
        products.clear()
        same(step(model), wanted)
        assert products


@pytest.mark.parametrize(
    "fields",
    [{"thought_kind": "pause"}, {"think_at": "stride:3"}, {"num_rationales": 1}],
    ids=lambda fields: next(iter(fields)),
)
def test_other_thoughts(fields, products):
    model = build(**fields)
    wanted = step(model)
    model.reuse_rollout()
    same(step(model), wanted)
    assert products


def test_nothing_is_kept_where_it_would_not_be_used(products, monkeypatch):
    model = build()
    wanted = step(model)
    layers = model.reuse_rollout()
    monkeypatch.setattr(KeptOutputs, "of", lambda *_: pytest.fail("outputs were kept"))
    with torch.no_grad():
        model(IDS, labels=IDS)
    model.eval()
    model(IDS)
    model.train()
    model.gradient_checkpointing_enable()
    same(step(model), wanted)
    assert layers and not products


def test_autocast(products):
    """In bf16 the known rows come from other kernels: as far from fp32 as without them, not farther."""
    model = build()
    exact = step(model)

    def error(found: Step) -> float:
        gaps = [(found[1][n] - g).norm() / g.norm() for n, g in exact[1].items() if g.norm() > 0]
        return float(torch.stack(gaps).median())

    with torch.autocast("cpu", torch.bfloat16):
        plain = error(step(model))
        model.reuse_rollout()
        kept = error(step(model))
    assert products and kept < 2 * plain


def test_layers_that_are_more_than_a_product():
    model = build()
    layer = model.base.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, args, output: output * 2)
    wanted = step(model)
    assert model.reuse_rollout() == 7 * model.base.config.num_hidden_layers - 1
    same(step(model), wanted)


def test_layers_in_checkpoint_wrappers(products):
    """As accelerate wraps them for FSDP2."""
    model = build()
    layers = model.base.model.layers
    model.base.model.layers = torch.nn.ModuleList(checkpoint_wrapper(layer) for layer in layers)
    wanted = step(model)
    assert model.reuse_rollout()
    same(step(model), wanted)
    assert not products


def test_frozen_weights_hold_no_inputs():
    """As with ordinary layers: the input is held for the weight's gradient alone."""
    x, weight = torch.randn(1, 5, 3, requires_grad=True), torch.randn(4, 3)
    for trained in (False, True):
        output = kept_outputs._KnownRows.apply(
            x, weight.requires_grad_(trained), None, torch.zeros(1, 2, 4)
        )
        held = [tensor is not None for tensor in output.grad_fn.saved_tensors]
        assert held == [trained, True]
        (gradient,) = torch.autograd.grad(output.sum(), [x])
        torch.testing.assert_close(gradient, torch.ones(1, 5, 4) @ weight.detach())


def test_not_with_liger_kernel():
    """Its rotary embeddings write into what q_proj and k_proj gave, unseen by torch."""
    model = build()
    model.base._quietstar_liger = True
    with pytest.raises(ValueError, match="reuse_rollout is on, but liger-kernel overwrites"):
        model.reuse_rollout()
    del model.base._quietstar_liger
    model.reuse_rollout()
    with pytest.raises((ValueError, ImportError), match="fused_layers is 'liger'"):
        model.fuse_layers("liger")


class TestRecord:
    """What a record says of outputs that cannot be taken."""

    layer = torch.nn.Linear(3, 4)

    def kept(self, *outputs: Tensor, change: bool = False) -> KeptOutputs:
        record = {self.layer: [(output, output._version) for output in outputs]}
        if change:
            outputs[0].mul_(2)
        return KeptOutputs.of(record, (2, 5))

    def output(self, kept: KeptOutputs, rows: int = 8) -> tuple[Tensor, Tensor]:
        x = torch.randn(1, rows, 3)
        return kept.output(self.layer, x), torch.nn.functional.linear(
            x, self.layer.weight, self.layer.bias
        )

    def test_known_rows_come_first(self):
        known = torch.randn(1, 2, 4), torch.randn(1, 5, 4)
        got, wanted = self.output(self.kept(*known))
        assert torch.equal(got, torch.cat([*known, wanted[:, 7:]], dim=1))

    @pytest.mark.parametrize(
        "case", ["changed in place", "once more", "other rows", "overwritten", "short"]
    )
    def test_not_taken(self, case: str):
        known = [torch.randn(1, 2, 4), torch.randn(1, 5, 4)]
        known += [torch.randn(1, 5, 4)] if case == "once more" else []
        known[1] = torch.randn(5, 4) if case == "other rows" else known[1]
        kept = self.kept(*known, change=case == "changed in place")
        kept.are_current = lambda: case != "overwritten"
        got, wanted = self.output(kept, rows=7 if case == "short" else 8)
        assert torch.equal(got, wanted)

    def test_a_second_call_multiplies_all(self):
        kept = self.kept(torch.randn(1, 2, 4), torch.randn(1, 5, 4))
        self.output(kept)
        got, wanted = self.output(kept)
        assert torch.equal(got, wanted)

    def test_records_and_takers_do_not_nest_wrongly(self):
        model = build()
        model.reuse_rollout()
        with keeping() as outer:
            with keeping() as inner:
                model.base(IDS)
            model.base(IDS[:, :4])
        assert {o.shape[1] for made in inner.values() for o, _ in made} == {9}
        assert {o.shape[1] for made in outer.values() for o, _ in made} == {4}
        with pytest.raises(RuntimeError, match="inside"), taking(KeptOutputs({}, ())):
            raise RuntimeError("inside")
        model.base(IDS)
