"""QuietStarTrainer: learns, logs what thinking does, resumes exactly, stops at what is not finite."""

import math

import pytest
import small_training
import torch
from families import thinking_model, tiny_decoder
from safetensors.torch import load_file, save_file
from small_training import Interrupt, small_model
from transformers import TrainerCallback, TrainingArguments
from transformers import trainer as theirs

from quietstar import QuietStarForCausalLM, QuietStarTrainer
from quietstar.data.lookup import build_tokenizer
from quietstar.training.metrics import Watch
from quietstar.training.trainer import NonFiniteLoss

DATA = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(3, 9, (32, 10), generator=torch.Generator().manual_seed(4))
]


def trainer(folder, model, *callbacks, steps: int = 8, **settings) -> QuietStarTrainer:
    settings |= {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "logging_steps": 2,
        "save_steps": 4,
    }
    settings |= {"per_device_eval_batch_size": 2}
    return small_training.trainer(folder, model, DATA, *callbacks, **settings)


def test_it_learns_and_logs(tmp_path):
    run = trainer(tmp_path, small_model(mixing=0.0), steps=30)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_base_loss"] < before["eval_base_loss"] - 0.3
    entry = next(e for e in run.state.log_history if "base_loss" in e)
    for name in (
        *("base_loss", "talk_loss_0", "talk_loss_1", "gain", "reward", "positive_advantages"),
        *("policy_loss", "thought_entropy", "mixing_weight", "mixing_weight_hard"),
        *("mixing_weight_easy", "mixing_weight_top", "tokens_per_second"),
    ):
        assert math.isfinite(entry[name]), name
    # With a zero head there is nothing to gain yet; the numbers have to say exactly that.
    assert abs(before["eval_gain"]) < 1e-5 and before["eval_mixing_weight"] == 0
    assert 0 <= entry["positive_advantages"] <= 0.5
    assert entry["tokens_per_second"] > 0
    assert before["eval_loss"] == pytest.approx(before["eval_base_loss"], rel=0.3)


def test_the_logged_numbers_are_those_of_the_batches(tmp_path):
    model = small_model()
    run = trainer(tmp_path, model)
    logged = run.evaluate()
    model.eval()
    with torch.no_grad():
        ids = torch.stack([row["input_ids"] for row in DATA[:4]])
        outputs = [model(part, labels=part) for part in ids.split(2)]
    expected = sum(float(output.base_loss) for output in outputs) / 2
    assert logged["eval_base_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["plain", "checkpointing", "dropout"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, kind: str):
    """Also where the decoder draws, from torch's generator, as the thoughts do not."""
    more = {"gradient_checkpointing": kind == "checkpointing", "gradient_accumulation_steps": 2}

    def build() -> QuietStarForCausalLM:
        if kind != "dropout":
            return small_model()
        loud = tiny_decoder("gpt2", vocab_size=48, resid_pdrop=0.3)
        return thinking_model(loud, thought_kind="none", disable_dropout=False)

    whole = trainer(tmp_path / "whole", build(), **more)
    whole.train()
    first = trainer(tmp_path / "parts", build(), Interrupt(5), **more)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = trainer(tmp_path / "parts", build(), **more)
    second.train(resume_from_checkpoint=True)
    resumed = second.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_weight_is_not_missed_in_a_checkpoint(tied: bool, tmp_path, monkeypatch):
    """It is there under its other name; one that is not there is missed."""

    def build() -> QuietStarForCausalLM:
        decoder = tiny_decoder("llama", vocab_size=48, tie_word_embeddings=tied)
        return thinking_model(decoder, thought_length=2)

    trainer(tmp_path, build(), steps=4).train()
    checkpoint = tmp_path / "checkpoint-4"
    if not tied:
        state = load_file(checkpoint / "model.safetensors")
        del state["base.lm_head.weight"]
        save_file(state, checkpoint / "model.safetensors", {"format": "pt"})
    said: list[str] = []
    monkeypatch.setattr(theirs.logger, "warning", said.append)
    trainer(tmp_path, build())._load_from_checkpoint(str(checkpoint))
    assert [words for words in said if "base.lm_head.weight" in words] == said
    assert len(said) == (0 if tied else 1)


def test_it_stops_at_a_loss_that_is_not_finite(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                with torch.no_grad():
                    model.mixing_head.fc1.bias[0] = float("nan")

    run = trainer(tmp_path, small_model())
    run.add_callback(Poison())
    with pytest.raises(NonFiniteLoss, match="loss at step 6 is not finite.*last checkpoint is kept"):
        run.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4"]


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_it_stops_at_a_gradient_that_is_not_finite(tmp_path, clip: float):
    run = trainer(tmp_path, small_model(), max_grad_norm=clip, max_skipped_steps=0)
    weight = run.model.mixing_head.fc2.weight
    before = weight.detach().clone()
    run.model.thought_embedding.start.register_hook(lambda g: torch.full_like(g, float("inf")))
    with pytest.raises(NonFiniteLoss, match="gradient at step 1 is not finite"):
        run.train()
    assert torch.equal(weight, before)


def test_no_graph_stays_alive_in_the_metrics(tmp_path):
    run = trainer(tmp_path, small_model(), steps=2)
    run.compute_loss(run.model.train(), {k: v[None] for k, v in DATA[0].items()})
    for total, count in run.metrics.averages[True]._sums.values():
        assert not total.requires_grad and not count.requires_grad


def test_a_tokenizer_that_does_not_fit_is_refused_before_training(tmp_path):
    model = small_model()
    model.config.end_token_id = 41
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="end_token_id is 40 in the tokenizer and 41 in the model"):
        QuietStarTrainer(
            model=model, args=arguments, train_dataset=DATA, processing_class=build_tokenizer()
        )


@pytest.mark.parametrize(
    ("logs", "said"),
    [
        ({"mixing_weight_top": 0.0}, "mixing weight stays at 0"),
        ({"policy_loss": 4.0, "base_loss": 2.0}, "policy term is far larger"),
        ({"thought_entropy": 0.001, "gain": 0.0}, "Thoughts have collapsed"),
        ({"positive_advantages": 0.0, "mixing_weight_top": 0.2}, "No thought has a positive advantage"),
    ],
)
def test_known_failures_are_named_with_a_remedy(logs: dict, said: str):
    watch = Watch(patience=2)
    assert watch.look(logs, policy_weight=1e6, max_grad_norm=1.0) == []
    (message,) = watch.look(logs, policy_weight=1e6, max_grad_norm=1.0)
    assert said in message
    assert watch.look(logs, policy_weight=1e6, max_grad_norm=1.0) == []
    healthy = {"mixing_weight_top": 0.3, "policy_loss": 0.1, "base_loss": 2.0, "thought_entropy": 2.0}
    healthy["positive_advantages"] = 0.4
    assert Watch(patience=1).look(healthy, policy_weight=10.0, max_grad_norm=1.0) == []
