"""The look-up language, and the run that shows that thoughts help."""

import itertools
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from families import thinking_model, tiny_decoder

from quietstar import QuietStarForCausalLM
from quietstar.cli import app as cli
from quietstar.data import lookup
from quietstar.data.lookup import LookupLanguage, TextMix, corpus_mix
from quietstar.demos.lookup import derivation_nll, evaluate, run_arms, stage_recipes
from quietstar.demos.lookup_report import verdict
from quietstar.errors import UserError
from quietstar.evaluation.scores import same_token_partners, token_scores
from quietstar.recipes.recipe import load_recipe


def problems(tokens: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Every whole problem of a terse text: its five tokens and its answer."""
    found = []
    for at in np.flatnonzero(tokens[:-1] == lookup.ASK):
        if at >= 5 and tokens[at + 1] < lookup.STATES:
            found.append((tokens[at - 5 : at], int(tokens[at + 1])))
    return found


def test_answers_follow_from_four_lookups():
    language = LookupLanguage(3)
    found = problems(language.tokens(4000, TextMix(), 1))
    assert len(found) > 200
    for tokens, answer in found:
        state = int(tokens[0])
        for operator in tokens[1:]:
            state = int(language.permutations[operator - lookup.FIRST_OPERATOR][state])
        assert state == answer


def test_held_out_problems_are_a_quarter_and_never_trained_on():
    every = np.array(list(itertools.product(range(6), repeat=5)))
    assert 0.2 < lookup.held_out(every[:, 0], every[:, 1:]).mean() < 0.3
    language = LookupLanguage(0)
    for mix, want in ((TextMix(), False), (corpus_mix(0.3), False), (TextMix(held_out=True), True)):
        for tokens, _ in problems(language.tokens(3000, mix, 5)):
            operators = tokens[None, 1:] - lookup.FIRST_OPERATOR
            assert lookup.held_out(tokens[:1], operators)[0] == want


def test_shares_of_the_mix():
    language = LookupLanguage(1)
    text = language.tokens(200_000, corpus_mix(0.5), 2)
    questions = np.flatnonzero(text[:-12] == lookup.ASK)
    aside = text[questions + 1] == lookup.DASH
    assert abs(aside.mean() - 0.6) < 0.02
    derivation = text[questions[aside] + 2] < lookup.STATES
    assert abs(derivation.mean() - 0.5) < 0.03
    assert (text[questions[aside] + 7] == lookup.DASH).all()
    assert set(np.unique(text)) == set(range(lookup.VOCABULARY))
    items = (text == lookup.STOP).sum()
    assert abs((text == lookup.ASK).sum() / items - 0.6) < 0.02


def test_fillers_follow_their_grammar():
    language = LookupLanguage(2)
    text = language.tokens(50_000, TextMix(problems=0.0), 3)
    first, second = text[:-1], text[1:]
    both = (first >= lookup.FIRST_FILLER) & (second >= lookup.FIRST_FILLER)
    both &= (first < lookup.ASK) & (second < lookup.ASK)
    successors = language.successors[first[both] - lookup.FIRST_FILLER]
    which = successors == (second[both] - lookup.FIRST_FILLER)[:, None]
    assert which.any(1).all()
    assert np.allclose(which.mean(0), [0.6, 0.3, 0.1], atol=0.02)


def test_same_seed_same_text():
    assert np.array_equal(*(LookupLanguage(4).tokens(500, TextMix(), 9) for _ in range(2)))
    assert not np.array_equal(*(LookupLanguage(4).tokens(500, TextMix(), s) for s in (1, 2)))
    assert not np.array_equal(LookupLanguage(1).permutations, LookupLanguage(2).permutations)


def test_tokenizer_reads_what_it_writes():
    tokenizer = lookup.build_tokenizer()
    tokens = LookupLanguage(0).tokens(300, corpus_mix(0.5), 1)
    assert tokenizer(tokenizer.decode(tokens))["input_ids"] == tokens.tolist()


def test_answers_out_of_view_do_not_count():
    row = np.array([3, 6, 7, 8, 9, lookup.ASK, 2, lookup.STOP, lookup.ASK, 1, lookup.ASK, lookup.DASH])
    assert lookup.is_answer(row).nonzero()[0].tolist() == [6, 9]
    assert lookup.is_answer(row[1:]).nonzero()[0].tolist() == [8]
    assert lookup.behind_question(row).nonzero()[0].tolist() == [6, 9, 11]


def test_partners_have_the_same_token_and_are_others():
    torch.manual_seed(0)
    ids = torch.randint(0, 7, (4, 50))
    ids[0, 0] = 99
    partner = same_token_partners(ids, torch.Generator().manual_seed(1))
    flat = ids.flatten()
    assert torch.equal(flat[partner], flat)
    assert torch.equal(partner.sort().values, torch.arange(200))
    own = partner == torch.arange(200)
    assert own.nonzero().flatten().tolist() == [0]


def test_scores_are_the_models_own():
    model = thinking_model(tiny_decoder("llama", vocab_size=48), mixing=0.3, thought_length=3)
    rows = torch.from_numpy(LookupLanguage(0).blocks(6, 20, TextMix(), 1))
    own = token_scores(model, rows, batch_size=4)
    none = token_scores(model, rows, thoughts="none")
    shuffled = token_scores(model, rows, thoughts="shuffled", batch_size=6)
    model.eval()
    with torch.no_grad():
        output = model(rows, labels=rows)
    assert np.allclose(own.nll, output.talk_losses[0, :, 0, :-1], atol=1e-4)
    assert np.allclose(none.nll, output.base_losses, atol=1e-4)
    assert np.array_equal(own.thought_ids, output.thought_ids[:, 0, :-1])
    assert (none.mixing_weight == 0).all() and none.thought_ids is None
    assert np.abs(own.nll - shuffled.nll).max() > 1e-3
    assert model.config.thought_kind == "sampled"


def test_recipes_and_their_arms():
    recipes = stage_recipes(__import__("pathlib").Path("x"), seed=5)
    assert recipes["full"].thoughts["policy_weight"] == 10.0
    assert recipes["no-reinforce"].thoughts["policy_weight"] == 0.0
    assert recipes["pause"].thoughts["thought_kind"] == "pause"
    assert recipes["no-thoughts"].thoughts["thought_kind"] == "none"
    for name in ("full", "no-thoughts", "pause", "no-reinforce"):
        assert recipes[name].training == recipes["full"].training
        assert recipes[name].data == recipes["full"].data
    assert recipes["skill"].data.lookup["language"] == 5 == recipes["full"].data.lookup["language"]
    with pytest.raises(UserError, match="never ends; set data.max_train_blocks"):
        load_recipe("lookup", ["data.max_train_blocks=null"])


@pytest.mark.parametrize(("full", "said"), [(0.9, "Thoughts helped"), (0.3, "did not help")])
def test_the_verdict_follows_the_numbers(full: float, said: str):
    arms = {"full Quiet-STaR": {"accuracy": {"mean": full}}, "no thoughts": {"accuracy": {"mean": 0.2}}}
    assert said in verdict({"arms": arms})


@pytest.mark.slow
def test_thoughts_learn_what_nothing_else_does(tmp_path, capsys):
    """The guard of every kernel: with a fixed seed full Quiet-STaR solves what the control cannot."""
    metrics = run_arms(tmp_path, seed=4, quick=True, progress=False)
    arms = metrics["arms"]
    full, plain = arms["full Quiet-STaR"], arms["no thoughts"]
    assert full["accuracy"]["mean"] >= 0.9
    assert plain["accuracy"]["mean"] <= 0.3
    assert arms["full, thoughts of another position"]["accuracy"]["mean"] <= 0.3
    assert arms["full, thoughts switched off"]["accuracy"]["mean"] <= 0.3
    assert full["correct_chains"] >= 0.8
    assert full["mixing_weight_at_question"] > 0.2 > abs(full["mixing_weight_elsewhere"])
    assert full["easy_nll"]["mean"] == pytest.approx(plain["easy_nll"]["mean"], abs=0.03)
    # What lies in the folder is what was measured, and a second call repeats nothing.
    assert json.loads((tmp_path / "metrics.json").read_text())["arms"] == arms
    before = os.stat(tmp_path / "full" / "model.safetensors").st_mtime_ns
    again = run_arms(tmp_path, seed=4, quick=True, progress=False)
    assert again["arms"] == arms
    assert os.stat(tmp_path / "full" / "model.safetensors").st_mtime_ns == before
    loaded = QuietStarForCausalLM.from_pretrained(tmp_path / "full")
    assert evaluate(loaded, LookupLanguage(4)) == full
    rows = torch.from_numpy(LookupLanguage(4).derivations(64, 1))
    assert derivation_nll(loaded, rows) < 1.0
    # README shows what this model says, with its thoughts and their weights.
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    command, *lines = readme.partition("```console\n$ quietstar ")[2].partition("```")[0].splitlines()
    words = shlex.split(command)
    capsys.readouterr()
    assert (
        words[1] == "quietstar-demo/full"
        and cli.main([words[0], str(tmp_path / "full"), *words[2:]]) == 0
    )
    shown = capsys.readouterr().out.strip().splitlines()
    said = [re.sub(r"\(.*\)", "", line).split() for line in shown]
    assert said[0] == re.sub(r"\(.*\)", "", lines[0]).split()
    # The thought behind the answer is of no use, and another one on another machine. (The text follows.)
    assert [line[:1] for line in said[: len(lines)]] == [line.split()[:1] for line in lines]
