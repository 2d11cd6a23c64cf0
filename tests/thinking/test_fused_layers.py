"""Fused layers: the same losses, gradients and generated tokens, whatever the pass."""

import copy
import functools
import pickle
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from sampled_steps import IDS, build, same, step
from small_training import rows, small_model, trainer
from transformers.models.llama import modeling_llama

from quietstar.thinking.cuda_graphs import use_graphs
from quietstar.thinking.fused_layers import RECOMPILE_LIMIT, FusedForward, fuse_layers
from quietstar.thinking.text_part import decoder_layers
from quietstar.training.around_the_step import AroundTheStep

pytestmark = pytest.mark.slow  # torch.compile takes a while
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def traced_only(monkeypatch) -> None:
    """What torch.compile traces runs as it is: quick, and as good where no fused kernel matters."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compiled(family: str):
    """By inductor, as a user gets it; outputs of the rollout and checkpointing, too."""
    torch._dynamo.reset()
    model = build(family)
    wanted, before = step(model), compiled_graphs()
    model.fuse_layers("compile")
    same(step(model), wanted)
    assert compiled_graphs() > before
    model.reuse_rollout()
    same(step(model), wanted)
    model.reuse_rollout(False)
    model.gradient_checkpointing_enable()
    same(step(model), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_a_compiled_layer_meets(family: str, traced_only):
    """Text, slots and packed pass, lengths that change, generation, outputs of the rollout, and back."""
    model = build(family)
    wanted, longer = step(model), torch.randint(3, 36, (3, 12))
    wanted_longer = step(model, longer)
    model.eval()
    tokens = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.train().fuse_layers("compile")
    layers = decoder_layers(model.base)
    assert all(isinstance(layer.forward, FusedForward) for layer in layers)
    same(step(model), wanted)
    same(step(model, longer), wanted_longer)
    same(step(copy.deepcopy(model)), wanted)
    with use_graphs("buffers"):
        same(step(model), wanted)
    assert model.reuse_rollout() == 7 * len(layers)
    same(step(model), wanted)
    model.reuse_rollout(False)
    same(step(model), wanted)
    model.gradient_checkpointing_enable()
    same(step(model), wanted)
    model.gradient_checkpointing_disable()
    model.eval()
    assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0), tokens)
    model.train().fuse_layers("off")
    assert not any("forward" in vars(layer) for layer in layers)
    same(step(model), wanted)


def test_lengths_and_layers_share_what_is_compiled(traced_only):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build()
    model.fuse_layers("compile")
    step(model)
    first = compiled_graphs()
    step(model, torch.randint(3, 36, (2, 10)))
    both = compiled_graphs()
    for length in (11, 12, 13):
        step(model, torch.randint(3, 36, (2, length)))
    # Text, slots and packed pass of one layer; the second length makes them fit any.
    assert 0 < first <= 15 and compiled_graphs() == both <= 2 * first


def test_auto_is_compiled_on_cuda_alone():
    model = build()
    wanted = step(model)
    model.fuse_layers("auto")
    before = compiled_graphs()
    found = step(model)
    assert compiled_graphs() == before
    assert found[0] == wanted[0]
    assert all(torch.equal(found[1][name], value) for name, value in wanted[1].items())


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["off", "auto"])
def test_on_a_gpu(graphs: str):
    model = build().cuda()
    with use_graphs("off"):
        wanted = step(model)
    torch._dynamo.reset()
    before = compiled_graphs()
    model.fuse_layers("auto")
    with use_graphs(graphs):
        for _ in range(3):
            same(step(model), wanted)
    assert compiled_graphs() > before


@needs_gpu
@pytest.mark.gpu
def test_liger_kernel():
    pytest.importorskip("liger_kernel")
    model, other = build().cuda(), build()
    wanted, wanted_cpu = step(model), step(other)
    model.fuse_layers("liger")
    model.fuse_layers("liger")
    layer = decoder_layers(model.base)[0]
    for fused in (layer.mlp, layer.input_layernorm):
        assert fused.forward.__func__.__module__.startswith("liger_kernel.")
    for _ in range(3):
        same(step(model), wanted)
    same(step(other), wanted_cpu)  # rotary embeddings are patched for the whole family
    with pytest.raises(ValueError, match="fused_layers is 'off', but liger-kernel is in the decoder's"):
        model.fuse_layers("off")


@pytest.fixture
def liger(monkeypatch) -> list[tuple[torch.nn.Module, dict]]:
    """A package of that name, which notes what it is given and, as the real one does, puts a rotary
    embedding that no CPU can run into the whole family."""
    given: list[tuple[torch.nn.Module, dict]] = []

    def rotary(*args, **kwargs):
        raise RuntimeError("a kernel on a CPU")

    def apply(model: torch.nn.Module, **options: bool) -> None:
        given.append((model, options))
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary)

    patch = SimpleNamespace(
        MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": apply}, _apply_liger_kernel_to_instance=apply
    )
    for name, fields in (("", {}), (".transformers", {"monkey_patch": patch})):
        module = ModuleType(f"liger_kernel{name}")
        module.__spec__ = ModuleSpec(module.__name__, None)
        vars(module).update(fields)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return given


def test_liger_gets_the_decoder_inside(liger, tmp_path):
    """Without its losses, once; by fuse_layers and by transformers' own use_liger_kernel."""
    model, other = build(), build()
    wanted = step(model)
    model.fuse_layers("liger")
    model.fuse_layers("liger")
    without_losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert liger == [(model.base, without_losses)]
    for one in (model, other):  # the family's others are not on a GPU either
        same(step(one), wanted)
    trained = small_model()
    run = trainer(tmp_path, trained, rows(4), max_steps=1)
    (around,) = (c for c in run.callback_handler.callbacks if isinstance(c, AroundTheStep))
    for asked in (False, True):
        arguments = copy.copy(run.args)
        arguments.use_liger_kernel = asked
        around.on_train_begin(arguments, run.state, run.control)
        assert len(liger) == 1 + asked
    assert liger[1] == (trained.base, without_losses)
    with pytest.raises(ValueError, match="which does not know"):
        build("gpt2").fuse_layers("liger")


@pytest.mark.parametrize("before", [8, 100])
def test_enough_may_be_compiled(before: int):
    """torch's eight are fewer than a layer's passes with dtypes, kinds and lengths; more are left."""
    with torch._dynamo.config.patch(recompile_limit=before):
        build().fuse_layers("compile")
        assert torch._dynamo.config.recompile_limit == max(before, RECOMPILE_LIMIT) >= 64


def test_two_backward_passes_go_through_layers_as_they_are(tmp_path):
    settings = {"max_steps": 1, "policy_max_grad_norm": 0.5}
    model = small_model()
    model.fuse_layers("auto")
    trainer(tmp_path, model, rows(4), **settings).train()
    assert not any("forward" in vars(layer) for layer in decoder_layers(model.base))
    model.fuse_layers("compile")
    said = "policy_max_grad_norm is set and fused_layers is 'compile', through which one backward pass"
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, model, rows(4), **settings)
    trainer(tmp_path, model, rows(4), max_steps=1)


@pytest.mark.parametrize("way", ["auto", "compile"])
def test_a_fused_model_can_be_pickled(way: str, traced_only):
    model = build()
    model.fuse_layers(way)
    wanted = step(model)
    again = pickle.loads(pickle.dumps(model))
    same(step(again), wanted)


def test_adapters_in_compiled_layers(traced_only):
    peft = pytest.importorskip("peft")
    found = []
    for way in ("off", "compile"):
        torch.manual_seed(0)
        model = build()
        model.fuse_layers(way)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        adapted.train()
        found.append(step(adapted))
    assert any("lora_A" in name for name in found[0][1])
    same(found[1], found[0])


@pytest.mark.parametrize("cuda", [True, False])
def test_quantized_layers_are_left_alone_unless_asked(cuda: bool, caplog, monkeypatch):
    """Which is worth a line where others would be fused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    model = build()
    model.base.hf_quantizer = object()
    with caplog.at_level("INFO", logger="quietstar"):
        model.fuse_layers("auto")
    assert ("not fused: its weights are quantized" in caplog.text) == cuda
    assert not any("forward" in vars(layer) for layer in decoder_layers(model.base))


class TestErrors:
    def test_another_way(self):
        with pytest.raises(
            ValueError, match="fused_layers is 'fast'; expected one of auto, compile, liger"
        ):
            build().fuse_layers("fast")

    def test_a_replaced_forward(self):
        model = build()
        layer = decoder_layers(model.base)[0]
        layer.forward = layer.forward
        with pytest.raises(
            ValueError, match="'compile', but the forward of LlamaDecoderLayer was replaced"
        ):
            model.fuse_layers("compile")
        model.fuse_layers("auto")
        assert not isinstance(layer.forward, FusedForward)

    def test_liger_that_is_not_there(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"needs liger-kernel \(pip install liger-kernel\)"):
            fuse_layers(build().base, "liger")

    def test_liger_in_the_trainer(self, tmp_path):
        with pytest.raises((ValueError, ImportError), match="use_liger_kernel is True on cpu|iger"):
            trainer(tmp_path, small_model(), rows(4), use_liger_kernel=True).train()
