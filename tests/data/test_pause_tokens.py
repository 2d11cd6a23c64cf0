"""Pause tokens in the stream: behind prompts, without loss, seen by what follows, saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_decoder
from small_recipes import content, from_files

from quietstar.checkpoints.load import load_checkpoint
from quietstar.cli import app as cli
from quietstar.data.pairs import encode_pair
from quietstar.data.pause_tokens import PAUSE_TOKEN, pause_ids
from quietstar.data.sums import build_tokenizer as sums_tokenizer
from quietstar.errors import UserError
from quietstar.evaluation.reasoning import split_answer
from quietstar.recipes.build import build_data, build_model, build_tokenizer
from quietstar.recipes.recipe import Recipe, load_recipe, parse_recipe
from quietstar.recipes.run import run_recipe

ROWS = [{"p": f"1 + {n}", "c": f"{n + 1}"} for n in range(9)]


@pytest.fixture
def base(tmp_path) -> Path:
    tokenizer = sums_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_decoder("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def recipe(base: Path, data: dict[str, Any], **sections: Any) -> Recipe:
    file = base.parent / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pairs = {"prompt": "{p}", "completion": "{c}", "max_train_blocks": None, "block_size": 24}
    sections.setdefault("thoughts", {"talk_length": 1})
    made = content(data={**from_files(file), **pairs, **data}, **sections)
    made["model"] = {"name": str(base), **sections.get("model", {})}
    return parse_recipe(made)


@pytest.mark.parametrize("packing", ["document", "packed"])
def test_they_stand_behind_the_prompt_without_loss(base, packing):
    made = recipe(base, {"pause_tokens": 3, "packing": packing})
    tokenizer = build_tokenizer(made.model)
    model = build_model(made, tokenizer)
    pause = tokenizer.convert_tokens_to_ids(PAUSE_TOKEN)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) > pause
    data, _ = build_data(made, tokenizer, progress=False)
    row = data[0]
    assert row["input_ids"][:8].tolist() == [
        *tokenizer("1 + 0")["input_ids"], pause, pause, pause, tokenizer.convert_tokens_to_ids("1"),
        tokenizer.eos_token_id,
    ]  # fmt: skip
    assert row["labels"][:6].tolist() == [-100] * 6 and row["labels"][6] == row["input_ids"][6]
    assert row["completion_anchors"][0] == 5  # a thought at the completion begins behind the last pause
    again = encode_pair(tokenizer, "1 + 0", "1")
    assert again["input_ids"] == row["input_ids"][:8].tolist()


def test_later_tokens_see_them(base):
    made = recipe(base, {"pause_tokens": 2}, thoughts={"thought_kind": "none"})
    tokenizer = build_tokenizer(made.model)
    model = build_model(made, tokenizer).eval()
    ids = torch.tensor([encode_pair(tokenizer, "1 + 2", "3")["input_ids"]])
    before = model.base(ids).logits
    with torch.no_grad():
        model.get_input_embeddings().weight[pause_ids(tokenizer)[0]] += 1.0
    after = model.base(ids).logits
    changed = (before - after).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [False] * 3 + [True] * (ids.shape[1] - 3)


def test_they_are_learnt_and_stay_with_the_model(base, tmp_path, capsys):
    made = recipe(base, {"pause_tokens": 2}, thoughts={"thought_kind": "none"})
    tokenizer = build_tokenizer(made.model)
    start = build_model(made, tokenizer).get_input_embeddings().weight.detach().clone()
    run_recipe(made, tmp_path / "run", progress=False)
    model, again = load_checkpoint(str(tmp_path / "run"), device="cpu")
    (pause, _) = pause_ids(again)
    assert not torch.equal(model.get_input_embeddings().weight[pause], start[pause])
    assert encode_pair(again, "1 + 2", "3") == encode_pair(tokenizer, "1 + 2", "3")
    # What continues a prompt stands behind its pauses.
    asked: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        generate = type(model).generate

        def recorded(self, ids, **options):
            asked.append(ids[0].tolist())
            return generate(self, ids, **options)

        patch.setattr(
            type(model),
            "generate",
            recorded,
        )
        assert cli.main(["generate", str(tmp_path / "run"), "1 + 2", "--max-new-tokens", "2"]) == 0
    assert asked == [[*again("1 + 2")["input_ids"], pause, pause]]
    # And so do the answers that evaluation asks for.
    start, ids = split_answer(again, "1 + 2", " 3")
    plain_start, plain = split_answer(sums_tokenizer(), "1 + 2", " 3")
    assert ids == [*plain[:plain_start], pause, pause, *plain[plain_start:]]
    assert start == plain_start + 2
    # Trained on with thoughts in slots, beside the pauses in the stream.
    files, thoughts = made.data.files, {"thought_kind": "sampled"}
    further = recipe(tmp_path / "run", {"pause_tokens": 2, "files": files}, thoughts=thoughts)
    assert build_model(further, build_tokenizer(further.model)).config.thinks


def test_what_is_refused(base, tmp_path):
    for data, said in (
        ({"pause_tokens": 0}, "data.pause_tokens is 0; expected a whole number >= 1, or null"),
        (
            {"pause_tokens": 1, "prompt": None, "completion": None, "text_column": "p"},
            "data.pause_tokens is 1 and the data have no prompts to put them behind",
        ),
    ):
        with pytest.raises(UserError, match=said):
            recipe(base, data)
    with pytest.raises(UserError, match="data.pause_tokens is 1 and adapter.rank is given"):
        recipe(base, {"pause_tokens": 1}, adapter={"rank": 2})
    plain = recipe(base, {}, thoughts={"thought_kind": "none"})
    run_recipe(plain, tmp_path / "plain", progress=False)
    made = recipe(tmp_path / "plain", {"pause_tokens": 1, "files": plain.data.files})
    with pytest.raises(UserError, match="was trained without pause tokens; expected one that was"):
        build_model(made, build_tokenizer(made.model))


def test_recipes_without_them_keep_their_fingerprint():
    assert "pause_tokens" not in load_recipe("tiny").relevant_settings()["data"]
    assert "star" not in load_recipe("tiny").relevant_settings()
