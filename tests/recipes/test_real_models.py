"""Recipes for models that others trained: the smallest run for real, the others read."""

import json
import shutil
from pathlib import Path

import pytest
from real_data import real_data

from quietstar.cli import app as cli
from quietstar.errors import UserError
from quietstar.modeling.pretrained import load_decoder
from quietstar.recipes.recipe import load_recipe, parse_recipe


def test_stories_are_learned_from_with_thoughts(tmp_path, monkeypatch, capsys):
    """Trained, measured before and after, continued and looked at: a model that knows English."""
    model, stories = real_data("stories260K"), real_data("tinystories")
    monkeypatch.chdir(tmp_path)
    text = (stories / "valid.txt").read_text()
    Path("text.txt").write_text(text[:4000])
    words = [f"model.name={model}", f"data.files=[{stories / 'train.txt'}]", "data.eval_blocks=4"]
    words += [f"data.eval_files=[{stories / 'valid.txt'}]", "data.max_train_blocks=64", "max_steps=6"]
    words += ["training.save_strategy=no", "--output", "run", "--quiet"]
    assert cli.main(["train", "stories-260k", *words]) == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["steps"] == 6
    # Random letters cost 6.2 nats (512 tokens); a new mixture must not ruin what the model knows.
    for name in ("base_nll", "mixed_nll"):
        assert 1.0 < metrics["evaluation"][name]["mean"] < 2.0
    found = {}
    for name in (str(model), "run"):
        asked = ["--tasks", "perplexity", "--data", "text.txt", "--block-size", "128", "--limit", "4"]
        assert cli.main(["eval", name, *asked, "--output", "out.json", "--quiet"]) == 0
        found[name] = json.loads(Path("out.json").read_text())["tasks"]["perplexity"]["nll"]
    assert list(found[str(model)]) == ["base"]
    assert list(found["run"]) == ["base", "mixed", "thought", "shuffled", "pause"]
    assert 1.0 < found[str(model)]["base"]["mean"] < 1.7
    assert found["run"]["base"]["mean"] == pytest.approx(found[str(model)]["base"]["mean"], abs=0.05)
    capsys.readouterr()
    for more in ([], ["--show-thoughts"]):
        asked = ["Once upon a time, there was a little", "--max-new-tokens", "12"]
        assert cli.main(["generate", "run", *asked, *more]) == 0
    assert any(word in capsys.readouterr().out for word in ("girl", "boy", "bird", "dog", "cat"))
    assert cli.main(["inspect", "run", "text.txt", "--output", "page.html", "--tokens", "64"]) == 0
    assert "what thinking gained" in Path("page.html").read_text()


def test_the_first_thoughts_of_a_plain_folder_are_its_own_words(tmp_path):
    """A folder that somebody else wrote is opened as it is, wherever it lies."""
    folder = shutil.copytree(real_data("stories260K"), tmp_path / "x.gguf")
    assert load_decoder(folder).num_parameters() == 260_032


def test_the_recipe_for_smollm2():
    recipe = load_recipe("smollm2-135m", ["model.name=some.gguf"])
    assert (recipe.model.name, recipe.model.dtype) == ("some.gguf", "float32")
    assert (recipe.model.init_start_from, recipe.model.init_end_from) == (" =", None)
    sizes = [recipe.thoughts[key] for key in ("thought_length", "talk_length", "num_rationales")]
    assert sizes == [14, 3, 4]


def test_a_run_of_before_there_were_the_keys_goes_on():
    recipe = load_recipe("smollm2-135m")
    plain = recipe.changed(model={"init_start_from": None, "init_mixing_weight": None})
    old = plain.to_dict()
    added = ("init_start_from", "init_end_from", "init_mixing_weight")
    for key in added:
        del old["model"][key]
    assert parse_recipe(old).fingerprint() == plain.fingerprint() != recipe.fingerprint()
    # Nor is there anything of them in what such a run has noted.
    assert not set(added) & plain.relevant_settings()["model"].keys()


def test_a_first_mixing_weight_that_cannot_be_is_told_with_the_recipe():
    with pytest.raises(UserError, match=r"init_mixing_weight is 2.0 with .* expected a number between"):
        load_recipe("stories-260k", ["model.init_mixing_weight=2"])
