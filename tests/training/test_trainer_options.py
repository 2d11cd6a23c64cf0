"""Options of the Trainer: each has its effect, or is rejected by name before training."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import tiny_decoder
from small_training import rows, small_model, trainer
from torch.utils.data import IterableDataset
from transformers import DataCollatorForLanguageModeling, HfArgumentParser, TrainingArguments

from quietstar import QuietStarArguments, QuietStarTrainer
from quietstar.data.lookup import build_tokenizer
from quietstar.training.options import _ARGUMENTS, check_options, computes_bf16


def arguments(folder: Path, **fields: Any) -> QuietStarArguments:
    fixed = {
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "max_steps": 2,
    }
    return QuietStarArguments(output_dir=str(folder), **{**fixed, **fields})


def build(folder: Path, *, fields: dict[str, Any] | None = None, **given: Any) -> QuietStarTrainer:
    given = {"model": small_model(), "train_dataset": rows(8), **given}
    return QuietStarTrainer(args=arguments(folder, **(fields or {})), **given)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, which has no effect: .* 0.0"),
        ({"label_names": ["targets"]}, r"label_names is \['targets'\], which has no effect"),
        ({"liger_kernel_config": {"rope": True}}, "liger_kernel_config is .* which has no effect"),
    ],
)
def test_arguments_without_an_effect(tmp_path, fields: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        build(tmp_path, fields=fields)
    assert set(fields) <= set(_ARGUMENTS)
    assert hasattr(arguments(tmp_path), next(iter(fields)))


def test_half_precision_that_a_cpu_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="fp16 is True, which has no effect on a CPU"):
        build(tmp_path, fields={"fp16": True})


@pytest.mark.parametrize("feature", ["amx_bf16", "avx512_bf16", None])
def test_bf16_that_a_cpu_computes_in_software(tmp_path, monkeypatch, caplog, feature: str | None):
    found = {"avx2": True, "cpu_name": "some", "amx_bf16": False, "avx512_bf16": False}
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: found | dict.fromkeys([feature] if feature else [], True)
    )
    assert computes_bf16("cpu") == (feature is not None) and computes_bf16("cuda")
    for bf16 in (False, True):
        build(tmp_path, fields={"bf16": bf16})
        said = "computes bfloat16 in software; bf16=false is faster" in caplog.text
        assert said == (bf16 and feature is None)


def test_a_data_set_of_text_is_refused_before_training(tmp_path):
    text = Dataset.from_dict({"text": ["words"] * 4})
    said = "_dataset has no input_ids, only text; expected rows with input_ids"
    with pytest.raises(ValueError, match=f"train{said}"):
        build(tmp_path, train_dataset=text)
    with pytest.raises(ValueError, match=f"eval{said}"):
        build(tmp_path, eval_dataset={"held out": text})

    def collate(batch: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[5 + len(row["text"])] * 12 for row in batch])
        return {"input_ids": ids, "labels": ids}

    # A collator that is left the text makes tokens of it.
    kept = {"remove_unused_columns": False}
    build(tmp_path, fields=kept, train_dataset=text, data_collator=collate).train()


def test_a_loss_of_the_user_s_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func was given, which has no effect"):
        build(tmp_path, compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.loss)
    check_options(arguments(tmp_path), {"compute_loss_func": None, "train_dataset": rows(1)})


def test_metrics_of_the_user_s_own_see_the_mixed_prediction(tmp_path):
    model, data = small_model(), rows(5)
    seen: list[Any] = []

    def accuracy(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"accuracy": float((prediction.predictions == prediction.label_ids[:, 1:]).mean())}

    run = build(
        tmp_path,
        model=model,
        fields={"include_for_metrics": ["inputs", "loss"], "per_device_eval_batch_size": 2},
        eval_dataset=data,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits[:, :-1].argmax(-1),
    )
    found = run.evaluate()
    ids = torch.stack([row["input_ids"] for row in data])
    with torch.no_grad():
        expected = model.eval()(ids).logits[:, :-1].argmax(-1)
    (prediction,) = seen
    assert np.array_equal(prediction.predictions, expected.numpy())
    assert np.array_equal(prediction.inputs, ids.numpy()) and len(prediction.losses) == 5
    assert found["eval_accuracy"] == pytest.approx(float((expected == ids[:, 1:]).float().mean()))
    assert found["eval_base_loss"] > 0 and found["eval_loss"] > 0


def test_metrics_batch_by_batch(tmp_path):
    calls: list[bool] = []

    def count(prediction: Any, compute_result: bool) -> dict[str, float]:
        calls.append(compute_result)
        return {"batches": float(len(calls))} if compute_result else {}

    fields = {"batch_eval_metrics": True, "per_device_eval_batch_size": 2}
    run = build(tmp_path, fields=fields, eval_dataset=rows(6), compute_metrics=count)
    assert run.evaluate()["eval_batches"] == 3 and calls == [False, False, True]


def test_predictions(tmp_path):
    model, data = small_model(), rows(6)
    run = build(tmp_path, model=model, fields={"eval_accumulation_steps": 1})
    found = run.predict(data)
    ids = torch.stack([row["input_ids"] for row in data])
    with torch.no_grad():
        expected = model.eval()(ids).logits
    torch.testing.assert_close(torch.from_numpy(found.predictions), expected, rtol=1e-4, atol=1e-5)
    assert found.metrics["test_loss"] > 0 and np.array_equal(found.label_ids, ids.numpy())
    unlabelled = run.predict([{"input_ids": row["input_ids"]} for row in data])
    assert np.array_equal(unlabelled.predictions, found.predictions) and unlabelled.label_ids is None
    run.args.prediction_loss_only = True
    assert run.predict(data).predictions is None


@pytest.mark.parametrize("accumulated", [1, 2])
def test_rows_without_labels(tmp_path, accumulated: int):
    data = [{"input_ids": row["input_ids"]} for row in rows(8)]
    said = "the batch has no labels, only input_ids, attention_mask; expected input_ids and labels"
    run = build(
        tmp_path,
        fields={"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": 2},
        train_dataset=data,
        eval_dataset=data,
    )
    for call in (run.train, run.evaluate):
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(ValueError, match="has no input_ids, nor another column"):
        build(tmp_path, train_dataset=[{"text": "words"}] * 4).train()
    # The usual collator for text makes labels of them.
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token or "<|endthought|>"
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    build(tmp_path, train_dataset=data, data_collator=collator).train()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("gpt2", "model is 'gpt2'; expected a model, e.g. QuietStarForCausalLM.from_pretrained"),
        (Path("runs/a"), "model is 'runs/a'; expected a model"),
        (tiny_decoder("llama"), "LlamaForCausalLM; .* decoder with QuietStarForCausalLM.from_base"),
        (torch.nn.Linear(2, 2), "model is a Linear; expected a Quiet-STaR model"),
    ],
)  # fmt: skip
def test_what_is_no_thinking_model(tmp_path, model: Any, said: str):
    with pytest.raises(TypeError, match=said):
        build(tmp_path, model=model)
    with pytest.raises(TypeError, match=said):
        build(tmp_path, model=None, model_init=lambda: model)


def test_a_model_made_anew_for_every_training(tmp_path):
    run = build(tmp_path, model=None, model_init=lambda: small_model(reward="information-gain"))
    for _ in range(2):
        before, copy = run.model, run.ema
        run.train()
        assert run.model is not before and run.ema is not copy and run.state.global_step == 2


def test_a_search_for_hyperparameters_sets_what_thoughts_add(tmp_path):
    run = build(tmp_path)
    assert run.policy_clipper is None
    # As transformers does before every trial.
    run.args.policy_max_grad_norm, run.args.max_skipped_steps = 0.5, 3
    run.state.is_hyper_param_search = True
    run.callback_handler.on_train_begin(run.args, run.state, run.control)
    assert run.policy_clipper is not None and run.policy_clipper.max_norm == 0.5
    assert run.guard.limit == 3


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from rows(4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train_dataset": []}, "train_dataset is empty"),
        ({"train_dataset": "wikitext"}, "train_dataset is 'wikitext'; expected rows"),
        ({"train_dataset": {"train": 1, "test": 2}}, "train_dataset is a dict of train, test"),
        ({"eval_dataset": {"a": rows(1), "b": []}}, "eval_dataset is empty"),
        ({"train_dataset": Endless(), "fields": {"max_steps": -1}}, "max_steps has to be specified"),
    ],
)  # fmt: skip
def test_data_sets_that_are_none(tmp_path, given: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        build(tmp_path, **given)


def test_training_needs_rows(tmp_path):
    with pytest.raises(ValueError, match="requires a train_dataset"):
        build(tmp_path, train_dataset=None).train()
    build(tmp_path, train_dataset=Endless()).train()


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "comet_ml"])
def test_a_logger_that_is_not_installed(tmp_path, name: str):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ValueError, match=f"report_to is '{name}', which is not installed: pip install"):
        build(tmp_path, fields={"report_to": name})


def test_order_and_batch_size_are_the_trainer_s_own(tmp_path):
    def first_rows(**fields: Any) -> list[list[int]]:
        torch.manual_seed(1)
        run = build(tmp_path, fields=fields)
        return next(iter(run.get_train_dataloader()))["input_ids"].tolist()

    assert first_rows(data_seed=3) == first_rows(data_seed=3) != first_rows(data_seed=4)
    torch.manual_seed(1)
    small_model()
    assert first_rows(train_sampling_strategy="sequential") != first_rows(data_seed=3)


@pytest.mark.slow
def test_a_batch_size_that_fits_is_found(tmp_path, monkeypatch):
    fields = {"auto_find_batch_size": True, "per_device_train_batch_size": 4}
    run = build(tmp_path, fields={**fields, "include_num_input_tokens_seen": "all"})
    forward, sizes = type(run.model).forward, []

    def limited(self: Any, input_ids: torch.Tensor, **more: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise RuntimeError("CUDA out of memory.")
        return forward(self, input_ids, **more)

    monkeypatch.setattr(type(run.model), "forward", limited)
    run.train()
    assert sizes[0] == 4 and set(sizes[-2:]) <= {1, 2} and run.state.global_step == 2
    assert run.state.num_input_tokens_seen == sum(sizes[-2:]) * 10


def test_arguments_from_a_command_line(tmp_path):
    stages = [{"steps": 2, "thought_length": 3}, {"thought_length": 1}]
    words = ["--output_dir", str(tmp_path), "--policy_max_grad_norm", "0.5", "--max_skipped_steps", "3"]
    words += ["--thought_schedule", '[{"steps": 2, "thought_length": 3}, {"thought_length": 1}]']
    parser = HfArgumentParser(QuietStarArguments)
    (args,) = parser.parse_args_into_dataclasses([*words, "--ema_decay=0.9", "--use_cpu"])
    assert args.thought_schedule == stages
    assert (args.policy_max_grad_norm, args.max_skipped_steps, args.ema_decay) == (0.5, 3, 0.9)
    (same,) = parser.parse_dict({"output_dir": str(tmp_path), "thought_schedule": stages})
    assert same.thought_schedule == stages
    (plain,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert plain.thought_schedule is None and plain.policy_max_grad_norm is None
    QuietStarTrainer(model=small_model(), args=args, train_dataset=rows(2))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"thought_schedule": "[{steps: 2}]"}, r"thought_schedule is '\[\{steps: 2\}\]'; expected JSON"),
        ({"thought_schedule": '{"steps": 2}'}, "thought_schedule is .* expected a list of stages"),
        ({"policy_max_grad_norm": "much"}, "policy_max_grad_norm is 'much'; expected a number or null"),
        ({"max_skipped_steps": 1.5}, "max_skipped_steps is 1.5; expected a whole number"),
    ],
)
def test_arguments_that_cannot_be_read(tmp_path, fields: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        build(tmp_path, fields=fields)


def test_transformers_own_arguments_do_as_well(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=1)
    QuietStarTrainer(small_model(), args, None, rows(8)).train()
    run = trainer(tmp_path, small_model(), rows(8), bf16_full_eval=True)
    assert run.evaluate()["eval_loss"] > 0
