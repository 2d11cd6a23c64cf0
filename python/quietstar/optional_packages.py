"""Optional packages that training arguments call for: asked for before anything is built."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from quietstar.errors import UserError, blaming

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Of loggers: how transformers asks for those that it calls otherwise there, and what pip calls them.
ASKED_AS = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
PIP_NAMES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "flyte": "flytekit"}


def check_packages(args: TrainingArguments) -> None:
    """Raise :class:`UserError` for a logger, optimizer or scheduler that is not to be had here."""
    check_loggers(args.report_to, "training.report_to")
    _check_optimizer(args)


def check_loggers(names: Iterable[str], argument: str = "report_to") -> None:
    """Raise :class:`UserError` for a logger that is unknown or not installed.

    Args:
        argument: what to call the names in the error.
    """
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in known:
            raise UserError(f"{argument} is {name!r}; expected one of {', '.join(sorted(known))}")
        is_there = getattr(integration_utils, f"is_{ASKED_AS.get(name, name)}_available", None)
        if is_there is not None and not is_there():
            raise UserError(
                f"{argument} is {name!r}, which is not installed: pip install"
                f" {PIP_NAMES.get(name, name)}"
            )


def _check_optimizer(args: TrainingArguments) -> None:
    from transformers import Trainer, get_scheduler

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
