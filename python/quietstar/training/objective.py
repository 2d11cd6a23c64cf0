"""What the family of objectives asks of a Trainer: schedule, averaged copy, two clips, skipped steps.

All of it acts at a few places of transformers' training loop: before a step the schedule sets the
configuration; the forward pass is given the averaged copy's losses; the thinking loss goes back on its
own; before the optimiser's step the gradients are put together and looked at; after it the copy follows.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from quietstar.checkpoints.save import saved_count
from quietstar.thinking.fsdp2 import put_shards_back
from quietstar.thinking.noise import refusal_of_neftune
from quietstar.training.arguments import argument
from quietstar.training.clipping import PolicyGradient, average_over_processes
from quietstar.training.ema import EmaCopy
from quietstar.training.guard import NonFiniteGuard
from quietstar.training.schedule import Schedule

logger = logging.getLogger("quietstar")


class ObjectiveTrainer(Trainer):
    """The part of :class:`~quietstar.QuietStarTrainer` that serves the objectives."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.read_arguments()
        self._policy_norms: list[Tensor] = []
        self._thinking_loss: Tensor | None = None
        self._parameters: list[nn.Parameter] = []
        self.ema: EmaCopy | None = None
        self._check_strategy()
        self.add_callback(_AroundTheStep(self))

    def read_arguments(self) -> None:
        """Make what the arguments say; again in a search for hyperparameters, which changes them."""
        config = self._thought_config()
        stages = argument(self.args, "thought_schedule")
        self.schedule = None if stages is None else Schedule(stages, config)
        if self.schedule is not None:
            self.schedule.apply(config, 0)
        max_norm = argument(self.args, "policy_max_grad_norm")
        self._policy_gradient = None if max_norm is None else PolicyGradient(max_norm)
        self.guard = NonFiniteGuard(argument(self.args, "max_skipped_steps"))

    def _thought_config(self) -> Any:
        return self.accelerator.unwrap_model(self.model).config

    def _averages_a_copy(self) -> bool:
        config = self._thought_config()
        return config.reward == "information-gain" and config.thought_kind == "sampled"

    def _averages_at_some_stage(self) -> bool:
        """Whether any step of the training asks for the averaged copy."""
        config = self._thought_config()
        stages = [{}] if self.schedule is None else self.schedule.settings
        kinds = [stage.get("thought_kind", config.thought_kind) for stage in stages]
        return config.reward == "information-gain" and "sampled" in kinds

    def _check_strategy(self) -> None:
        """Refuse what cannot work, before training."""
        alpha = self.args.neftune_noise_alpha
        if alpha:
            raise ValueError(refusal_of_neftune(alpha))
        deepspeed, optim = (
            self.is_deepspeed_enabled,
            str(getattr(self.args.optim, "value", self.args.optim)),
        )
        owner = "DeepSpeed" if deepspeed else optim if "lomo" in optim else None
        if self.args.fp16:
            # The scaler looks at one gradient, and would not lower its scale for the other.
            owner = "fp16 (bf16 works)"
        if owner is not None and self._policy_gradient is not None:
            raise ValueError(
                f"policy_max_grad_norm is {self._policy_gradient.max_norm} with {owner}, which handles"
                " gradients itself; expected null"
            )
        if deepspeed and self._averages_at_some_stage():
            raise ValueError(
                "reward is 'information-gain' with DeepSpeed, which hides the parameters that the"
                " averaged copy follows; expected another reward, DDP or FSDP"
            )

    # ---- one micro-batch ------------------------------------------------------------------------

    def run_model(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """The model's output, given the averaged copy's losses if the reward wants them.

        Raises:
            ValueError: if the rows bring such losses themselves.
        """
        if inputs.get("baseline_losses") is not None:
            raise ValueError(
                "the batch has baseline_losses, but QuietStarTrainer measures against the losses of the"
                " copy that it averages itself; expected rows without that column"
            )
        if self._averages_a_copy():
            inside = self.accelerator.unwrap_model(self.model)
            # Before training the copy is the model itself, which the model knows to use.
            if self.ema is not None:
                losses = self.ema.base_losses(model, inside, inputs)
                inputs = {**inputs, "baseline_losses": losses}
        return model(**inputs)

    def loss_to_send_back(self, output: Any) -> Tensor:
        """The loss for the Trainer's backward pass; the thinking loss's is done here if it is clipped
        apart."""
        own = self._policy_gradient
        if own is None or output.thinking_loss is None:
            loss: Tensor = output.loss
            return loss
        steps = getattr(
            self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps
        )
        self._thinking_loss = output.thinking_loss.detach() / steps
        with torch.autocast(output.loss.device.type, enabled=False):
            own.add(
                self._parameters,
                lambda: self.accelerator.backward(output.thinking_loss / steps, retain_graph=True),
            )
        language: Tensor = output.language_loss
        return language

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; whether its loss is finite is looked at before the optimiser's step."""
        apart = self._policy_gradient
        if apart is not None:
            # Between forward and backward FSDP2 shows gathered parameters, which get no gradient.
            put_shards_back(model)
            self._parameters = [p for p in model.parameters() if p.requires_grad]
        context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if apart is not None and isinstance(model, DistributedDataParallel):
            # DDP would average the gradients of one backward pass only; both are averaged below.
            context = model.no_sync()
        with context:
            loss: Tensor = super().training_step(model, *args, **kwargs)
        if self._thinking_loss is not None:
            loss, self._thinking_loss = loss + self._thinking_loss, None
        ddp = isinstance(model, DistributedDataParallel)
        if apart is not None and ddp and self.accelerator.sync_gradients:
            own = [p.grad for p in model.parameters() if p.grad is not None]
            average_over_processes([*own, *apart.gradients.values()])
        self.guard.saw(loss)
        return loss

    # ---- one step of the optimiser ----------------------------------------------------------------

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimiser moves."""
        return [p for p in self.model_wrapped.parameters() if p.requires_grad]

    def settle_gradients(self) -> bool:
        """Put the two clipped gradients together; True if the step has to be skipped."""
        scaler = getattr(self.accelerator, "scaler", None)
        if self._policy_gradient is not None and self._policy_gradient.gradients:
            self._policy_norms.append(self._policy_gradient.merge())
        several = self.accelerator.num_processes > 1
        return self.guard.skips(
            self.trained_parameters(),
            self.state.global_step + 1,
            add_up=self._reduce if several else lambda tensor: tensor,
            scale=None if scaler is None else float(scaler.get_scale()),
            # DeepSpeed's backward pass has made the step, or left it out, by now.
            already=self.is_deepspeed_enabled and not self.model_wrapped.was_step_applied(),
        )

    def _reduce(self, tensor: Tensor) -> Tensor:
        reduced: Tensor = self.accelerator.reduce(tensor.to(self.args.device), reduction="sum")
        return reduced

    def objective_logs(self) -> dict[str, float]:
        """What these parts say in a log entry."""
        logs: dict[str, float] = {"skipped_steps": self.guard.skipped}
        if self._policy_norms:
            logs["policy_grad_norm"] = float(torch.stack(self._policy_norms).mean())
            self._policy_norms.clear()
        if self.schedule is not None:
            logs["stage"] = self.schedule.stage(max(self.state.global_step - 1, 0)) + 1
        return logs

    # ---- checkpoints --------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.ema is not None:
            self.ema.save(output_dir, write=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._averages_at_some_stage():
            inside = self.accelerator.unwrap_model(self.model)
            self.ema = EmaCopy(inside, argument(self.args, "ema_decay"))
            self.ema.load(checkpoint)


class _AroundTheStep(TrainerCallback):
    """Calls the trainer's parts where the training loop gives callbacks their turn."""

    def __init__(self, trainer: ObjectiveTrainer):
        self._trainer = trainer
        self._skipped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run counts on; the copy begins with the training, whatever its first step is."""
        trainer = self._trainer
        if state.is_hyper_param_search:
            trainer.read_arguments()
        trainer.guard.skipped = saved_count(state, "skipped_steps")
        trainer.guard.in_a_row = saved_count(state, "skipped_in_a_row")
        if trainer.ema is None and trainer._averages_at_some_stage():
            inside = trainer.accelerator.unwrap_model(trainer.model)
            trainer.ema = EmaCopy(inside, argument(args, "ema_decay"))
        self._say_stage(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        schedule = self._trainer.schedule
        if schedule is not None and schedule.apply(self._trainer._thought_config(), state.global_step):
            self._say_stage(state.global_step)

    def _say_stage(self, step: int) -> None:
        if self._trainer.schedule is not None and self._trainer.is_world_process_zero():
            logger.info(self._trainer.schedule.describe(step))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._skipped = self._trainer.settle_gradients()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        skipped = self._skipped or trainer.accelerator.optimizer_step_was_skipped
        if trainer.ema is not None and not skipped:
            trainer.ema.update(trainer.accelerator.unwrap_model(trainer.model))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self._trainer.guard.check_before_saving(
                self._trainer.trained_parameters(), state.global_step
            )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control, **kwargs)
