"""``quietstar generate``, as a user calls it."""

import io
import sys
from typing import Any

import pytest
import torch
from families import thinking_model, tiny_decoder
from small_recipes import rejected
from upstream_folders import dash_tokenizer, write_checkpoint

from quietstar import QuietStarForCausalLM
from quietstar.cli import app as cli
from quietstar.data.lookup import build_tokenizer

PROMPT = "A u v w x ?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    decoder = tiny_decoder("llama", vocab_size=len(tokenizer))
    fields = {"thought_length": 3, "init_embedding_from": "A"}
    model = thinking_model(decoder, tokenizer, seed=1, mixing=0.3, **fields)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.3)
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    tokenizer.eos_token = None  # so that it says as many tokens as it is asked for
    tokenizer.save_pretrained(path)
    return str(path)


def run(capsys, *words: str) -> str:
    status = cli.main(["generate", *words])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert captured.err == ""
    return captured.out


def test_it_prints_what_the_model_says(folder: str, capsys):
    text = run(capsys, folder, PROMPT, "--max-new-tokens", "7")
    tokenizer = build_tokenizer()
    model = QuietStarForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    # Without a mask, transformers would take the prompt's tokens of the padding's id for padding.
    mask = torch.ones_like(ids)
    made = model.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False)
    assert text.split() == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).split()
    assert text.strip()


def test_a_decoder_without_thoughts(folder: str, tmp_path, capsys):
    """It says what the model with thoughts says when it does not think."""
    model = QuietStarForCausalLM.from_pretrained(folder)
    model.base.generation_config.eos_token_id = None
    model.base.set_attn_implementation("sdpa")
    model.base.save_pretrained(tmp_path)
    words = [PROMPT, "--max-new-tokens", "7"]
    expected = run(capsys, folder, *words, "--thinking", "never")
    for thinking in ([], ["--thinking", "never"]):
        made = run(capsys, str(tmp_path), *words, *thinking, "--tokenizer", folder)
        assert made == expected and made.strip()


def test_where_the_prompt_comes_from(folder: str, capsys, monkeypatch, tmp_path):
    expected = run(capsys, folder, PROMPT, "--max-new-tokens", "5")
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    assert (
        run(capsys, folder, "--file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "5") == expected
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    assert run(capsys, folder, "--max-new-tokens", "5") == expected


def test_sampling_repeats_with_its_seed(folder: str, capsys):
    words = (folder, PROMPT, "--max-new-tokens", "12", "--temperature", "2", "--top-k", "30", "--seed")
    first, again, other = (run(capsys, *words, seed) for seed in ("1", "1", "2"))
    assert first == again != other


def test_beams_and_rules(folder: str, capsys):
    assert len(run(capsys, folder, PROMPT, "--num-beams", "3", "--max-new-tokens", "5").split()) == 5
    for rule in ("never", "every:2", "entropy:1.5"):
        assert run(capsys, folder, PROMPT, "--max-new-tokens", "5", "--thinking", rule).strip()


def test_thoughts_beside_their_tokens(folder: str, capsys):
    words = (folder, PROMPT, "--max-new-tokens", "6", "--thinking", "every:2")
    plain = run(capsys, *words)
    shown = run(capsys, *words, "--show-thoughts")
    lines, text = shown.rstrip("\n").split("\n\n")
    assert text.split() == plain.split()
    rows = lines.splitlines()
    assert [row.split()[0] for row in rows] == plain.split()
    for step, row in enumerate(rows):  # three thought tokens and a weight, at every second token
        assert len(row.split()) == (5 if step % 2 == 0 else 1)
    budget = run(capsys, *words[:4], "--thinking-budget", "2", "--show-thoughts")
    assert [("(" in row) for row in budget.splitlines()[:6]] == [True] * 2 + [False] * 4


def test_thoughts_are_dimmed_on_a_terminal(folder: str):
    from rich.console import Console

    from quietstar.cli.thought_streamer import ThoughtStreamer

    model = QuietStarForCausalLM.from_pretrained(folder).eval()
    tokenizer = build_tokenizer()
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", soft_wrap=True)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    streamer = ThoughtStreamer(model, tokenizer, console)
    model.generate(ids, max_new_tokens=3, do_sample=False, streamer=streamer, eos_token_id=None)
    assert out.getvalue().count("\x1b[2m") == 3


def test_a_checkpoint_of_the_reference_code(tmp_path, capsys):
    folder = write_checkpoint(tmp_path)
    dash_tokenizer().save_pretrained(folder)
    assert run(capsys, str(folder), "t3 t4", "--max-new-tokens", "4").strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--top-p", "1.5"], "--top-p is 1.5"),
        (["--top-k", "0"], "--top-k is 0"),
        (["--temperature", "0", "--top-k", "3"], "--top-p and --top-k do nothing"),
        (["--num-beams", "2", "--show-thoughts"], "--show-thoughts and --num-beams cannot be combined"),
        (
            ["--num-beams", "2", "--thinking-budget", "2"],
            "--thinking-budget and --num-beams cannot be combined",
        ),
        (["--thinking", "often"], "thinking is 'often'; expected 'always', 'never'"),
        (["--thinking-budget", "-2"], "thinking_budget is -2"),
        (["--file", "x.txt"], "PROMPT and --file cannot be combined"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (
            ["--tokenizer", "/nowhere"],
            "/nowhere is neither a folder nor a name on the",
        ),
    ],
)
def test_refused(words: list[str], message: str, folder: str, capsys):
    rejected(capsys, ["generate", folder, PROMPT, *words], message)


def test_models_and_prompts_that_are_none(folder: str, tmp_path, capsys, monkeypatch):
    def refused(message: str, *words: Any) -> None:
        rejected(capsys, ["generate", *words], message)

    refused("is neither a folder nor in the local cache", "no-such/model", PROMPT)
    refused("holds no model (no config.json)", tmp_path, PROMPT)
    (tmp_path / "file").write_text("x")
    refused("is a file; expected a folder", tmp_path / "file", PROMPT)
    tiny_decoder("llama", vocab_size=48).save_pretrained(tmp_path / "plain")
    refused("is a model without thoughts (llama)", tmp_path / "plain", PROMPT, "--show-thoughts")
    refused("prompt file no.txt does not exist", folder, "--file", "no.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    refused("is not UTF-8 text", folder, "--file", tmp_path / "binary")
    refused("the prompt is empty", folder, "")
    refused("the prompt has no tokens", folder, " ")
    (tmp_path / "long").write_text("u " * 500)
    refused(
        "positions (max_position_embeddings); expected a shorter", folder, "--file", tmp_path / "long"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    refused("the prompt is empty", folder)
    other = dash_tokenizer(200)
    other.save_pretrained(tmp_path / "other")
    refused("start_token_id is 200 in the tokenizer", folder, PROMPT, "--tokenizer", tmp_path / "other")
