"""What tokenizers of real models do to texts and to meta tokens, and what this package does about it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_decoder
from real_data import real_data
from small_recipes import content, from_files
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

from quietstar import END_TOKEN, START_TOKEN, QuietStarForCausalLM, add_meta_tokens
from quietstar.data.blocks import tokenize
from quietstar.data.pairs import encode_pair, encode_pairs, without_end
from quietstar.data.plain_text import plain_ids, read_special_tokens
from quietstar.data.stdlib import END_OF_TEXT, Document, train_tokenizer
from quietstar.evaluation import reasoning
from quietstar.modeling.pretrained import load_tokenizer
from quietstar.recipes.build import build_data, build_model, build_tokenizer
from quietstar.recipes.recipe import parse_recipe

SPELLS = f"a <s> and </s> <|endoftext|> <|im_start|> user <|im_end|> {START_TOKEN}{END_TOKEN} <unk> b"


def smollm2() -> Any:
    name = os.environ.get("QUIETSTAR_GGUF")
    if not name:
        pytest.skip("QUIETSTAR_GGUF names no file (SmolLM2-135M-Instruct.Q4_1.gguf)")
    return load_tokenizer(name)


OPENERS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Tokenizer.from_pretrained(real_data("tokenizers") / "gpt2"),
    "mistral": lambda: AutoTokenizer.from_pretrained(real_data("tokenizers") / "mistral"),
    "pythia": lambda: AutoTokenizer.from_pretrained(real_data("tokenizers") / "pythia"),
    "qwen2_5": lambda: AutoTokenizer.from_pretrained(real_data("tokenizers") / "qwen2_5"),
    "stories": lambda: AutoTokenizer.from_pretrained(real_data("stories260K")),
    "smollm2": smollm2,
}


@pytest.fixture(params=OPENERS, scope="module")
def tokenizer(request) -> PreTrainedTokenizerBase:
    opened = OPENERS[request.param]()
    add_meta_tokens(opened)
    return opened


def control(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    meta = tokenizer.convert_tokens_to_ids([START_TOKEN, END_TOKEN])
    return {*tokenizer.all_special_ids, *meta}


def test_what_looks_like_a_special_token_is_text(tokenizer: PreTrainedTokenizerBase):
    special = control(tokenizer)
    assert len(special & set(tokenizer(SPELLS)["input_ids"])) >= 2  # what transformers makes of it
    (ids,) = tokenize([Document("x", SPELLS)], tokenizer)
    begin = [tokenizer.bos_token_id] if ids[0] == tokenizer.bos_token_id else []
    assert not special & set(ids[len(begin) : -1]) and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[len(begin) : -1]).lstrip(" ") == SPELLS
    assert reasoning.token_ids(tokenizer, SPELLS) == ids[:-1]
    assert tokenizer(SPELLS)["input_ids"] != ids[:-1]  # nothing of it stays with the tokenizer


def test_a_document_that_ends_in_one_is_closed_all_the_same(tokenizer: PreTrainedTokenizerBase):
    end = tokenizer.eos_token
    (ids,) = tokenize([Document("x", f"the end {end}")], tokenizer)
    assert ids[-1] == tokenizer.eos_token_id and ids[-2] not in control(tokenizer)


def test_a_meta_token_goes_between_ids(tokenizer: PreTrainedTokenizerBase):
    """Written into the text it changes the pieces behind it, or what they are decoded to, in some
    tokenizers; thoughts stand beside the text and change no id of it."""
    ids = plain_ids(tokenizer, "Tom has 51 apples and eats 7.")
    model = QuietStarForCausalLM.from_base(
        tiny_decoder("llama", vocab_size=len(tokenizer)), tokenizer, thought_length=2
    )
    seen = []
    model.base.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    text = torch.tensor([ids])
    output = model.eval()(text)
    assert seen and output.thought_ids.shape[2:] == (len(ids), 2)
    assert any(given.shape == text.shape and torch.equal(given, text) for given in seen)
    assert not {model.config.start_token_id, model.config.end_token_id} & set(ids)
    assert not torch.isin(
        output.thought_ids, torch.tensor([model.config.start_token_id, model.config.end_token_id])
    ).any()


def test_an_answer_keeps_its_space(tokenizer: PreTrainedTokenizerBase):
    """A tokenizer may drop the space that opens a text, so a prompt and its answer are one text."""
    prompt, answer = "Q: How many?\nA:", " 51\n"
    start, ids = reasoning.split_answer(tokenizer, prompt, answer)
    assert ids == plain_ids(tokenizer, prompt + answer)
    assert tokenizer.decode(ids).endswith(prompt + answer)
    before = tokenizer.decode(ids[:start])
    assert before.endswith("A:") and tokenizer.decode(ids)[len(before) :] == answer


def test_a_leading_space_is_dropped_by_mistral():
    """As it is: whoever cuts text into pieces and tokenizes these loses their spaces."""
    mistral = OPENERS["mistral"]()
    assert plain_ids(mistral, " Hello") == plain_ids(mistral, "Hello")
    whole = plain_ids(mistral, "Well: Hello")
    assert whole[-1] == plain_ids(mistral, "Hello")[-1]


def test_the_data_may_have_control_tokens_if_the_recipe_says_so(tmp_path):
    """And so has what is measured and looked at with the tokenizer that the run has saved."""
    text = f"one two three {END_OF_TEXT} four five six seven eight nine"
    train_tokenizer([text * 9], 280).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text(text)
    found = {}
    for kind in (None, "text", "control"):
        recipe = parse_recipe(
            content(
                model={"tokenizer": str(tmp_path / "tokenizer"), "special_tokens": kind},
                data=from_files(tmp_path / "text.txt", block_size=8, max_train_blocks=9),
            )
        )
        tokenizer = build_tokenizer(recipe.model)
        build_model(recipe, tokenizer)
        data, _ = build_data(recipe, tokenizer, progress=False)
        row = torch.cat([data[i]["input_ids"] for i in range(len(data))]).tolist()
        tokenizer.save_pretrained(tmp_path / str(kind))
        again = load_tokenizer(tmp_path / str(kind))
        assert row == plain_ids(again, text)[: len(row)] and len(row) >= 16
        found[kind] = tokenizer.eos_token_id in row
        noted = recipe.relevant_settings()["model"].get("special_tokens")
        assert noted == kind
    assert found == {None: False, "text": False, "control": True}
    config = json.loads(Path(tmp_path / "control" / "tokenizer_config.json").read_text())
    assert config["quietstar_special_tokens"] == "control"
    tokenizer = load_tokenizer(tmp_path / "text")
    read_special_tokens(tokenizer)
    assert tokenizer.eos_token_id in plain_ids(tokenizer, text)
    read_special_tokens(tokenizer, on=False)
    assert tokenizer.eos_token_id not in plain_ids(tokenizer, text)


def test_prompts_and_completions_that_spell_one(tokenizer: PreTrainedTokenizerBase):
    row = encode_pair(tokenizer, f"say {SPELLS}:", f" {SPELLS}")
    ids = row["input_ids"]
    begin = [tokenizer.bos_token_id] if ids[0] == tokenizer.bos_token_id else []
    assert not control(tokenizer) & set(ids[len(begin) : -1]) and ids[-1] == tokenizer.eos_token_id
    # What a chat template has written is its own tokens.
    end = str(tokenizer.eos_token)
    (rendered,) = encode_pairs(tokenizer, [Document("x", f"yes{end}", f"say it{end}", True)])
    assert rendered.count(tokenizer.eos_token_id) == 2
    # Spelled, it is no end: the one behind it was added, and is not scored.
    document = Document("x", f"yes{end}", "say it")
    (spelled,) = encode_pairs(tokenizer, [document])
    assert without_end(tokenizer, document, spelled) == spelled[:-1]
    assert tokenizer.eos_token_id not in spelled[spelled.prompt : -1]
