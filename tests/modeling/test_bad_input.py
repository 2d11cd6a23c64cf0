"""Bad input to the model: one clear sentence that names what is wrong, before anything is computed."""

import pytest
import torch
from families import VOCABULARY, thinking_model, tiny_decoder

from quietstar import QuietStarConfig, QuietStarForCausalLM


@pytest.fixture(scope="module")
def model() -> QuietStarForCausalLM:
    return thinking_model(thought_length=2, talk_length=2)


IDS = torch.arange(3, 13).view(1, 10)


def test_configuration_is_checked_when_it_changes(model: QuietStarForCausalLM):
    model.config.num_rationales = 0
    try:
        with pytest.raises(ValueError, match="num_rationales is 0"):
            model(IDS, labels=IDS)
    finally:
        model.config.num_rationales = 2


def test_n_ahead_too_small():
    with pytest.raises(ValueError, match="n_ahead is 3; expected at least 4"):
        QuietStarConfig.from_reference(n_ahead=3, n_ahead_talk=1, n_passes=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS[:, :3], "labels": IDS[:, :3]}, "3 tokens per row; expected at least 4"),
        ({"input_ids": IDS[0], "labels": IDS[0]}, r"input_ids has shape \[10\]"),
        ({"input_ids": IDS, "labels": IDS[:, :5]}, r"labels has shape \[1, 5\]; expected \[1, 10\]"),
        ({"input_ids": IDS, "labels": torch.full_like(IDS, -100)}, "labels are all ignored"),
        (
            {"input_ids": IDS, "labels": IDS, "attention_mask": torch.zeros_like(IDS)},
            "labels are all ignored",
        ),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(1, 4)},
            r"attention_mask has shape \[1, 4\]; expected \[1, 10\]",
        ),
        ({"input_ids": IDS, "attention_mask": (IDS != 7).long()}, "hole in the middle of a row"),
        (
            {"input_ids": IDS, "labels": IDS, "thought_ids": torch.ones(1, 10, 2).long()},
            r"thought_ids has shape \[1, 10, 2\]; expected \[1, rationales, 10, 2\]",
        ),
        ({"input_ids": IDS, "labels": torch.full_like(IDS, 96)}, "targets"),
        ({"input_ids": IDS, "head_mask": IDS}, "unexpected argument 'head_mask'"),
        ({"input_ids": IDS, "inputs_embeds": IDS}, "inputs_embeds were given; expected input_ids"),
        ({"labels": IDS}, "input_ids is missing"),
        ({"input_ids": IDS.tolist()}, "input_ids is a list; expected a torch.Tensor"),
        ({"input_ids": IDS.float()}, "input_ids has dtype float32; expected int64"),
        ({"input_ids": IDS, "labels": IDS.tolist()}, "labels is a list; expected a torch.Tensor"),
        ({"input_ids": IDS, "attention_mask": {"full": IDS}}, "attention_mask is a dict; expected a"),
        (
            {"input_ids": IDS, "document_ids": [0] * 10},
            "document_ids is a list; expected a torch.Tensor",
        ),
        ({"input_ids": IDS, "logits_to_keep": 11}, "logits_to_keep is 11; expected 0 to 10"),
    ],
)
def test_call(model: QuietStarForCausalLM, arguments: dict, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        model(**arguments)


def test_meta_tokens_have_to_come_from_somewhere():
    with pytest.raises(ValueError, match="start_token_id is missing"):
        QuietStarForCausalLM.from_base(tiny_decoder("llama"))


def test_meta_tokens_have_to_lie_in_the_vocabulary():
    with pytest.raises(ValueError, match=f"end_token_id is {VOCABULARY}; expected .* 0 to 95"):
        QuietStarForCausalLM.from_base(tiny_decoder("llama"), start_token_id=94, end_token_id=VOCABULARY)


def test_attention_dropout_is_refused():
    """Where it was kept for training without thoughts, and the documents of a row need the layout."""
    decoder = tiny_decoder("llama", attention_dropout=0.1)
    model = thinking_model(decoder, thought_kind="none", disable_dropout=False).train()
    model(IDS, labels=IDS)
    documents = torch.arange(IDS.shape[1])[None].expand_as(IDS) // 4
    with pytest.raises(ValueError, match=r"attention dropout is 0.1; expected 0 .* several documents"):
        model(IDS, labels=IDS, document_ids=documents)


def test_attention_implementation_stays(model: QuietStarForCausalLM):
    with pytest.raises(ValueError, match="attn_implementation is 'eager'"):
        model.set_attn_implementation("eager")
