"""Optional packages that training arguments need: checked before anything is built."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import integration_utils

from quietstar.errors import UserError, blaming
from quietstar.training.csv_log import CsvLog

# transformers' table of loggers, where Trainer looks for those of report_to: with one of ours.
integration_utils.INTEGRATION_TO_CALLBACK.setdefault("csv", CsvLog)
# Loggers whose package has other names: in transformers' question whether it is there, and for pip.
PACKAGES = {
    "azure_ml": ("azureml", "azureml-mlflow"),
    "comet_ml": ("comet", "comet-ml"),
    "flyte": ("flytekit", "flytekit"),
}


def check_packages(args: TrainingArguments) -> None:
    """Raise :class:`UserError` for a logger, optimizer or scheduler that is not installed or unknown."""
    check_loggers(args.report_to, "training.report_to")
    _check_optimizer(args)


def check_loggers(names: Iterable[str], argument: str = "report_to") -> None:
    """Raise :class:`UserError` for a logger that is unknown or not installed.

    Args:
        argument: what to call the names in the error.
    """
    known = integration_utils.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in known:
            raise UserError(f"{argument} is {name!r}; expected one of {', '.join(sorted(known))}")
        package, for_pip = PACKAGES.get(name, (name, name))
        is_installed = getattr(integration_utils, f"is_{package}_available", None)
        if is_installed is not None and not is_installed():
            raise UserError(f"{argument} is {name!r}, which is not installed: pip install {for_pip}")


def _check_optimizer(args: TrainingArguments) -> None:
    what = f"training.optim is {getattr(args.optim, 'value', args.optim)!r}"
    try:
        with blaming(what):
            Trainer.get_optimizer_cls_and_kwargs(args, nn.Linear(1, 1))
    except UserError as error:
        # What is to be trained by layers is not known before there is a model.
        if args.optim_target_modules is None or isinstance(error.__cause__, ImportError):
            raise
    scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    with blaming(f"training.lr_scheduler_type is {scheduler!r}"):
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate),
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
        )
