"""Training: transformers' Trainer with what thoughts add to its log and its safety."""

from __future__ import annotations

import inspect
import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer

from quietstar.checkpoints.save import SafeCheckpoints
from quietstar.data.collator import PaddingCollator, collator_for
from quietstar.modeling.meta_tokens import check_tokenizer
from quietstar.thinking.batch_share import BatchShard
from quietstar.training.arguments import argument
from quietstar.training.global_batch import WholeBatches
from quietstar.training.guard import NonFiniteLoss
from quietstar.training.metrics import Average, Watch, describe, language_model_loss
from quietstar.training.objective import ObjectiveTrainer
from quietstar.training.options import check_batch, check_model, check_options
from quietstar.training.schedule import longest_talk

__all__ = ["NonFiniteLoss", "QuietStarTrainer"]


class QuietStarTrainer(ObjectiveTrainer, WholeBatches, SafeCheckpoints):
    """Trains a :class:`~quietstar.QuietStarForCausalLM`.

    Everything is the Trainer's own (accelerate, logging, checkpoints, resuming); added are the
    metrics of thinking (base and talk losses, gain, reward, share of positive advantages, mixing
    weight on hard and easy tokens, entropy of thoughts, tokens per second), warnings with a remedy
    where training is known to go wrong, and what the objectives need: two clipped gradients, an averaged
    copy, a schedule, steps that are skipped if they are not finite
    (:class:`~quietstar.training.arguments.QuietStarArguments`).

    Rows of different lengths are padded unless a ``data_collator`` is given
    (:class:`~quietstar.data.collator.PaddingCollator`). Options that would have no effect on training
    with thoughts are refused (:mod:`quietstar.training.options`).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        given = inspect.signature(Trainer.__init__).bind(self, *args, **kwargs).arguments
        if given.get("model") is not None:
            check_model(given["model"])
        check_options(given.get("args"), given)
        super().__init__(*args, **kwargs)
        tokenizer = self.processing_class
        if given.get("data_collator") is None:
            self.data_collator = self._padding_collator()
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            check_tokenizer(tokenizer, self._thought_config())
        self._averages = {True: Average(), False: Average()}
        self._evaluates = True
        self._tokens: Tensor | int = 0
        self._last_log = time.perf_counter()
        self._watch = Watch()
        self.warnings_given: list[str] = []

    def _padding_collator(self) -> PaddingCollator:
        """Pads at the side, and with the token, of the tokenizer if there is one."""
        config, tokenizer = self._thought_config(), self.processing_class
        talk = longest_talk(config, {"thought_schedule": argument(self.args, "thought_schedule")})
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            return PaddingCollator(min_length=talk + 2)
        return collator_for(tokenizer, tokenizer.padding_side, talk + 2)

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As transformers', for Quiet-STaR models alone."""
        model = super().call_model_init(*args, **kwargs)
        self.ema = None  # of the model before
        check_model(model)
        return model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss while training; its language-model part alone in evaluation."""
        check_batch(inputs)
        config = self._thought_config()
        part = self.next_batch_part(config) if model.training else BatchShard()
        output = self.run_model(model, {**inputs, "batch_part": part})
        if not model.training or self._has_target:
            self._averages[model.training].add(describe(output))
        if model.training:
            mask = inputs.get("attention_mask")
            self._tokens += inputs["input_ids"].numel() if mask is None else (mask != 0).sum()
        loss = self.loss_to_send_back(output) if model.training else output.nll_loss
        return (loss, output) if return_outputs else loss

    def settle_gradients(self) -> bool:
        """As the objectives ask; a step without any target is skipped, and is no fault."""
        if self._has_target:
            return super().settle_gradients()
        for parameter in self.trained_parameters():
            parameter.grad = None
        return True

    def counts_to_save(self) -> dict[str, int]:
        """Counts that a resumed run takes up."""
        skips = {"skipped_steps": self.guard.skipped, "skipped_in_a_row": self.guard.in_a_row}
        return {**self.without_targets, **skips}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what thinking did since the last entry."""
        if "loss" in logs:
            logs.update(self._averages[True].pop(self._reduce))
            now = time.perf_counter()
            logs["tokens_per_second"] = int(self._tokens) / max(now - self._last_log, 1e-9)
            self._tokens, self._last_log = 0, now
            logs.update(self.objective_logs())
            logs.update(self.without_targets)
            config = self._thought_config()
            if config.thinks:
                # Clipped apart, the policy term cannot crowd out the other.
                clip = 0.0 if self._policy_gradient else self.args.max_grad_norm or 0.0
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
        """As transformers', with the metrics of thinking beside the loss."""
        self._averages[False].pop(self._reduce)
        self._evaluates = description != "Prediction"
        result = super().evaluation_loop(
            dataloader,
            description,
            prediction_loss_only=prediction_loss_only,
            ignore_keys=ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )
        looked = len(self._averages[False]) > 0
        found = self._averages[False].pop(self._reduce)
        if "base_loss" in found:
            # The mean over all targets, not over batches that have different numbers of them, or none.
            found["loss"] = language_model_loss(self._thought_config(), found)
        elif looked and math.isfinite(result.metrics[f"{metric_key_prefix}_loss"]):
            if not self._evaluates:
                del result.metrics[f"{metric_key_prefix}_loss"]
                return result
            raise ValueError(
                "the evaluation data have no target (labels are all -100 or padding); expected at least"
                " one token to predict"
            )
        for name, value in found.items():
            result.metrics[f"{metric_key_prefix}_{name}"] = value
        return result

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, logits [B, N, vocabulary] of the mixed prediction, and labels.

        The logits are for ``compute_metrics`` and ``predict`` and cost a pass of their own. ``predict``
        takes rows without labels, which have no loss.
        """
        loss = None
        if prediction_loss_only or self._evaluates or inputs.get("labels") is not None:
            check_batch(inputs)
            loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        if prediction_loss_only:
            return loss, None, None
        inputs = self._prepare_inputs(inputs)
        text = {key: value for key, value in inputs.items() if key not in ("labels", "baseline_losses")}
        with torch.no_grad(), self.compute_loss_context_manager():
            logits: Tensor = model(**text).logits
        return loss, logits, inputs.get("labels")
