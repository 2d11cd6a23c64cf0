"""Building, saving and loading a model, and its place among transformers' tools."""

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCABULARY, thinking_model, tiny_decoder
from transformers import AutoModelForCausalLM, LlamaPreTrainedModel

from quietstar import (
    END_TOKEN,
    START_TOKEN,
    QuietStarConfig,
    QuietStarForCausalLM,
    add_meta_tokens,
    check_tokenizer,
)
from quietstar.data.lookup import build_tokenizer

IDS = torch.arange(3, 15).view(2, 6)


def small_tokenizer(with_meta: bool):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"---": 5, **{f"w{i}": i for i in range(VOCABULARY) if i != 5}}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")
    if with_meta:
        add_meta_tokens(tokenizer)
    return tokenizer


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_oss"])
def test_saved_and_loaded_it_is_the_same(family: str, tmp_path):
    model = thinking_model(family, thought_length=3, talk_length=2).eval()
    with torch.no_grad():
        for parameter in (*model.thought_embedding.parameters(), *model.mixing_head.parameters()):
            parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is QuietStarForCausalLM
    assert loaded.config.thought_length == 3
    assert loaded.config.text_config.model_type == family
    theirs = loaded.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, loaded(IDS).logits, atol=1e-6)


def test_a_row_that_the_decoder_would_set_anew_is_kept(tmp_path, monkeypatch):
    """Some decoders' rules for new weights write over the padding token's row when it was read, too."""
    model = thinking_model(tiny_decoder("llama", pad_token_id=0, tie_word_embeddings=True))
    wanted = model.base.get_input_embeddings().weight[0].detach().clone()
    assert wanted.abs().max() > 0.1
    model.save_pretrained(tmp_path)
    theirs = LlamaPreTrainedModel._init_weights

    def and_its_padding(self, module: torch.nn.Module) -> None:
        theirs(self, module)
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            torch.nn.init.zeros_(module.weight.data[module.padding_idx])

    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", and_its_padding)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.base.get_input_embeddings().weight[0], wanted)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, loaded(IDS).logits, atol=1e-6)


def test_wrapping_leaves_the_decoder_as_it_is():
    decoder = tiny_decoder("llama")
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    model = QuietStarForCausalLM.from_base(decoder, start_token_id=94, end_token_id=95)
    for name, value in model.base.state_dict().items():
        assert torch.equal(value, before[name]), name
    # A fresh head leaves the prediction alone, whatever the thought.
    assert model.mixing_head.fc3.weight.abs().max() == 0
    assert model.mixing_head.fc1.weight.abs().max() > 0
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, model.base(IDS).logits, atol=1e-5)


def test_from_base_adds_tokens_and_embeddings():
    tokenizer = small_tokenizer(with_meta=False)
    model = QuietStarForCausalLM.from_base(tiny_decoder("llama"), tokenizer, thought_length=2)
    assert model.config.start_token_id == tokenizer.convert_tokens_to_ids(START_TOKEN) == VOCABULARY
    assert model.config.end_token_id == tokenizer.convert_tokens_to_ids(END_TOKEN)
    assert model.config.text_config.vocab_size == VOCABULARY + 2
    assert model.get_output_embeddings().weight.shape[0] == VOCABULARY + 2
    dashes = model.get_input_embeddings().weight[5]
    start, end = model.thought_embedding(model.config.embedding_scale)
    assert torch.allclose(start, dashes) and torch.allclose(end, dashes)
    check_tokenizer(tokenizer, model.config)


def test_start_and_end_may_begin_as_texts_of_their_own():
    table = tiny_decoder("llama").get_input_embeddings().weight

    def begun(**texts: str) -> list[torch.Tensor]:
        tokenizer = small_tokenizer(with_meta=True)
        model = QuietStarForCausalLM.from_base(tiny_decoder("llama"), tokenizer, **texts)
        return list(model.thought_embedding(model.config.embedding_scale))

    several = table[small_tokenizer(with_meta=True)("w3 w4 w4")["input_ids"]].mean(0)
    for texts, start, end in (
        ({"init_start_from": "w3 w4 w4", "init_end_from": "w4"}, several, table[4]),
        ({"init_start_from": "w3 w4 w4"}, several, table[5]),
        ({"init_end_from": "w3", "init_embedding_from": "w4"}, table[4], table[3]),
    ):
        found = begun(**texts)
        torch.testing.assert_close(found[0], start)
        torch.testing.assert_close(found[1], end)
    with pytest.raises(ValueError, match="init_end_from is ''; expected text with a token"):
        begun(init_end_from="")
    with pytest.raises(ValueError, match="init_start_from is 'a', which needs a tokenizer"):
        QuietStarForCausalLM.from_base(
            tiny_decoder("llama"), start_token_id=1, end_token_id=2, init_start_from="a"
        )


@pytest.mark.parametrize("activation", ["identity", "sigmoid"])
def test_the_mixing_weight_may_begin_where_it_is_asked_to(activation: str):
    settings = {"start_token_id": 1, "end_token_id": 2, "mixing_activation": activation}

    def begun(weight: float | None) -> QuietStarForCausalLM:
        torch.manual_seed(0)
        decoder = tiny_decoder("llama")
        return QuietStarForCausalLM.from_base(decoder, init_mixing_weight=weight, **settings)

    for given, wanted in ((0.03, 0.03), (0.9, 0.9), (None, 0.5 if activation == "sigmoid" else 0.0)):
        model = begun(given).train()
        found = model(IDS, labels=IDS)
        weights = found.mixing_weight[found.has_target[:, :, None].expand_as(found.mixing_weight)]
        torch.testing.assert_close(weights, torch.full_like(weights, wanted))
        # All of the head learns from there, not only the unit that says so.
        found.loss.backward()
        learns = model.mixing_head.fc3.weight.grad.abs()[0] > 0
        assert learns.sum() > 5 and (given is None or learns[-1])
    begun(np.float32(0.25))
    bound = "a number between 0 and 1" if activation == "sigmoid" else "a number of at most 100"
    for wrong in (float("nan"), True, "x", 1e5, *((0, 1, 1.5) if activation == "sigmoid" else ())):
        with pytest.raises(ValueError, match=f"init_mixing_weight is {wrong!r} .*expected {bound}"):
            begun(wrong)
    with pytest.raises(ValueError, match=r"init_mixing_weight is 10{400} .*expected a number"):
        begun(10**400)


def test_tied_embeddings_stay_tied(tmp_path):
    decoder = tiny_decoder("llama", tie_word_embeddings=True)
    model = QuietStarForCausalLM.from_base(decoder, small_tokenizer(with_meta=True))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_tokenizers_that_do_not_fit_are_refused():
    config = QuietStarConfig(
        text_config=tiny_decoder("llama").config, start_token_id=94, end_token_id=95
    )
    with pytest.raises(ValueError, match=r"no <\|startthought\|> token"):
        check_tokenizer(small_tokenizer(with_meta=False), config)
    with pytest.raises(ValueError, match="start_token_id is 96 in the tokenizer and 94 in the model"):
        check_tokenizer(small_tokenizer(with_meta=True), config)
    config.start_token_id, config.end_token_id = 96, 97
    with pytest.raises(ValueError, match="98 tokens and the model's vocabulary 96"):
        check_tokenizer(small_tokenizer(with_meta=True), config)
    check_tokenizer(build_tokenizer(), QuietStarConfig(start_token_id=39, end_token_id=40))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_the_argmax_of_the_mixed_logits(family: str):
    model = thinking_model(family, mixing=0.3, thought_length=2).eval()
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    made = model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    ids, seen = IDS, mask
    with torch.no_grad():
        for _ in range(4):
            token = model(ids, attention_mask=seen).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
            seen = torch.cat([seen, torch.ones_like(token)], 1)
    assert torch.equal(made, ids)


def test_adapters_train_with_the_head_and_the_embeddings(tmp_path):
    peft = pytest.importorskip("peft")
    model = thinking_model(thought_length=2)
    adapters = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["mixing_head", "thought_embedding"]
    )
    wrapped = peft.get_peft_model(model, adapters).train()
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, p in wrapped.named_parameters() if p.grad is not None}
    assert any("lora_A" in name for name in trained)
    assert any("mixing_head.modules_to_save" in name for name in trained)
    assert any("thought_embedding.modules_to_save" in name for name in trained)
    assert not any(name.endswith("base_layer.weight") for name in trained)
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
