"""Stages of thoughts over a training run."""

import logging
from typing import Any

import pytest
import seeds
from small_training import Interrupt, rows, small_model, trainer

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.errors import UserError
from quietstar.recipes.recipe import load_recipe
from quietstar.training.schedule import Schedule

STAGES = [
    {"steps": 2, "thought_length": 4, "talk_length": 3, "thought_kind": "sampled"},
    {"steps": 1, "thought_length": 3, "talk_length": 2},
    {"steps": 2, "thought_length": 1},
    {"thought_kind": "none"},
]


def test_stages_follow_from_the_step():
    schedule = Schedule(STAGES, QuietStarConfig())
    assert [schedule.stage(step) for step in range(8)] == [0, 0, 1, 2, 2, 3, 3, 3]
    for step, expected in {0: (4, 3, "sampled"), 2: (3, 2, "sampled"), 7: (1, 2, "none")}.items():
        # Whatever the configuration said before: a checkpoint's may be of another stage.
        config = QuietStarConfig(thought_length=9, talk_length=7, thought_kind="pause")
        assert schedule.apply(config, step)
        assert (config.thought_length, config.talk_length, config.thought_kind) == expected
        assert not schedule.apply(config, step)
    assert schedule.describe(2).startswith("step 2: stage 2 of 4 (thought_length 3, talk_length 2")


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([], "thought_schedule is []; expected a list of stages"),
        ({"steps": 1}, "expected a list of stages"),
        ([7], "stage 1 is 7; expected a mapping"),
        ([{"thought_length": 3}, {"thought_length": 2}], "stage 1: steps is None; expected a whole"),
        ([{"steps": 0, "thought_length": 3}], "stage 1: steps is 0; expected a whole number >= 1"),
        (
            [{"steps": 1, "thought_lenght": 3}],
            "stage 1 sets 'thought_lenght'; expected steps and any of",
        ),
        ([{"steps": 1, "reward": "base-gain"}], "stage 1 sets 'reward'; expected steps and any of"),
        ([{"thought_length": 0}], "stage 1: thought_length is 0; expected a whole number >= 1"),
        ([{"thought_length": "long"}], "stage 1: thought_length is 'long'; expected a whole number"),
        (
            [{"steps": 1, "thought_length": 3}, {"talk_length": 2}],
            "stage 2 sets talk_length, which stage 1 does not; set it there too",
        ),
    ],
)
def test_refused_schedules(stages: Any, words: str):
    with pytest.raises(ValueError) as error:
        Schedule(stages, QuietStarConfig())
    assert words in str(error.value)
    with pytest.raises(UserError) as refused:
        load_recipe("tiny").changed(training={"thought_schedule": stages})
    assert "thought_schedule" in str(refused.value)


@pytest.mark.slow
def test_a_schedule_survives_a_resume(tmp_path, caplog):
    seeds.reseed()
    data = rows()
    settings = {"max_steps": 7, "save_steps": 1, "thought_schedule": STAGES}
    lengths: dict[int, tuple[int, int, str]] = {}

    class Note(Interrupt):
        def on_step_end(self, args, state, control, **kwargs):
            config = kwargs["model"].config
            lengths[state.global_step] = config.thought_length, config.talk_length, config.thought_kind
            super().on_step_end(args, state, control)

    with caplog.at_level(logging.INFO, logger="quietstar"):
        whole = trainer(tmp_path / "whole", small_model(), data, Note(), **settings)
        whole.train()
    said = [r.message for r in caplog.records if ": stage " in r.message]
    assert [line.partition(" (")[0] for line in said] == [
        f"step {step}: stage {stage} of 4" for stage, step in enumerate((0, 2, 3, 5), 1)
    ]
    stages = [entry["stage"] for entry in whole.state.log_history if "stage" in entry]
    assert stages == [1, 1, 2, 3, 3, 4, 4]
    expected = {1: (4, 3, "sampled"), 2: (4, 3, "sampled"), 3: (3, 2, "sampled")}
    expected |= {4: (1, 2, "sampled"), 5: (1, 2, "sampled"), 6: (1, 2, "none"), 7: (1, 2, "none")}
    assert lengths == expected
    for interrupted_after in (2, 3, 5):
        lengths.clear()
        parts = tmp_path / f"parts-{interrupted_after}"
        first = trainer(parts, small_model(), data, Note(interrupted_after + 1), **settings)
        with pytest.raises(KeyboardInterrupt):
            first.train()
        checkpoint = parts / f"checkpoint-{interrupted_after}"
        # Built from the checkpoint, whose configuration is that of its stage, as well as from anew.
        for model, tolerance in (
            (small_model(), 0.0),
            # Mapped from a file, weights lie at addresses at which sums may be rounded another way.
            (QuietStarForCausalLM.from_pretrained(checkpoint), 1e-4),
        ):
            second = trainer(tmp_path / "again", model, data, Note(), **settings)
            second.train(resume_from_checkpoint=str(checkpoint))
            for name, value in whole.model.state_dict().items():
                assert (value - second.model.state_dict()[name]).abs().max() <= tolerance, name
        assert lengths == expected


def test_the_longest_talk_of_a_schedule_has_to_fit():
    stages = [{"steps": 5, "talk_length": 30}, {"talk_length": 2}]
    with pytest.raises(UserError, match=r"block_size is 20; expected at least 32 \(talk_length \+ 2\)"):
        load_recipe("tiny").changed(training={"thought_schedule": stages}, data={"block_size": 20})
