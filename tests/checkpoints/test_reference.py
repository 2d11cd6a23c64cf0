"""Checkpoints as the reference code saves them: read, equal in their logits, or rejected by name."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from upstream_folders import FLAGS, OWN, dash_tokenizer, golden, write_checkpoint

from quietstar import QuietStarForCausalLM

FOLDER = Path(os.environ.get("QUIETSTAR_GOLDEN", OWN.parent))
CASES = sorted(path.parent.name for path in FOLDER.glob("*/meta.json"))


@pytest.mark.parametrize("kind", ["safetensors", "bin", "safetensors-whole", "bin-whole"])
@pytest.mark.parametrize("case", CASES)
def test_logits_at_evaluation(case: str, kind: str, tmp_path):
    meta, data = golden(FOLDER / case)
    folder = write_checkpoint(tmp_path, FOLDER / case, kind=kind)
    model = QuietStarForCausalLM.from_reference(folder, n_ahead=meta["n_ahead"])
    assert not model.training
    assert (model.config.thought_length, model.config.talk_length) == (
        meta["n_ahead"] - 3,
        meta["n_ahead_talk"],
    )
    # tokens[t] is fed at depth t + 1: start, the sampled ones, end.
    fed = data["eval/tokens"]
    assert (fed[0] == model.config.start_token_id).all()
    assert (fed[1 + model.config.thought_length] == model.config.end_token_id).all()
    thoughts = fed[1 : 1 + model.config.thought_length].permute(1, 2, 0)[:, None].contiguous()
    mask = data["attention_mask"]
    with torch.no_grad():
        logits = model(data["input_ids"], attention_mask=mask, thought_ids=thoughts).logits
    text, theirs = mask.bool(), data["eval/logits"]
    error = (logits - theirs)[text].abs().max() / theirs[text].abs().max()
    assert error < 1e-4
    if FOLDER / case == OWN:
        with torch.no_grad():
            other = model(data["input_ids"], attention_mask=mask, thought_ids=thoughts.flip(2)).logits
        assert (other - theirs)[text].abs().max() / theirs[text].abs().max() > 1e-3


def test_it_can_be_saved_loaded_and_trained_on(tmp_path):
    model = QuietStarForCausalLM.from_reference(write_checkpoint(tmp_path / "theirs"), n_ahead=6)
    model.save_pretrained(tmp_path / "ours")
    again = QuietStarForCausalLM.from_pretrained(tmp_path / "ours")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    ids = torch.randint(3, 100, (1, 12))
    model.train()(ids, labels=ids).loss.backward()
    assert model.thought_embedding.start.grad.abs().max() > 0
    with pytest.raises(ValueError, match="is a checkpoint of this package"):
        QuietStarForCausalLM.from_reference(tmp_path / "ours")


@pytest.mark.parametrize(
    ("given", "config", "expected"),
    [
        ({"n_ahead": 6}, {"max_thoughts": 10}, (3, 3)),
        ({"n_ahead_talk": 2}, {"max_thoughts": 10}, (4, 2)),
        ({"n_ahead": 8, "n_ahead_talk": 1}, {"max_thoughts": 10}, (5, 1)),
        ({}, {"max_thoughts": 13}, (5, 4)),
    ],
)
def test_lengths(given: dict, config: dict, expected: tuple[int, int], tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "quietstar"):
        model = QuietStarForCausalLM.from_reference(write_checkpoint(tmp_path, **config), **given)
    assert (model.config.thought_length, model.config.talk_length) == expected
    assert ("assuming n_ahead=8 and n_ahead_talk=4" in caplog.text) == (not given)
    assert model.config.policy_weight == 1e6


def test_dtype_and_remote_code_configurations(tmp_path):
    folder = write_checkpoint(
        tmp_path, model_type="quiet", auto_map={"AutoConfig": "configuration_quiet.QuietConfig"}
    )
    (folder / "configuration_quiet.py").write_text("raise SystemExit('was run')")
    model = QuietStarForCausalLM.from_reference(folder, n_ahead=6, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "flag",
    [
        "use_weighted_talk_head",
        "use_concat_talk_head",
        "use_complex_talk_head",
        "use_shallow_talk",
        "merged_lm_and_talk_heads",
    ],
)
def test_unknown_head_layouts_are_refused_by_name(flag: str, tmp_path):
    folder = write_checkpoint(tmp_path, **{flag: not FLAGS[flag]})
    with pytest.raises(ValueError, match=f"{flag} is {not FLAGS[flag]} in the configuration"):
        QuietStarForCausalLM.from_reference(folder, n_ahead=6)


def test_untrained_thought_embeddings_are_warned_of(tmp_path, caplog):
    folder = write_checkpoint(tmp_path, drop=("start_embedding",))
    dash_tokenizer().save_pretrained(folder)
    with caplog.at_level(logging.WARNING, "quietstar"):
        model = QuietStarForCausalLM.from_reference(folder, n_ahead=6)
    assert "has no trained start_embedding; it begins as the embedding of '---'" in caplog.text
    assert "end_embedding" not in caplog.text
    start = model.thought_embedding.start.detach() * 100
    torch.testing.assert_close(start, model.get_input_embeddings().weight[7].detach())
    # Without a tokenizer, and as the reference saves them before its first step.
    bare = write_checkpoint(tmp_path / "bare", drop=("end_embedding",))
    with caplog.at_level(logging.WARNING, "quietstar"):
        model = QuietStarForCausalLM.from_reference(bare, n_ahead=6)
    assert "has no trained end_embedding; it begins as the embedding of its token" in caplog.text
    end = model.thought_embedding.end.detach() * 100
    torch.testing.assert_close(end, model.get_input_embeddings().weight[129].detach())


def test_damaged_checkpoints_are_refused(tmp_path, monkeypatch):
    def refused(folder: Path | str, words: str, **options) -> None:
        with pytest.raises(ValueError, match=words):
            QuietStarForCausalLM.from_reference(folder, **{"n_ahead": 6, **options})

    refused(tmp_path / "none", "is neither a folder nor a name on the Hugging Face Hub")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"config.json does not exist")
    no_head = write_checkpoint(tmp_path / "head", drop=("talk_head.0.2.weight",))
    refused(no_head, "nothing for 'mixing_head.fc2.weight'")
    shard = write_checkpoint(tmp_path / "shard")
    (shard / "model-00002-of-00002.safetensors").unlink()
    refused(shard, "names 'model-00002-of-00002.safetensors', which is not in")
    outside = write_checkpoint(tmp_path / "outside")
    index = outside / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../shard/model-00001-of-00002.safetensors"}}))
    refused(outside, "which is not in")
    wide = write_checkpoint(tmp_path / "wide", hidden_size=64)
    refused(wide, r"has shape \[.*\] in the state dict")
    none = write_checkpoint(tmp_path / "no-weights", kind="bin-whole")
    (none / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    refused(none, "cannot be read as tensors alone")
    (none / "pytorch_model.bin").unlink()
    refused(none, "holds neither model.safetensors nor pytorch_model.bin")
    silent = write_checkpoint(tmp_path / "silent")
    settings = json.loads((silent / "config.json").read_text())
    del settings["max_thoughts"]
    (silent / "config.json").write_text(json.dumps(settings))
    refused(silent, "n_ahead is missing, and the configuration has no max_thoughts", n_ahead=None)


def test_pickled_code_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "was-run"),))

    folder = write_checkpoint(tmp_path / "checkpoint", kind="bin-whole")
    torch.save({"model.embed_tokens.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        QuietStarForCausalLM.from_reference(folder, n_ahead=6)
    assert not (tmp_path / "was-run").exists()
