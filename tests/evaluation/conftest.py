"""Tokenizers, a small model and files of rows for the tests of ``quietstar eval``."""

import json
from pathlib import Path

import pytest
from evaluation_cases import CSQA_ROWS, GSM_ROWS
from families import thinking_model, tiny_decoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar import QuietStarForCausalLM
from quietstar.data.stdlib import train_tokenizer
from quietstar.modeling.meta_tokens import add_meta_tokens


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerFast:
    """A tokenizer that writes " 18" and " A" as one token each."""
    text = "Q: 1 2 3 4 5 6 7 8 9 0\nA: 18\n" + "".join(f"\nA: {x}\n" for x in "ABCDE") * 3
    tokenizer = train_tokenizer([(text + "A: 18\n" * 9) * 3], 340)
    add_meta_tokens(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def splitting() -> PreTrainedTokenizerFast:
    """A tokenizer as Mistral's: the space before a number is a token, digits are split, " A" is one
    token, and what is not in the vocabulary is written in bytes (so "1" is there as a byte as well)."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    names += [*"0123456789ABCDEQ:,abcdefghijklmnopqrstuvwxyzT.?()+"]
    merges = [("▁", letter) for letter in "ABCDE"]
    names += ["".join(pair) for pair in merges]
    core = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def model(merging: PreTrainedTokenizerFast) -> QuietStarForCausalLM:
    decoder = tiny_decoder("llama", vocab_size=len(merging), max_position_embeddings=400)
    return thinking_model(decoder, merging, seed=1, mixing=0.3, thought_length=3).eval()


@pytest.fixture(scope="module")
def folder(model: QuietStarForCausalLM, merging: PreTrainedTokenizerFast, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    merging.save_pretrained(path)
    return str(path)


@pytest.fixture
def gsm_file(tmp_path) -> Path:
    path = tmp_path / "gsm.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GSM_ROWS))
    return path


@pytest.fixture
def csqa_file(tmp_path) -> Path:
    path = tmp_path / "csqa.json"
    path.write_text(json.dumps(CSQA_ROWS))
    return path
