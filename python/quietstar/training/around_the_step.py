"""What happens around the optimiser's step, where the training loop gives callbacks their turn.

Before a step the schedule sets the configuration; between backward pass and optimiser the gradients are
put together and looked at; behind it the averaged copy follows, and nothing poisoned is saved.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from quietstar.checkpoints.save import saved_count
from quietstar.thinking.fused_layers import fuse_layers
from quietstar.training.options import decoder_of

if TYPE_CHECKING:
    from quietstar.training.trainer import QuietStarTrainer

logger = logging.getLogger("quietstar")


class AroundTheStep(TrainerCallback):
    """Calls the trainer's parts where the training loop gives callbacks their turn."""

    def __init__(self, trainer: QuietStarTrainer):
        self._trainer = trainer
        self._skipped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run counts on; the copy begins with the training, whatever its first step is."""
        trainer = self._trainer
        if args.use_liger_kernel:
            fuse_layers(decoder_of(trainer.own_model), "liger")
        trainer.missing_targets.begin(state)
        if state.is_hyper_param_search:
            trainer.build_parts()
        trainer.guard.skipped = saved_count(state, "skipped_steps")
        trainer.guard.in_a_row = saved_count(state, "skipped_in_a_row")
        if trainer.ema is None:
            trainer.ema = trainer.build_copy()
        self._say_stage(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        schedule = self._trainer.schedule
        if schedule is not None and schedule.apply(self._trainer.thought_config, state.global_step):
            self._say_stage(state.global_step)

    def _say_stage(self, step: int) -> None:
        if self._trainer.schedule is not None and self._trainer.is_world_process_zero():
            logger.info(self._trainer.schedule.describe(step))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        parameters = trainer.trained_parameters()
        if not trainer.global_batch.has_target:
            # Skipped as well, but no fault.
            for parameter in parameters:
                parameter.grad = None
            self._skipped = True
            return
        if trainer.policy_clipper is not None:
            trainer.policy_clipper.merge()
        scaler = getattr(trainer.accelerator, "scaler", None)
        several = trainer.accelerator.num_processes > 1
        self._skipped = trainer.guard.skips(
            parameters,
            state.global_step + 1,
            add_up=trainer.add_up_over_processes if several else lambda tensor: tensor,
            scale=None if scaler is None else float(scaler.get_scale()),
            # DeepSpeed's backward pass has made the step, or left it out, by now.
            already=trainer.is_deepspeed_enabled and not trainer.model_wrapped.was_step_applied(),
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        skipped = self._skipped or trainer.accelerator.optimizer_step_was_skipped
        if trainer.ema is not None and not skipped:
            trainer.ema.update(trainer.own_model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if trainer.checkpoints.retry_is_due(state.global_step):
            control.should_save = True
        self._check_before_saving(state, control)

    def _check_before_saving(self, state: Any, control: Any) -> None:
        if control.should_save:
            parameters = self._trainer.trained_parameters()
            self._trainer.guard.check_before_saving(parameters, state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Of the whole training: a resumed run has perhaps learnt before.
        self._trainer.missing_targets.check_some(state.global_step)
        self._check_before_saving(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.missing_targets.end(state.global_step)
