"""Recipes: what is shipped, what is rejected and with which words, and changes by key=value."""

import pytest
import torch

from quietstar.config import QuietStarConfig
from quietstar.errors import UserError
from quietstar.files import METRICS_FILE, last_checkpoint, write_json
from quietstar.recipes import recipe as recipe_module
from quietstar.recipes.recipe import Recipe, known_keys, load_recipe, parse_recipe, shipped_recipes
from quietstar.recipes.run import training_arguments
from quietstar.recipes.run_folder import open_run, start_run
from quietstar.values import load_yaml

MINIMAL = {"model": {"name": "some/model"}, "data": {"files": "a.txt"}}


def changed(**sections: dict) -> dict:
    return {
        name: {**MINIMAL.get(name, {}), **sections.get(name, {})} for name in {**MINIMAL, **sections}
    }


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_read_back_unchanged(name: str, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    written = tmp_path / "copy.yaml"
    written.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(str(written)) == recipe
    assert load_recipe(str(written)).fingerprint() == recipe.fingerprint()


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_taken_on_any_machine(name: str, tmp_path):
    """Those with bf16 on one without a GPU, too, where transformers asks for `use_cpu`."""
    arguments = training_arguments(load_recipe(name), tmp_path, progress=False)
    assert arguments.use_cpu == (not torch.accelerator.is_available())


def test_both_names_of_what_transformers_has_renamed():
    """Which of them it knows depends on its release."""
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        by_word = load_recipe("tiny", [f"{name}=true"]).training
        in_file = parse_recipe(changed(training={name: True})).training
        for training in (by_word, in_file):
            assert [v for k, v in training.items() if k.endswith("_checkpointing")] == [True]
            assert set(training) <= set(known_keys("training"))


def test_a_renamed_key_is_taken_by_the_name_that_is_known(monkeypatch):
    for old, new in list(recipe_module.RENAMED.items()):
        known = {k: v for k, v in known_keys("training").items() if k != new} | {old: bool}
        fake = {"training": known}
        monkeypatch.setattr(recipe_module, "known_keys", lambda s, f=fake: f.get(s) or known_keys(s))
        assert parse_recipe(changed(training={new: True})).training == {old: True}
        assert recipe_module.resolve_key(new) == ["training", old]


def test_the_promised_recipes_are_shipped():
    assert {"tiny", "qwen2.5-0.5b", "llama-3.2-1b", "mistral-7b-paper"} <= set(shipped_recipes())


def test_the_paper_recipe_has_the_reference_constants():
    recipe = load_recipe("mistral-7b-paper")
    reference = QuietStarConfig.from_reference(n_ahead=12, n_ahead_talk=4, n_passes=2)
    ours = QuietStarConfig(**recipe.thoughts)
    for key in known_keys("thoughts"):
        assert getattr(ours, key) == getattr(reference, key), key
    training = recipe.training
    batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    assert (batch, training["learning_rate"], training["warmup_steps"]) == (8, 1e-6, 20)
    assert training["weight_decay"] == 0.001
    assert recipe.data.block_size == 256 and recipe.data.streaming


def test_thoughts_take_every_configuration_field():
    fields = {"thought_length", "talk_length", "num_rationales", "thought_temperature", "policy_weight"}
    fields |= {"reinforce_temperature", "base_loss_weight", "embedding_scale", "mixing_activation"}
    assert fields | {"think_at", "thought_kind"} <= set(known_keys("thoughts"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (changed(training={"learning_rat": 1}), "'training.learning_rat' in section training; did you"),
        (changed(training={"learning_rat": 1}), "did you mean training.learning_rate?"),
        (changed(thoughts={"thought_lenght": 1}), "did you mean thoughts.thought_length?"),
        (changed(data={"learning_rate": 1}), "did you mean training.learning_rate?"),
        (
            changed(model={"gradient_checkpointing": True}),
            "did you mean training.gradient_checkpointing?",
        ),
        ({**MINIMAL, "trainig": {}}, "did you mean training?"),
        (changed(training={"output_dir": "x"}), "give the folder with --output"),
        (changed(training={"learning_rate": "fast"}), "learning_rate is 'fast'; expected a number"),
        (changed(training={"bf16": "no"}), "training.bf16 is 'no'; expected true or false"),
        (changed(training={"max_steps": 1.5}), "training.max_steps is 1.5; expected a whole number"),
        (changed(training={"max_steps": True}), "expected a whole number"),
        (changed(training={"lr_scheduler_type": "liner"}), "expected one of linear, cosine"),
        (
            changed(thoughts={"thought_length": 0}),
            "thoughts.thought_length is 0; expected a whole number",
        ),
        (changed(thoughts={"num_rationales": 0}), "thoughts.num_rationales is 0; expected a whole"),
        (changed(thoughts={"think_at": "sometimes"}), "thoughts.think_at is 'sometimes'"),
        (changed(data={"packing": "loose"}), "data.packing is 'loose'; expected 'concat' or 'document'"),
        (changed(data={"block_size": 2}), "data.block_size is 2; expected at least 3 (talk_length + 2)"),
        (changed(data={"streaming": True}), "set training.max_steps"),
        (changed(data={"name": "x/y"}), "exactly one of name and files; both are given (data.name=null"),
        (changed(model={"config": {"model_type": "llama"}}), "exactly one of name and config; both"),
        ({**MINIMAL, "model": {}}, "exactly one of name and config; neither is given"),
        ({**MINIMAL, "model": {"config": {}}}, "model.config has no model_type"),
        ({**MINIMAL, "model": {"config": {"model_type": "llama"}}}, "needs model.tokenizer"),
        ({**MINIMAL, "model": "llama"}, "section model is str; expected a mapping"),
    ],
)
def test_refused_with_clear_words(content: dict, words: str):
    with pytest.raises(UserError) as error:
        parse_recipe(content)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {name: a}\ndata: {files: x.txt, block_size: 1e2}\n"
        "training: {learning_rate: 1e-6, max_steps: 1_000, eval_strategy: no, adam_beta2: '0.98'}\n"
    )
    recipe = load_recipe(str(path))
    expected = {"learning_rate": 1e-6, "max_steps": 1000, "eval_strategy": "no", "adam_beta2": 0.98}
    assert recipe.training == expected
    assert recipe.data.block_size == 100 and isinstance(recipe.data.block_size, int)
    assert recipe.data.files == ["x.txt"]


def test_yaml_is_data_only_and_unambiguous():
    with pytest.raises(UserError, match="not valid YAML"):
        load_yaml("a: !!python/object/apply:os.system ['true']", "r.yaml")
    with pytest.raises(UserError, match=r"r.yaml: key 'a' appears twice \(line 2\)"):
        load_yaml("a: 1\na: 2", "r.yaml")
    with pytest.raises(UserError, match="r.yaml, line 2 is not valid YAML"):
        load_yaml("a: 1\nb: [", "r.yaml")
    numbers = [1e-6, 1e5, -0.5, 10]
    text = "[1e-6, 1E5, -.5, 010, no, true, 12:30]"
    assert load_yaml(text, "r") == [*numbers, "no", True, "12:30"]


def test_overrides():
    words = ["training.learning_rate=1e-4", "thoughts.thought_length=8", "max_steps=7"]
    recipe = load_recipe("tiny", [*words, "kind=pause", "model.config.hidden_size=32", "eval_split="])
    assert recipe.training["learning_rate"] == 1e-4
    assert recipe.training["max_steps"] == 7
    assert recipe.thoughts["thought_length"] == 8
    assert recipe.thoughts["thought_kind"] == "pause"
    assert recipe.model.config is not None and recipe.model.config["hidden_size"] == 32
    assert recipe.data.eval_split is None
    assert load_recipe("tiny").training["max_steps"] != 7


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("revision=x", "could be model.revision, data.revision"),
        ("learning_rat=1", "did you mean training.learning_rate?"),
        ("training.learning_rat=1", "did you mean training.learning_rate?"),
        ("training", "expected key=value"),
        ("training=1", "training is a section"),
        ("xyzzy=1", "unknown key 'xyzzy'"),
    ],
)
def test_refused_overrides(word: str, words: str):
    with pytest.raises(UserError) as error:
        load_recipe("tiny", [word])
    assert words in str(error.value)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean tiny"):
        load_recipe("tyni")


def test_fingerprint_ignores_what_does_not_change_the_result():
    tiny = load_recipe("tiny")
    assert load_recipe("tiny", ["logging_steps=3", "save_steps=7"]).fingerprint() == tiny.fingerprint()
    fast = load_recipe("tiny", ["model.fused_layers=off", "model.reuse_rollout=true"])
    assert fast.fingerprint() == tiny.fingerprint()
    assert load_recipe("tiny", ["learning_rate=3e-4"]).fingerprint() != tiny.fingerprint()


class TestOutputFolder:
    recipe = load_recipe("tiny")

    def test_a_new_folder_and_one_of_the_same_recipe(self, tmp_path):
        folder = open_run(tmp_path / "new", self.recipe)
        assert folder.checkpoint is None and not (tmp_path / "new").exists()
        start_run(folder, self.recipe)
        assert open_run(tmp_path / "new", self.recipe).metrics is None
        assert load_recipe(str(tmp_path / "new" / "recipe.yaml")) == self.recipe

    def test_another_run(self, tmp_path):
        start_run(open_run(tmp_path / "run", self.recipe), self.recipe)
        other = load_recipe("tiny", ["learning_rate=5e-4"])
        with pytest.raises(UserError) as error:
            open_run(tmp_path / "run", other)
        assert "belongs to another run (training.learning_rate is 0.001 there and 0.0005 here)" in str(
            error.value
        )
        write_json(tmp_path / "run" / METRICS_FILE, {"steps": 1})
        folder = open_run(tmp_path / "run", other, overwrite=True)
        assert folder.checkpoint is None and folder.metrics is None
        # Nothing is lost before the new run starts.
        assert (tmp_path / "run" / METRICS_FILE).exists()
        start_run(folder, other)
        assert not (tmp_path / "run" / METRICS_FILE).exists()
        assert load_recipe(str(tmp_path / "run" / "recipe.yaml")) == other

    def test_somebody_elses_files_are_never_overwritten(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("chapter one")
        for overwrite in (False, True):
            with pytest.raises(UserError, match="belongs to something else"):
                open_run(tmp_path, self.recipe, overwrite=overwrite)
        assert (tmp_path / "thesis.txt").read_text() == "chapter one"

    def test_resume_needs_something_to_resume(self, tmp_path):
        with pytest.raises(UserError, match="holds no run to resume"):
            open_run(tmp_path / "new", self.recipe, resume=True)
        start_run(open_run(tmp_path / "new", self.recipe), self.recipe)
        with pytest.raises(UserError, match="holds no checkpoint to resume from"):
            open_run(tmp_path / "new", self.recipe, resume=True)

    def test_the_last_complete_checkpoint_counts(self, tmp_path):
        for step in (5, 20, 100):
            (tmp_path / f"checkpoint-{step}").mkdir()
        for step in (5, 20):
            write_json(tmp_path / f"checkpoint-{step}" / "trainer_state.json", {})
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-20"


def test_changed_checks_again():
    recipe = load_recipe("tiny").changed(thoughts={"thought_length": 3}, name="other")
    assert isinstance(recipe, Recipe) and recipe.name == "other"
    with pytest.raises(UserError, match="thought_length is 0"):
        recipe.changed(thoughts={"thought_length": 0})


def test_lookup_settings_belong_to_lookup():
    with pytest.raises(UserError, match="data.lookup is given, but data.name is None, not"):
        parse_recipe(changed(data={"lookup": {"seed": 1}}))
    with pytest.raises(UserError, match="never ends; set data.max_train_blocks"):
        parse_recipe({**MINIMAL, "data": {"name": "lookup"}})


@pytest.mark.parametrize("value", [True, "full_shard", None])
def test_fsdp_is_switched_on_as_transformers_has_it(value: bool | str | None):
    """``fsdp: true``, though the annotation of transformers knows text alone."""
    recipe = load_recipe("tiny").changed(training={"fsdp": value})
    assert recipe.training["fsdp"] is value or recipe.training["fsdp"] == value
