"""Loading: a model is there whole, with every layer set, or a sentence says what is not."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from families import thinking_model, tiny_decoder
from poison import poisoned_memory
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.checkpoints.load import load_checkpoint
from quietstar.data.lookup import build_tokenizer
from quietstar.errors import UserError

IDS = torch.arange(3, 15)[None]
TOKENS = {"start_token_id": 94, "end_token_id": 95}
OPENERS = [QuietStarForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained]


def thinking(base: PreTrainedModel | None = None) -> QuietStarForCausalLM:
    return thinking_model(base or "llama", seed=3, mixing=0.5, thought_length=2)


def loss(model: QuietStarForCausalLM) -> float:
    thoughts = torch.full((1, 1, IDS.shape[1], 2), 7)
    with torch.no_grad():
        return float(model.eval()(IDS, labels=IDS, thought_ids=thoughts).loss)


@pytest.fixture
def folder(tmp_path) -> Path:
    thinking().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("opener", OPENERS, ids=["ours", "auto"])
@pytest.mark.parametrize(
    "part",
    ["mixing_head.", "thought_embedding.", "mixing_head.fc2.bias", "base.model.layers.1.", "lm_head"],
)
def test_a_folder_that_lacks_weights(folder: Path, part: str, opener: Callable[..., Any]):
    def drop(weights: dict[str, torch.Tensor]) -> None:
        for name in [n for n in weights if part in n]:
            del weights[name]

    edit_weights(folder, drop)
    with pytest.raises(ValueError, match=rf"model lacks the weights '.*{part}.*; expected a whole"):
        opener(folder)


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}])
def test_weights_of_another_size(folder: Path, options: dict[str, Any]):
    edit_weights(folder, lambda w: w.update({"mixing_head.fc2.bias": torch.zeros(5)}))
    with pytest.raises(ValueError, match=r"'mixing_head.fc2.bias' in size \[5\]; .* gives \[32\]"):
        QuietStarForCausalLM.from_pretrained(folder, **options)


def test_a_weights_file_that_is_cut_short(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    for opener in OPENERS:
        with pytest.raises(ValueError, match=r"model: a file of its weights is cut short or damaged"):
            opener(folder)
    build_tokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match=r"model: .* cut short or damaged"):
        load_checkpoint(str(folder))


def test_a_whole_folder_tells_as_transformers_does(folder: Path):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, QuietStarForCausalLM) and not info["missing_keys"]
    assert loss(model) == pytest.approx(loss(thinking()), rel=1e-5)


class TestOtherFolders:
    def test_a_decoder_without_thoughts(self, tmp_path, monkeypatch):
        tiny_decoder("llama").save_pretrained(tmp_path)

        def build(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("a model is being built")

        monkeypatch.setattr(QuietStarForCausalLM, "__init__", build)
        for opener in (QuietStarForCausalLM, QuietStarConfig):
            with pytest.raises(ValueError, match=r"'llama'; expected 'quietstar' \(.*from_base gives"):
                opener.from_pretrained(tmp_path)

    def test_a_checkpoint_of_the_reference_code(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "max_thoughts": 9}))
        with pytest.raises(ValueError, match=r"'mistral'; expected 'quietstar' \(.*from_reference"):
            QuietStarForCausalLM.from_pretrained(tmp_path)

    def test_an_adapter_alone(self, tmp_path):
        peft = pytest.importorskip("peft")
        model = thinking()
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
        model.config.save_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match=r"an adapter without its decoder; open it .*quietstar merge"
        ):
            QuietStarForCausalLM.from_pretrained(tmp_path)

    def test_a_configuration_without_a_decoder(self, folder: Path):
        settings = json.loads((folder / "config.json").read_text())
        del settings["text_config"]
        (folder / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=r"the configuration has no text_config; expected"):
            QuietStarForCausalLM.from_pretrained(folder)
        with pytest.raises(ValueError, match=r"the configuration has no text_config; expected"):
            AutoModelForCausalLM.from_config(QuietStarConfig())
        with pytest.raises(TypeError, match=r"config is a LlamaConfig; expected a QuietStarConfig"):
            QuietStarForCausalLM.from_pretrained(folder, config=AutoConfig.for_model("llama"))

    def test_nothing_in_it(self, tmp_path, folder: Path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(OSError, match=r"model.safetensors .*/empty"):
            QuietStarForCausalLM.from_pretrained(tmp_path / "empty")
        settings = (folder / "config.json").read_text()
        (folder / "config.json").unlink()
        with pytest.raises(ValueError, match=r"the configuration has no text_config"):
            QuietStarForCausalLM.from_pretrained(folder)
        (folder / "config.json").write_text(settings)
        (folder / "model.safetensors").unlink()
        with pytest.raises(OSError, match=r"model.safetensors"):
            QuietStarForCausalLM.from_pretrained(folder)


class TestFromBase:
    def test_a_path(self, tmp_path):
        tiny_decoder("llama").save_pretrained(tmp_path)
        models = [QuietStarForCausalLM.from_base(p, **TOKENS) for p in (tmp_path, str(tmp_path))]
        assert all(
            torch.equal(m.base.lm_head.weight, tiny_decoder("llama").lm_head.weight) for m in models
        )

    def test_a_decoder_that_lacks_weights(self, tmp_path):
        tiny_decoder("llama").save_pretrained(tmp_path)
        edit_weights(tmp_path, lambda w: w.pop("lm_head.weight"))
        with pytest.raises(
            ValueError, match=r"lacks the weights 'lm_head.weight' of a LlamaForCausalLM"
        ):
            QuietStarForCausalLM.from_base(tmp_path, **TOKENS)

    def test_what_is_no_decoder(self):
        peft = pytest.importorskip("peft")
        with pytest.raises(ValueError, match=r"base has thoughts already; expected a decoder without"):
            QuietStarForCausalLM.from_base(thinking(), **TOKENS)
        wrapped = peft.get_peft_model(tiny_decoder("llama"), peft.LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(
            TypeError, match=r"a decoder inside an adapter; expected base.merge_and_unload"
        ):
            QuietStarForCausalLM.from_base(wrapped, **TOKENS)
        with pytest.raises(TypeError, match=r"base is a Linear; expected a causal language model"):
            QuietStarForCausalLM.from_base(torch.nn.Linear(2, 2), **TOKENS)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has set holds NaN."""
    with poisoned_memory():
        assert torch.empty(8).isnan().all()
        yield


def check_new_layers(model: QuietStarForCausalLM, dtype: torch.dtype) -> None:
    new = [*model.mixing_head.named_parameters(), *model.thought_embedding.named_parameters()]
    assert all(p.device.type == "cpu" and p.dtype == dtype for _, p in new)
    assert all(p.isfinite().all() and (bool(p.any()) or n == "fc3.weight") for n, p in new)
    head = model.mixing_head
    assert not head.fc3.weight.any() and 0.05 < float(head.fc1.weight.detach().std()) < 0.2


@pytest.mark.usefixtures("poisoned")
class TestNewLayersAreInitialised:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_from_config(self, dtype: torch.dtype):
        config = QuietStarConfig(text_config=tiny_decoder("llama").config, **TOKENS)
        check_new_layers(AutoModelForCausalLM.from_config(config, dtype=dtype), dtype)
        if dtype == torch.float32:
            check_new_layers(QuietStarForCausalLM(config), dtype)

    @pytest.mark.parametrize("place", ["plain", "meta-block"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"dtype": "auto"},
            {"dtype": torch.bfloat16},
            {"low_cpu_mem_usage": True},
            {"device_map": "auto"},
            {"device_map": {"": "cpu"}},
        ],
        ids=str,
    )
    def test_on_a_loaded_decoder(self, tmp_path, options: dict[str, Any], place: str):
        tiny_decoder("llama").save_pretrained(tmp_path)
        base = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        with torch.device("meta") if place == "meta-block" else nullcontext():
            model = thinking_model(base)
        bf16 = options.get("dtype") == torch.bfloat16
        check_new_layers(model, torch.bfloat16 if bf16 else torch.float32)
        assert torch.isfinite(model.eval()(IDS).logits).all()

    @pytest.mark.parametrize(
        "options",
        [{"low_cpu_mem_usage": True}, {"device_map": "auto"}, {"dtype": torch.bfloat16}],
        ids=str,
    )
    def test_a_trained_folder(self, folder: Path, options: dict[str, Any]):
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        want, got = thinking().state_dict(), model.state_dict()
        assert want.keys() == got.keys()
        assert all(torch.equal(got[n], w.to(got[n].dtype)) for n, w in want.items())

    def test_a_decoder_without_memory(self):
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(tiny_decoder("llama").config)
        base = base.to("meta")
        model = thinking_model(base)
        assert {p.device.type for p in model.parameters()} == {"meta"}


def test_weights_that_accelerate_puts_away():
    """They are there while a layer is called, and only then: so every layer is called."""
    from accelerate import cpu_offload

    want, base = thinking(), tiny_decoder("llama")
    cpu_offload(base, execution_device=torch.device("cpu"))
    assert base.lm_head.weight.device.type == "meta"
    model = thinking(base)
    model.mixing_head.load_state_dict(want.mixing_head.state_dict())
    model.thought_embedding.load_state_dict(want.thought_embedding.state_dict())
    assert loss(model) == pytest.approx(loss(want), rel=1e-5)
