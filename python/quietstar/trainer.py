"""Training: transformers' Trainer with what thoughts add to its log and its safety."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from .batches import WholeBatches
from .metrics import Average, Watch, describe
from .tokens import check_tokenizer


class NonFiniteLoss(RuntimeError):
    """Training met a loss or gradient that is not a number; nothing was saved after it."""


class QuietStarTrainer(WholeBatches):
    """Trains a :class:`~quietstar.QuietStarForCausalLM`.

    Everything is the Trainer's own (accelerate, logging, checkpoints, resuming); added are the
    metrics of thinking (base and talk losses, gain, reward, share of positive advantages, mixing
    weight on hard and easy tokens, entropy of thoughts, tokens per second), warnings with a remedy
    where training is known to go wrong, and a stop at the first loss that is not finite.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        tokenizer = self.processing_class
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            check_tokenizer(tokenizer, self._thought_config())
        self._averages = {True: Average(), False: Average()}
        self._tokens = 0
        self._last_log = time.perf_counter()
        self._watch = Watch()
        self.warnings_given: list[str] = []
        self.add_callback(_StopAtNonFiniteGradient())

    def _thought_config(self) -> Any:
        return self.accelerator.unwrap_model(self.model).config

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss while training; its language-model part alone in evaluation."""
        if model.training:
            inputs = {**inputs, "batch_part": self.next_batch_part(self._thought_config())}
        output = model(**inputs)
        self._averages[model.training].add(describe(output))
        if model.training:
            self._tokens += inputs["input_ids"].numel()
        loss = output.loss if model.training else output.nll_loss
        return (loss, output) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One step; stops at a loss that is not finite, before the optimiser sees it."""
        loss = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            _stop("loss", self.state.global_step + 1)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what thinking did since the last entry."""
        if "loss" in logs:
            logs.update(self._averages[True].pop(self._reduce))
            now = time.perf_counter()
            logs["tokens_per_second"] = self._tokens / max(now - self._last_log, 1e-9)
            self._tokens, self._last_log = 0, now
            config = self._thought_config()
            if config.thinks:
                clip = self.args.max_grad_norm or 0.0
                self.warnings_given += self._watch.look(logs, config.policy_weight, clip)
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Losses only (logits would be rows x vocabulary), with the metrics of thinking beside them."""
        self._averages[False].pop(self._reduce)
        result = super().evaluation_loop(
            dataloader,
            description,
            prediction_loss_only=True,
            ignore_keys=ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )
        for name, value in self._averages[False].pop(self._reduce).items():
            result.metrics[f"{metric_key_prefix}_{name}"] = value
        return result

    def _reduce(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")


class _StopAtNonFiniteGradient(TrainerCallback):
    """A finite loss can still have a gradient that is not; it must not reach weights or a checkpoint."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if gradients and not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
            _stop("gradient", state.global_step + 1)


def _stop(what: str, step: int) -> None:
    raise NonFiniteLoss(
        f"the {what} at step {step} is not finite; training stopped and the last checkpoint is kept"
        " (try a lower learning rate or policy_weight)"
    )
