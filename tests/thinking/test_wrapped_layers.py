"""Wrapped and replaced layers (adapters, quantised ones, hooks): they act, and they are trained."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import thinking_model, tiny_decoder
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quietstar import QuietStarForCausalLM
from quietstar.checkpoints.adapters import grow_embeddings
from quietstar.data.lookup import build_tokenizer
from quietstar.errors import UserError
from quietstar.thinking.layers import MixingHead
from quietstar.thinking.linear_layers import is_plain_linear
from quietstar.thinking.output_layer import CalledOutputLayer, OutputLayer, output_layer

LENGTH, THOUGHT, ROWS = 12, 2, 2
IDS = torch.randint(3, 90, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
THOUGHTS = torch.randint(3, 90, (ROWS, 2, LENGTH, THOUGHT), generator=torch.Generator().manual_seed(2))
HEADS = ["fc1", "fc2", "fc3", "lm_head"]


def thinking(family: str = "llama", **changes: Any) -> QuietStarForCausalLM:
    fields = {"thought_length": THOUGHT, "talk_length": 2, "entropy_bonus": 0.1, "policy_weight": 1.0}
    fields |= {"clamp_advantage": False, "reward": "base-gain"}
    return thinking_model(tiny_decoder(family, **changes), seed=3, mixing=0.5, **fields)


def step(model: nn.Module) -> Any:
    out = model.train()(input_ids=IDS, labels=IDS, thought_ids=THOUGHTS)
    out.loss.backward()
    return out


def close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


def with_lora(model: QuietStarForCausalLM, names: list[str], **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_lora_on_mixing_head_and_output_layer(family: str):
    """Losses, rewards and gradients are those of the weights with the updates added in."""
    untied = {"tie_word_embeddings": False}
    plain = step(thinking(family, **untied))
    wrapped = with_lora(thinking(family, **untied), HEADS)
    merged = copy.deepcopy(wrapped).merge_and_unload().requires_grad_(True)
    got, want = step(wrapped), step(merged)
    for name in ("loss", "base_losses", "talk_losses", "reward", "policy_loss", "mixing_weight"):
        assert close(getattr(got, name), getattr(want, name)), name
    assert not close(got.talk_losses, plain.talk_losses, 0.05)
    modules = dict(wrapped.base_model.model.named_modules())
    for name in [f"mixing_head.{n}" for n in HEADS[:3]] + ["base.lm_head"]:
        layer, whole = modules[name], merged.get_submodule(name).weight.grad
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        # y = (W + s B A) x: the chain rule from the gradient of the sum.
        scale = layer.scaling["default"]
        assert close(down.grad, scale * up.detach().T @ whole, 1e-3), name
        assert close(up.grad, scale * whole @ down.detach().T, 1e-3), name


@pytest.mark.parametrize("target", [*HEADS, "embed_tokens"])
@pytest.mark.parametrize("dora", [False, True])
def test_each_layer_alone(target: str, dora: bool):
    wrapped = with_lora(thinking(), [target], use_dora=dora)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    got = step(wrapped)
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trained) == (3 if dora else 2)
    assert all(bool(p.grad.any()) for p in trained.values())
    want = merged.train()(input_ids=IDS, labels=IDS, thought_ids=THOUGHTS)
    assert close(got.base_losses, want.base_losses) and close(got.talk_losses, want.talk_losses)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head", "mixing_head", "embed_tokens"]},
        {"trainable_token_indices": [5, 90]},
        {"trainable_token_indices": [5, 90], "tied": True},
    ],
)
def test_other_wrappers_of_peft(options: dict[str, Any]):
    tied = options.pop("tied", False)
    model = thinking(tie_word_embeddings=tied)
    want = copy.deepcopy(model)
    wrapped = with_lora(model, ["q_proj"], **options)
    saved = [p for n, p in wrapped.named_parameters() if p.requires_grad and "lora" not in n]
    with torch.no_grad():
        for parameter in saved:
            parameter.mul_(1.5)
    out = step(wrapped)
    assert all(bool(p.grad.any()) for p in saved)
    merged = wrapped.merge_and_unload()
    again = merged.train()(input_ids=IDS, labels=IDS, thought_ids=THOUGHTS)
    assert close(out.base_losses, again.base_losses) and close(out.talk_losses, again.talk_losses)
    assert not close(out.base_losses, step(want).base_losses, 1e-2)


def test_thoughts_are_sampled_from_the_layer_as_it_is():
    """The same numbers drawn: tokens, their log-probabilities, and what generate says."""
    wrapped = with_lora(thinking(), HEADS)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    outputs, texts = [], []
    for model in (wrapped, merged):
        torch.manual_seed(6)
        outputs.append(model.train()(input_ids=IDS, labels=IDS))
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(IDS)
        texts.append(model.eval().generate(input_ids=IDS, attention_mask=mask, **options))
    assert torch.equal(outputs[0].thought_ids, outputs[1].thought_ids)
    assert close(outputs[0].thought_logprobs, outputs[1].thought_logprobs)
    assert torch.equal(*texts)


class Doubled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def doubled(layer: nn.Linear) -> nn.Module:
    made = Doubled(layer.in_features, layer.out_features, bias=layer.bias is not None)
    made.load_state_dict(layer.state_dict())
    return made


def hooked(layer: nn.Linear) -> nn.Module:
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    return layer


def hooked_before(layer: nn.Linear) -> nn.Module:
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return layer


def patched(layer: nn.Linear) -> nn.Module:
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)  # type: ignore[method-assign]
    return layer


def parametrized(layer: nn.Linear) -> nn.Module:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    nn.utils.parametrize.register_parametrization(layer, "weight", Twice())
    return layer


@pytest.mark.parametrize("change", [doubled, hooked, hooked_before, patched, parametrized])
def test_what_a_layer_does_is_done(change: Callable[[nn.Linear], nn.Module]):
    """Twice the logits, however: with the same losses as twice the weight. So in the mixing head."""
    model, want = thinking(), thinking()
    with torch.no_grad():
        want.base.lm_head.weight.mul_(2)
        want.mixing_head.fc3.weight.mul_(2)
    model.base.lm_head = change(model.base.lm_head)
    model.mixing_head.fc3 = change(model.mixing_head.fc3)
    got, target = step(model), step(want)
    for name in ("loss", "base_losses", "talk_losses", "policy_loss", "mixing_weight"):
        assert close(getattr(got, name), getattr(target, name)), name
    (own,), (whole,) = model.base.lm_head.parameters(), want.base.lm_head.parameters()
    assert close(own.grad, 2 * whole.grad, 1e-3)
    for own, whole in zip(model.base.model.parameters(), want.base.model.parameters(), strict=True):
        assert close(own.grad, whole.grad, 1e-3)
    logits = [m.eval()(IDS, thought_ids=THOUGHTS[:, :1]).logits for m in (model, want)]
    assert close(*logits)


def test_an_output_layer_with_a_bias():
    model, want = thinking(), thinking()
    bias = torch.linspace(-2, 2, 96)
    model.base.lm_head.bias = nn.Parameter(bias)
    want.base.lm_head.register_forward_hook(lambda module, args, out: out + bias)
    assert close(step(model).talk_losses, step(want).talk_losses)
    assert bool(model.base.lm_head.bias.grad.any())


class TestCalledOutputLayer:
    """Against the operators on the same weight, with chunks that do not come out even."""

    @pytest.fixture
    def heads(self, monkeypatch) -> tuple[OutputLayer, OutputLayer]:
        torch.manual_seed(8)
        layer = nn.Linear(16, 40, bias=False)
        other = copy.deepcopy(layer)
        monkeypatch.setattr("quietstar.thinking.output_layer.CHUNK_BYTES", 3 * 40 * 4)
        return CalledOutputLayer(layer, 40, 5.0, 0.7), OutputLayer(other.weight, 5.0, 0.7)

    def compare(
        self, heads: tuple[OutputLayer, OutputLayer], call: Callable[[OutputLayer, Tensor], Any]
    ) -> None:
        results = []
        for head in heads:
            torch.manual_seed(9)
            hidden = torch.randn(11, 16, requires_grad=True)
            value = call(head, hidden)
            value = value if isinstance(value, tuple) else (value,)
            (value[0] * torch.arange(1.0, value[0].numel() + 1)).sum().backward()
            weight = head.layer.weight if isinstance(head, CalledOutputLayer) else head.weight
            results.append([*(v.detach() for v in value), hidden.grad, weight.grad])
        for got, want in zip(*results, strict=True):
            assert got.dtype == want.dtype and torch.allclose(got, want, atol=1e-5, rtol=1e-4)

    def test_cross_entropy(self, heads: tuple[OutputLayer, OutputLayer]):
        targets = torch.tensor([3, -100, 5, 0, 39, 7, -100, 1, 2, 30, 31])
        banned = torch.tensor([6, 38])
        weights = torch.tensor([0.5, 1, 0, 2, 1, 0, 0, 3, 1, 1, 0.1])
        for options in ((1.0, None), (2.5, banned)):
            self.compare(heads, lambda h, x, o=options: h.at(*o).cross_entropy(x, targets))
            for skip in (True, False):
                self.compare(
                    heads,
                    lambda h, x, o=options, s=skip: h.at(*o).cross_entropy_sum(x, targets, weights, s),
                )
        nothing = torch.full_like(targets, -100)
        self.compare(heads, lambda h, x: h.cross_entropy(x, nothing) + 0 * h.logits(x).sum())
        for head in heads:
            with pytest.raises(ValueError, match="targets"):
                head.cross_entropy(torch.zeros(11, 16), targets + 1)

    def test_entropy(self, heads: tuple[OutputLayer, OutputLayer]):
        weights = torch.tensor([0.5, 1, 0, 2, 1, 0, 0, 3, 1, 1, 0.1])
        for options in ((1.0, None), (2.5, torch.tensor([6, 38]))):
            self.compare(heads, lambda h, x, o=options: h.at(*o).entropy_sum(x, weights))

    def test_sample(self, heads: tuple[OutputLayer, OutputLayer]):
        hidden = 3 * torch.randn(500, 16)
        for temperature in (0.0, 1.0):
            drawn = [
                head.at(temperature, torch.tensor([6])).sample(hidden, torch.tensor([5]), 7)
                for head in heads
            ]
            assert torch.equal(drawn[0][0], drawn[1][0])
            assert torch.allclose(drawn[0][1], drawn[1][1], atol=1e-5)

    def test_the_backward_pass_holds_no_logits(self, monkeypatch):
        rows, vocabulary = 64, 500
        layer = nn.Linear(4, vocabulary, bias=False)
        head = CalledOutputLayer(layer, vocabulary, None, 1.0)
        monkeypatch.setattr("quietstar.thinking.output_layer.CHUNK_BYTES", 4 * vocabulary * 4)
        kept: list[int] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        hidden = torch.randn(rows, 4, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            head.cross_entropy(hidden, torch.zeros(rows, dtype=torch.int64))
        assert max(kept) <= rows * 4


def test_ordinary_layers_take_the_operators():
    model = thinking()
    assert type(output_layer(model.base)) is OutputLayer
    layer = nn.Linear(4, 4)
    assert is_plain_linear(layer)
    layer.forward = layer.forward  # type: ignore[method-assign] # as accelerate leaves it behind
    assert is_plain_linear(layer)
    for change in (doubled, hooked, hooked_before, patched):
        assert not is_plain_linear(change(nn.Linear(4, 4)))


def test_a_mixing_head_with_another_last_layer():
    head = MixingHead(8)
    head.fc3 = nn.Linear(8, 1)
    nn.init.zeros_(head.fc3.weight)
    nn.init.ones_(head.fc3.bias)
    base, thought = torch.randn(5, 8), torch.randn(5, 8)
    mixed, weight = head(base, thought, "identity")
    assert torch.equal(weight, torch.ones(5, 1)) and torch.allclose(mixed, thought)


class TestBitsandbytes:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        pytest.importorskip("bitsandbytes")
        model = thinking(hidden_size=64, intermediate_size=128)
        model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("whole", [False, True], ids=["default", "output-layer-too"])
    def test_a_trained_folder(self, folder: Path, tmp_path, bits: int, whole: bool):
        """Opened, asked, trained with adapters, saved and opened again."""
        from transformers import BitsAndBytesConfig

        skip = {"llm_int8_skip_modules": ["thought_embedding"]} if whole else {}
        settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **skip)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings).eval()
        kinds = {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        packed = "Linear4bit" if bits == 4 else "Linear8bitLt"
        assert kinds["base.model.layers.0.mlp.up_proj"] == packed
        assert kinds["base.lm_head"] == (packed if whole else "Linear")
        assert {kinds[f"mixing_head.{name}"] for name in HEADS[:3]} == {"Linear"}

        # Against the rounded weights in an ordinary model.
        want = QuietStarForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            for name, kind in kinds.items():
                if kind == packed:
                    layer = model.get_submodule(name)
                    rows = layer(torch.eye(layer.in_features).to(model.dtype))
                    want.get_submodule(name).weight.copy_(rows.T)
            got, target = (m(IDS, labels=IDS, thought_ids=THOUGHTS) for m in (model, want))
        # In 8 bits the inputs are rounded as well.
        assert close(got.base_losses, target.base_losses, 1e-3 if bits == 4 else 0.2)
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)

        model.save_pretrained(tmp_path / "again")
        again = QuietStarForCausalLM.from_pretrained(tmp_path / "again").eval()
        with torch.no_grad():
            assert torch.equal(again(IDS, labels=IDS, thought_ids=THOUGHTS).loss, got.loss)

        wrapped = with_lora(model.requires_grad_(False), ["q_proj", *HEADS])
        step(wrapped)
        updates = [p for n, p in wrapped.named_parameters() if "lora_" in n]
        assert len(updates) == 2 * (2 + 4) and all(bool(p.grad.any()) for p in updates)

    def test_a_quantized_output_layer_cannot_grow(self, folder: Path):
        from transformers import BitsAndBytesConfig

        settings = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["thought_embedding"])
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)
        tokenizer = build_tokenizer()
        tokenizer.add_tokens([f"<{i}>" for i in range(200)])
        with pytest.raises(UserError, match=r"output layer is a Linear4bit of 96 tokens, which cannot"):
            grow_embeddings(model.base, tokenizer)
