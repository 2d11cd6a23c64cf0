"""QuietStarConfig: a field misspelt is rejected, whatever else configurations have is not."""

import copy
import inspect
import json
import logging

import pytest
import torch
from small_training import small_model
from transformers import AutoConfig, AutoModelForCausalLM

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.think_rules import loss_bounds, parse_rule

MISSPELT = r"no field 'thougth_length'; did you mean thought_length\?"


def test_a_misspelt_field_is_refused_wherever_it_is_given(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    decoder = AutoModelForCausalLM.from_config(model.config.text_config)
    before = decoder.config.vocab_size
    for call in (
        lambda: QuietStarConfig(thougth_length=9),
        lambda: QuietStarConfig.from_reference(n_ahead=8, n_ahead_talk=4, n_passes=2, thougth_length=9),
        lambda: QuietStarConfig.from_pretrained(tmp_path, thougth_length=9),
        lambda: AutoConfig.from_pretrained(tmp_path, thougth_length=9),
        lambda: AutoConfig.for_model("quietstar", thougth_length=9),
        lambda: QuietStarForCausalLM.from_pretrained(tmp_path, thougth_length=9),
        lambda: QuietStarForCausalLM.from_base(
            decoder, start_token_id=39, end_token_id=40, thougth_length=9
        ),
        # Before anything is loaded.
        lambda: QuietStarForCausalLM.from_base(
            "no/such-decoder", start_token_id=39, end_token_id=40, thougth_length=9
        ),
        lambda: setattr(model.config, "thougth_length", 9),
    ):
        with pytest.raises(TypeError, match=MISSPELT):
            call()
    assert decoder.config.vocab_size == before
    with pytest.raises(TypeError, match="no field 'depth'; expected any of text_config, thought_length"):
        QuietStarConfig(depth=9)
    with pytest.raises(TypeError, match="no field 'hidden_size'"):
        QuietStarConfig(hidden_size=64)  # the decoder's


def test_fields_are_given_while_loading(tmp_path):
    small_model().save_pretrained(tmp_path)
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path, thought_length=3, dtype=torch.float32)
    assert loaded.config.thought_length == 3
    assert AutoConfig.from_pretrained(tmp_path, talk_length=4).talk_length == 4


def test_what_configurations_have_is_taken(tmp_path):
    config = small_model().config
    assert config.to_dict() == QuietStarConfig(**config.to_dict()).to_dict()
    made = QuietStarConfig(
        attn_implementation="eager", dtype="bfloat16", use_cache=False, pad_token_id=0, num_labels=2
    )
    assert made.dtype == torch.bfloat16
    # As transformers' Trainer and PEFT do.
    made.eos_token_id, made.use_cache, made.quantization_config = 2, False, {"bits": 4}
    made.save_pretrained(tmp_path)
    again = QuietStarConfig.from_pretrained(tmp_path)
    assert again.eos_token_id == 2
    assert again.quantization_config == {"bits": 4}
    assert copy.deepcopy(again).to_dict() == again.to_dict()


def test_a_newer_version_s_checkpoint_loads_with_a_warning(tmp_path, caplog):
    model = small_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "thought_lengths": [2, 3]}))
    with caplog.at_level(logging.WARNING, logger="quietstar"):
        loaded = QuietStarForCausalLM.from_pretrained(tmp_path)
    assert [r.message for r in caplog.records if "thought_lengths, which this version" in r.message]
    assert loaded.config.thought_length == model.config.thought_length
    assert loaded.config.to_dict()["thought_lengths"] == [2, 3]


def test_fields_by_position_stand_in_their_order():
    assert [*inspect.signature(QuietStarConfig).parameters][:4] == [
        *("text_config", "thought_length", "talk_length", "num_rationales")
    ]
    config = QuietStarConfig(None, 7, 2)
    assert (config.thought_length, config.talk_length, config.num_rationales) == (7, 2, 2)
    with pytest.raises(TypeError, match="thought_length was given by position and by name"):
        QuietStarConfig(None, 7, thought_length=3)
    with pytest.raises(TypeError, match="41 settings were given by position"):
        QuietStarConfig(None, *range(40))


def test_both_settings_of_where_to_think_have_one_grammar():
    for number in ("0.5", "1"):
        share, nats = (parse_rule(name, f"entropy:{number}") for name in ("think_at", "thinking"))
        assert share == nats == ("entropy", float(number))
        assert parse_rule("think_at", f"entropy-share:{number}") == share
        assert parse_rule("thinking", f"entropy-nats:{number}") == nats
    assert parse_rule("thinking", "entropy-nats:2.5") == ("entropy", 2.5)
    assert parse_rule("think_at", "completion") == ("completion", 1.0)
    assert parse_rule("think_at", "loss:1:4.5") == ("loss", 1.0) and loss_bounds("loss:1:4.5") == (
        1,
        4.5,
    )
    for rule in ("loss:1:4.5", "completion"):
        with pytest.raises(ValueError, match=f"thinking is '{rule}', a rule of think_at, as generation"):
            parse_rule("thinking", rule)
    for name, rule in (("think_at", "entropy-nats:0.5"), ("thinking", "entropy-share:0.5")):
        with pytest.raises(ValueError, match=f"{name} is '{rule}'; expected"):
            parse_rule(name, rule)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"thought_length": 0}, "thought_length is 0; expected a whole number >= 1"),
        ({"talk_length": 0}, "talk_length is 0"),
        ({"num_rationales": -1}, "num_rationales is -1"),
        ({"thought_length": 2.5}, "thought_length is 2.5"),
        ({"reinforce_temperature": 0}, "reinforce_temperature is 0; expected a number > 0"),
        ({"policy_weight": -1.0}, "policy_weight is -1.0; expected a number >= 0"),
        ({"base_loss_weight": 1.5}, "base_loss_weight is 1.5"),
        ({"mixing_activation": "relu"}, "mixing_activation is 'relu'"),
        ({"thought_kind": "loud"}, "thought_kind is 'loud'"),
        ({"think_at": "every:2"}, "think_at is 'every:2'; expected 'all', 'stride:k'"),
        ({"think_at": "stride:0"}, "think_at is 'stride:0'"),
        ({"think_at": "entropy-nats:0.5"}, "think_at is 'entropy-nats:0.5'; expected .*entropy-share:p"),
        ({"think_at": "random:1.5"}, "think_at is 'random:1.5'"),
        (
            {"think_at": "completion:2"},
            "think_at is 'completion:2'; expected .*'completion', or 'loss:x",
        ),
        *(
            ({"think_at": rule}, f"think_at is '{rule}'; expected .* 'loss:x:y' with 0 <= x < y")
            for rule in ("loss", "loss:1", "loss:2:1", "loss:1:2:3", "loss:-1:2", "loss:a:b", "loss::2")
        ),
        ({"reward": "gain"}, "reward is 'gain'; expected one of"),
        ({"advantage": "median"}, "advantage is 'median'; expected one of"),
        ({"advantage": "normalized", "num_rationales": 1}, "expected at least 2 thoughts to compare"),
        ({"entropy_bonus": -1.0}, "entropy_bonus is -1.0; expected a number >= 0"),
        ({"nll_weight": float("nan")}, "nll_weight is nan; expected a number >= 0"),
        ({"mixing_floor": 1.5}, "mixing_floor is 1.5; expected a number from 0 to 1"),
        ({"mixing_floor": 0.1}, "expected 'sigmoid': an unbounded weight has no floor"),
        ({"policy_mean": "all"}, r"policy_mean is 'all'; expected one of \('rewarded', 'paper'\)"),
    ],
)
def test_values_that_no_field_may_have(fields: dict, said: str):
    with pytest.raises(ValueError, match=said):
        QuietStarConfig(**fields)
