"""Ways of decoding: right with thoughts, or rejected in a sentence that names the argument."""

import json

import pytest
import torch
from families import thinking_model, tiny_decoder
from generation_cases import NEW, build, options, prompt
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    QuantizedCache,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
)

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.modeling.generation import Thinking
from quietstar.modeling.text_cache import CACHE_NAME, cache_argument

NAMES = ("past_key_values", "cache")


REFUSED = {
    "assistant_model": tiny_decoder("llama"),
    "custom_generate": lambda model, input_ids, **_: input_ids,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "dola_layers": "high",
    "penalty_alpha": 0.6,
    "num_beam_groups": 2,
    "constraints": ["any"],
    "force_words_ids": [[5]],
    "token_healing": True,
    "compile_config": CompileConfig(),
    "output_attentions": True,
    "output_hidden_states": True,
    "inputs_embeds": torch.zeros(3, 4, 32),
    "prefill_chunk_size": 0,
    "logits_to_keep": 2,
    "document_ids": prompt()[0],
    "thought_ids": prompt()[0],
    "anchors": prompt()[0],
}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"inputs": prompt()[0][0]}, r"inputs has shape \[\d+\]; expected \[rows, tokens\]"),
        ({"inputs": prompt()[0][:, :0]}, r"inputs has shape \[\d+, 0\]; expected \[rows, tokens\]"),
        ({"input_ids": prompt()[0].tolist()}, "input_ids is a list; expected a torch.Tensor"),
        ({"input_ids": prompt()[0].float()}, "input_ids has dtype float32; expected int64"),
        ({"attention_mask": prompt()[1].tolist()}, "attention_mask is a list; expected a torch.Tensor"),
    ],
)
def test_prompts_that_are_none(given: dict, said: str):
    call = {**options(), **given}
    if not {"inputs", "input_ids"} & set(given):
        call["inputs"] = prompt()[0]
    with pytest.raises((ValueError, TypeError), match=said):
        build().generate(**call)


@pytest.mark.parametrize("name", REFUSED)
def test_what_generate_cannot_do_is_refused_by_name(name: str):
    alone = rf"`{name}` and `\w+` cannot be combined"
    with pytest.raises(ValueError, match=rf"^({name} (is|was|were) .*expected |{alone})"):
        build().generate(prompt()[0], **options(**{name: REFUSED[name]}))


@pytest.mark.parametrize("kind", ["static", "offloaded", "offloaded_static", "quantized", "paged"])
def test_caches_that_do_not_grow_are_refused(model, kind: str):
    with pytest.raises(
        ValueError, match=f"cache_implementation is '{kind}'; expected None or 'dynamic'"
    ):
        model.generate(prompt()[0], **options(cache_implementation=kind))


def test_settings_are_refused_wherever_they_were_made(model, ids, mask):
    settings = GenerationConfig(max_new_tokens=2, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="^prompt_lookup_num_tokens is 3"):
        model.generate(ids, settings, attention_mask=mask)
    settings = GenerationConfig(max_new_tokens=2, num_beams=2)
    with pytest.raises(ValueError, match="^`thinking_budget` and num_beams=2 cannot be combined"):
        model.generate(ids, settings, attention_mask=mask, thinking_budget=1)
    model.generation_config.dola_layers = "low"
    with pytest.raises(ValueError, match="^dola_layers is 'low'"):
        model.generate(ids, **options())


def test_continuous_batching_is_refused(model):
    for start in (
        lambda: model.generate_batch([[3, 4]]),
        lambda: model.init_continuous_batching(),
        lambda: model.continuous_batching_context_manager(),
    ):
        with pytest.raises(
            NotImplementedError, match="continuous batching.*not supported with thoughts"
        ):
            start()


def test_as_a_draft_it_changes_nothing(model, ids):
    base = tiny_decoder("llama")
    more = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    made = base.generate(ids[1:2], assistant_model=model, **more)
    assert torch.equal(made, base.generate(ids[1:2], **more))


def test_padding_anywhere_but_at_the_left_is_refused(model, ids, mask):
    right, hole = mask.clone(), mask.clone()
    right[1, -2:] = 0
    hole[2, 4] = 0
    empty = mask.clone()
    empty[1] = 0
    for given, words in (
        (right, "padding at the right of row 1"),
        (hole, "a hole in the middle of row 2"),
    ):
        with pytest.raises(
            ValueError, match=f"attention_mask has {words}; expected padding at the left"
        ):
            model.generate(ids, **options(attention_mask=given))
        with pytest.raises(ValueError, match=f"attention_mask has {words}"):
            model(ids, attention_mask=given, cache=DynamicCache())
    with pytest.raises(ValueError, match="attention_mask has padding at the right of row 1"):
        model.generate(ids, **options(attention_mask=empty))
    # Without a mask transformers takes the padding token's word for it.
    padded = ids.clone()
    padded[0, -2:] = 0
    with pytest.raises(ValueError, match="padding at the right of row 0"):
        model.generate(padded, max_new_tokens=2, pad_token_id=0)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[3, 5\]; expected 12 columns"):
        model(ids, attention_mask=mask[:, :5], thinking=Thinking())


def test_what_a_forward_does_not_return_is_refused(model, ids):
    for name in ("output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match=f"^{name} is True; .* returns no layers"):
            model(ids, **{name: True})
        model(ids, logits_to_keep=1, **{name: False})
    with pytest.raises(ValueError, match="return_dict is False; expected True"):
        model(ids, return_dict=False)
    for labels in ({}, {"labels": ids}):
        with pytest.raises(ValueError, match="output_hidden_states is True"):
            model(ids, output_hidden_states=True, **labels)
    with pytest.raises(ValueError, match="logits_to_keep is 13; expected 0 to 12"):
        model(ids, logits_to_keep=13)
    with pytest.raises(ValueError, match="logits_to_keep is a Tensor; expected a whole number"):
        model(ids, logits_to_keep=torch.tensor([1]))


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_has_two_names(model, ids, mask, name: str):
    """A text in three calls, in generate and by hand, is the text in one."""
    whole = model.generate(ids, **options())
    cache = DynamicCache(config=model.base.config)
    with torch.no_grad():
        model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True, **{name: cache})
        output = model(ids[:, 5:9], attention_mask=mask[:, :9], use_cache=True, **{name: cache})
    assert output.past_key_values is output.cache is output[CACHE_NAME] is cache
    assert cache.get_seq_length() == 9 and output.logits.shape[1] == 1
    assert torch.equal(model.generate(ids, **options(**{name: cache})), whole)
    for other in ("labels", "anchors", "thought_ids", "document_ids"):
        with pytest.raises(ValueError, match=f"^`{other}` and `{name}` cannot be combined"):
            model(ids, **{name: cache, other: ids})
    with pytest.raises(ValueError, match=f"logits_to_keep is 2; expected 0 to 1 with {name}"):
        model(ids, logits_to_keep=2, **{name: cache})
    for wrong in (StaticCache(config=model.base.config, max_cache_len=32), ((ids, ids),)):
        kind = type(wrong).__name__
        for call in (lambda c: model(ids, **{name: c}), lambda c: model.generate(ids, **{name: c})):
            with pytest.raises(ValueError, match=f"^{name} is a {kind}; expected a cache that grows"):
                call(wrong)
    assert not issubclass(QuantizedCache, DynamicCache)


def test_the_cache_under_both_names_at_once_is_refused(model, ids):
    both = dict.fromkeys(NAMES, DynamicCache())
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="`past_key_values` and `cache` cannot be combined"):
            call(ids, **both)


def test_a_decoder_gets_its_cache_under_the_name_that_it_knows():
    class Old(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None, **kwargs): ...

    class New(torch.nn.Module):
        def forward(self, input_ids, cache=None, **kwargs): ...

    class Neither(torch.nn.Module):
        def forward(self, *args, **kwargs): ...

    names = [list(cache_argument(kind(), DynamicCache())) for kind in (Old, New, Neither)]
    assert names == [["past_key_values"], ["cache"], [CACHE_NAME]]


@pytest.mark.parametrize("kind", ["sampled", "none"])
def test_a_forward_that_keeps_its_cache_can_be_gone_on_from(ids, mask, kind: str):
    model = build(thought_kind=kind)
    with torch.no_grad():
        plain = model(ids[:, :-1], attention_mask=mask[:, :-1])
        kept = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
        assert plain.past_key_values is None and kept.cache.get_seq_length() == 11
        assert torch.equal(plain.logits, kept.logits)
        last = model(ids[:, -1:], attention_mask=mask, **{CACHE_NAME: kept.cache}).logits[:, -1]
        whole = model(ids, attention_mask=mask, logits_to_keep=1).logits[:, -1]
    real = torch.ones(last.shape[1], dtype=torch.bool)
    real[[39, 40]] = False
    torch.testing.assert_close(last[:, real], whole[:, real], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="`labels` and `use_cache` cannot be combined"):
        model(ids, labels=ids, use_cache=True)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_training_mode_with_checkpointing_generates_the_same(ids, family: str):
    model = build(family)
    expected = model.generate(ids, **options())
    model.gradient_checkpointing_enable()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert torch.equal(model.generate(ids, **options()), expected)
    assert torch.equal(model.generate(ids, **options(use_cache=False)), expected)
    assert model.is_gradient_checkpointing
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()


def test_processors_and_criteria_see_the_same_with_and_without_the_cache(model, ids):
    letters = Tokenizer(BPE({chr(32 + token): token for token in range(95)}, []))
    letters.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    greedy = model.generate(ids, **options(max_new_tokens=8))
    stop = tokenizer.decode(greedy[1, 13:15])
    first = int(greedy[2, 12])
    for more in (
        {"stop_strings": [stop], "tokenizer": tokenizer, "eos_token_id": 2, "pad_token_id": 0},
        {"eos_token_id": first, "min_new_tokens": 3, "pad_token_id": 0},
        {"eos_token_id": first, "pad_token_id": 0},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(3.0)])},
        {"bad_words_ids": [[first]], "renormalize_logits": True, "remove_invalid_values": True},
    ):
        made = model.generate(ids, **options(max_new_tokens=8, **more))
        again = model.generate(ids, **options(max_new_tokens=8, use_cache=False, **more))
        assert torch.equal(made, again) and not torch.equal(made, greedy), more
        assert not torch.isin(made[:, 12:], torch.tensor([39, 40])).any()


def test_scores_and_logits_are_those_of_the_tokens(model, ids):
    made = model.generate(
        ids, **options(return_dict_in_generate=True, output_scores=True, output_logits=True)
    )
    assert torch.equal(made.sequences, model.generate(ids, **options()))
    for step in range(NEW):
        assert torch.equal(made.logits[step].argmax(-1), made.sequences[:, 12 + step])
    transitions = model.compute_transition_scores(made.sequences, made.scores)
    assert transitions.shape == (3, NEW) and transitions.isfinite().all()
    assert made.past_key_values.get_seq_length() == 12 + NEW - 1


def test_the_configuration_answers_for_its_decoder(tmp_path):
    base = tiny_decoder("gpt2")
    base.generation_config.update(eos_token_id=[2, 5], temperature=0.7, do_sample=True)
    model = thinking_model(base)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "eos_token_id")
    for name in names:
        assert getattr(model.config, name) == getattr(base.config, name), name
    assert model.config.max_position_embeddings == base.config.n_positions
    assert model.generation_config.eos_token_id == [2, 5]
    assert model.generation_config is not base.generation_config
    model.config.pad_token_id = 7
    assert base.config.pad_token_id == 7
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not {*names, "pad_token_id", "n_embd"} & set(written)
    assert written["text_config"]["pad_token_id"] == 7
    opened = AutoConfig.from_pretrained(tmp_path)
    assert opened.hidden_size == base.config.n_embd and opened.pad_token_id == 7
    again = QuietStarForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config.eos_token_id == [2, 5]
    assert again.generation_config.temperature == 0.7
    for name in ("quantization_config", "auto_map", "no_such_field", "n_embd"):
        assert not hasattr(opened, name), name
    own = QuietStarConfig(text_config=opened.text_config, eos_token_id=11)
    assert own.text_config.eos_token_id == own.eos_token_id == 11
    assert "eos_token_id" not in own.to_diff_dict()
    assert not hasattr(QuietStarConfig.__new__(QuietStarConfig), "hidden_size")


def test_settings_that_could_not_be_saved_are_left_out(tmp_path, caplog):
    base = tiny_decoder("llama")
    base.generation_config = GenerationConfig(temperature=0.9, do_sample=False, eos_token_id=[2, 5])
    with caplog.at_level("WARNING", logger="quietstar"):
        model = thinking_model(base)
    assert "generation settings are left out" in caplog.text and "temperature" in caplog.text
    assert model.generation_config.eos_token_id == [2, 5] and not model.generation_config.temperature
    model.save_pretrained(tmp_path)
