"""What QuietStarTrainer refuses before training: a model, an option or a data set that it cannot use.

Every option of transformers' Trainer either has its effect on training with thoughts or stands in the
tables here. (What cannot be told before the devices are known is in
:mod:`quietstar.training.global_batch`.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from quietstar.config import QuietStarConfig
from quietstar.optional_packages import check_loggers

_OWN_LOSS = "the loss is the thoughts' own (QuietStarConfig sets its terms and weights)"
# Arguments of TrainingArguments: the values that are taken, and why no others.
_ARGUMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0.0,), _OWN_LOSS),
    "label_names": ((None, ["labels"]), "the model takes its targets from labels"),
    "use_liger_kernel": ((False,), "thoughts have fused kernels of their own"),
    "liger_kernel_config": ((None,), "thoughts have fused kernels of their own"),
}
# Parameters of Trainer itself.
_PARAMETERS = {"compute_loss_func": _OWN_LOSS}


def check_model(model: Any) -> None:
    """Refuse what is no Quiet-STaR model (adapters around one are fine).

    Raises:
        TypeError: says how to get one.
    """
    if isinstance(model, str | Path):
        raise TypeError(
            f"model is {str(model)!r}; expected a model, e.g. QuietStarForCausalLM.from_pretrained of it"
        )
    if not isinstance(getattr(model, "config", None), QuietStarConfig):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a Quiet-STaR model: wrap a decoder with"
            " QuietStarForCausalLM.from_base"
        )


def check_options(args: TrainingArguments | None, given: Mapping[str, Any]) -> None:
    """Refuse options without an effect, loggers that are not installed, and data that are none.

    Args:
        given: the arguments of Trainer by name.

    Raises:
        ValueError: names the first of them.
    """
    for name, why in _PARAMETERS.items():
        if given.get(name) is not None:
            raise ValueError(f"{name} was given, which has no effect: {why}; expected None")
    for name, (taken, why) in _ARGUMENTS.items():
        value = getattr(args, name, taken[0])
        if value not in taken:
            raise ValueError(f"{name} is {value!r}, which has no effect: {why}; expected {taken[0]!r}")
    check_loggers(getattr(args, "report_to", None) or [])
    _check_rows("train_dataset", given.get("train_dataset"))
    evaluation = given.get("eval_dataset")
    for part in evaluation.values() if isinstance(evaluation, dict) else [evaluation]:
        _check_rows("eval_dataset", part)


def _check_rows(name: str, rows: Any) -> None:
    if isinstance(rows, str | Path):
        raise ValueError(f"{name} is {str(rows)!r}; expected rows with input_ids and labels")
    if isinstance(rows, Mapping):
        raise ValueError(
            f"{name} is a {type(rows).__name__} of {', '.join(map(str, rows)) or 'nothing'}; expected"
            " one data set: at each index a row, with input_ids and labels"
        )
    if isinstance(rows, Sized) and not len(rows):
        raise ValueError(f"{name} is empty; expected rows with input_ids and labels")


def check_batch(batch: Mapping[str, Any]) -> None:
    """Refuse a batch that nothing can be learnt from.

    Raises:
        ValueError: names what is missing, and what there is.
    """
    for name in ("input_ids", "labels"):
        if batch.get(name) is None:
            found = ", ".join(str(key) for key, value in batch.items() if value is not None)
            raise ValueError(
                f"the batch has no {name}, only {found or 'nothing'}; expected input_ids and labels (for"
                " plain text a copy of input_ids, -100 where a token does not count)"
            )
