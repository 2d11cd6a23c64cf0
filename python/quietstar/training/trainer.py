"""Training: transformers' Trainer with what thoughts add to its step, its log and its safety.

:class:`QuietStarTrainer` is the one place where methods of Trainer are overridden. What it does at them
is done by parts that know nothing of a Trainer:

- :class:`~quietstar.training.global_batch.GlobalBatch`: which share of a step's batch the model sees,
- :class:`~quietstar.training.global_batch.MissingTargets`: steps and rows with nothing to learn from,
- :class:`~quietstar.training.schedule.Schedule`: settings that change while training goes on,
- :class:`~quietstar.training.ema.EmaCopy`: the averaged copy that a reward measures against,
- :class:`~quietstar.training.clipping.PolicyClipper`: the policy's gradient, clipped apart,
- :class:`~quietstar.training.guard.NonFiniteGuard`: steps that are skipped if they are not finite,
- :class:`~quietstar.checkpoints.save.CheckpointWriter`: checkpoints that are there whole or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import TrainOutput

from quietstar.checkpoints import state as training_state
from quietstar.checkpoints.folder import refuse_pickles, rotate, sweep
from quietstar.checkpoints.save import COUNTS, CheckpointWriter, checkpoint_to_resume
from quietstar.checkpoints.weights import full_weights, load_full_weights, without_embeddings
from quietstar.config import QuietStarConfig
from quietstar.data.collator import PaddingCollator, collator_for
from quietstar.modeling.meta_tokens import check_tokenizer
from quietstar.thinking.batch_share import BatchShard
from quietstar.thinking.documents import DESCRIPTIONS
from quietstar.thinking.fsdp2 import put_shards_back
from quietstar.thinking.fused_layers import unfused_for
from quietstar.training import options
from quietstar.training.arguments import argument
from quietstar.training.around_the_step import AroundTheStep
from quietstar.training.clipping import PolicyClipper
from quietstar.training.ema import EmaCopy, asks_for_copy
from quietstar.training.global_batch import GlobalBatch, MissingTargets
from quietstar.training.guard import NonFiniteGuard, NonFiniteLoss
from quietstar.training.metrics import ThoughtMetrics, Watch
from quietstar.training.row_parts import in_parts
from quietstar.training.schedule import Schedule, longest_talk

__all__ = ["NonFiniteLoss", "QuietStarTrainer"]


class QuietStarTrainer(Trainer):
    """Trains a :class:`~quietstar.QuietStarForCausalLM`.

    Everything is the Trainer's own (accelerate, logging, checkpoints, resuming); added are the parts
    that :class:`~quietstar.training.arguments.QuietStarArguments` set, metrics of thinking in the log,
    and warnings with a remedy where training is known to go wrong.

    Rows of different lengths are padded unless a ``data_collator`` is given
    (:class:`~quietstar.data.collator.PaddingCollator`). Options that would have no effect on training
    with thoughts are rejected (:mod:`quietstar.training.options`).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        given = inspect.signature(Trainer.__init__).bind(self, *args, **kwargs).arguments
        if given.get("model") is not None:
            options.check_model(given["model"])
        options.check_options(given.get("args"), given)
        super().__init__(*args, **kwargs)
        options.check_parallelism(self)
        self.ema: EmaCopy | None = None
        self.build_parts()
        options.check_gradients(self, asks_for_copy(self.thought_config, self.schedule))
        self.missing_targets = MissingTargets(speaks=self.is_world_process_zero())
        self.without_targets = self.missing_targets.counts
        self.metrics = ThoughtMetrics(self.add_up_over_processes)
        self._evaluates, self._watch = True, Watch()
        self.warnings_given: list[str] = []
        self._random_state_from: str | None = None
        if given.get("data_collator") is None:
            self.data_collator = self._padding_collator()
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            check_tokenizer(self.processing_class, self.thought_config)
        self.add_callback(AroundTheStep(self))

    def build_parts(self) -> None:
        """Build what the arguments say; again in a search for hyperparameters, which changes them."""
        stages = argument(self.args, "thought_schedule")
        self.schedule = None if stages is None else Schedule(stages, self.thought_config)
        if self.schedule is not None:
            self.schedule.apply(self.thought_config, 0)
        max_norm = argument(self.args, "policy_max_grad_norm")
        self.policy_clipper = None if max_norm is None else PolicyClipper(max_norm)
        if max_norm is not None:
            why = "policy_max_grad_norm is set", "through which one backward pass can go, not two"
            unfused_for(options.decoder_of(self.own_model), *why, self.args.use_liger_kernel)
        self.guard = NonFiniteGuard(argument(self.args, "max_skipped_steps"))
        self.global_batch = GlobalBatch(self.accelerator, self.args)
        self.checkpoints = CheckpointWriter(self.accelerator, self.args.should_save)

    def _padding_collator(self) -> PaddingCollator:
        """Pads at the side, and with the token, of the tokenizer if there is one."""
        config, tokenizer = self.thought_config, self.processing_class
        talk = longest_talk(config, {"thought_schedule": argument(self.args, "thought_schedule")})
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            return PaddingCollator(min_length=talk + 2)
        return collator_for(tokenizer, tokenizer.padding_side, talk + 2)

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As transformers', for Quiet-STaR models alone."""
        self.ema = None  # of the model before
        model = super().call_model_init(*args, **kwargs)
        options.check_model(model)
        return model

    def _set_signature_columns_if_needed(self) -> None:
        """Rows may have what describes their documents, which forward takes without naming it."""
        super()._set_signature_columns_if_needed()
        self._signature_columns += [n for n in DESCRIPTIONS if n not in self._signature_columns]

    @property
    def own_model(self) -> Any:
        """The model, or adapters around it, without what distributes it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def thought_config(self) -> QuietStarConfig:
        config: QuietStarConfig = self.own_model.config
        return config

    def build_copy(self) -> EmaCopy | None:
        """The averaged copy, if any step of the training asks for it."""
        asked = asks_for_copy(self.thought_config, self.schedule)
        return EmaCopy(self.own_model, argument(self.args, "ema_decay")) if asked else None

    # ---- the training and its steps -----------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Sweep up what an interrupted save has left, then train.

        The mean loss is over the steps that have a target.
        """
        if self.args.should_save:
            sweep(Path(self.args.output_dir))
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        skips, workers = self.args.ignore_data_skip, self.args.dataloader_num_workers
        # A streamed data set that is at its place has nothing to skip.
        seeks = training_state.seek_data(checkpoint, self.train_dataset, workers)
        self.args.ignore_data_skip = skips or seeks
        self._random_state_from = str(checkpoint) if seeks else None
        try:
            result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            self.args.ignore_data_skip = skips
        if isinstance(result, TrainOutput):
            return result._replace(training_loss=result.metrics["train_loss"])
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that was interrupted behind its last step would train one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self._random_state_from is not None:  # opening the loader has drawn a random number
            self._load_rng_state(self._random_state_from)
            self._random_state_from = None
        self.global_batch.start(batches, self.state.global_step)
        return batches, count

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch, unless the whole step has no target: forward, one or two backward passes."""
        batch, clipper = self.global_batch, self.policy_clipper
        loss, rows = torch.zeros((), device=self.args.device), argument(self.args, "rows_per_backward")
        if batch.at_its_start:
            self.missing_targets.add_step(self.state.global_step + 1, batch, self.thought_config)
        last = self.accelerator.sync_gradients
        with clipper.micro_batch(model, last) if clipper is not None else contextlib.nullcontext():
            # A gradient scaler has to see gradients; they are zero, and dropped before the step.
            if batch.has_target or getattr(self.accelerator, "scaler", None) is not None:
                for part in in_parts(self, model, inputs, rows):
                    loss += super().training_step(model, part, *args, **kwargs)
            else:
                batch.skip()
        if clipper is not None:
            loss = clipper.whole_loss(loss)
        self.guard.saw(loss)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss while training; its language-model part alone in evaluation."""
        options.check_batch(inputs)
        training, batch = model.training, self.global_batch
        share = batch.next_share(self.thought_config) if training else BatchShard()
        output = self.run_model(model, {**inputs, "batch_part": share})
        if not training or batch.has_target:
            self.metrics.add(output, training, batch.fraction)
        loss = output.nll_loss
        if training:
            self.metrics.count_tokens(inputs)
            loss = self._loss_to_send_back(output)
        return (loss, output) if return_outputs else loss

    def run_model(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """The model's output, given the averaged copy's losses if the reward wants them."""
        # Before training the copy is the model itself, which the model knows to use.
        if self.ema is not None and asks_for_copy(self.thought_config):
            losses = self.ema.base_losses(model, self.own_model, inputs)
            inputs = {**inputs, "baseline_losses": losses}
        return model(**inputs)

    def _loss_to_send_back(self, output: Any) -> Tensor:
        """The loss for the Trainer's backward pass; one that is clipped apart has had its own."""
        loss: Tensor = output.loss
        if self.policy_clipper is not None and output.thinking_loss is not None:
            default = self.args.gradient_accumulation_steps
            micro_batches = getattr(self, "current_gradient_accumulation_steps", default)
            run = functools.partial(self.accelerator.backward, retain_graph=True)
            self.policy_clipper.backward(output.thinking_loss / micro_batches, run)
            loss = output.language_loss
        return loss

    def trained_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model_wrapped.parameters() if p.requires_grad]

    def add_up_over_processes(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor.to(self.args.device), reduction="sum")

    # ---- log and evaluation -------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what thinking did since the last entry."""
        if "loss" in logs:
            logs.update(self.metrics.of_training())
            logs["skipped_steps"] = self.guard.skipped
            if self.policy_clipper is not None:
                logs.update(self.policy_clipper.logs())
            if self.schedule is not None:
                logs["stage"] = self.schedule.stage(max(self.state.global_step - 1, 0)) + 1
            logs.update(self.without_targets)
            config = self.thought_config
            if config.thinks:
                # Clipped apart, the policy term cannot crowd out the other.
                clip = 0.0 if self.policy_clipper is not None else self.args.max_grad_norm or 0.0
                self.warnings_given += self._watch.look(logs, config.policy_weight, clip)
        self.missing_targets.correct_losses(logs)
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
        self.metrics.begin_evaluation()
        self._evaluates = description != "Prediction"
        result = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        self.metrics.add_to_evaluation(
            result.metrics, metric_key_prefix, self.thought_config, self._evaluates
        )
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
            options.check_batch(inputs)
            loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        if prediction_loss_only:
            return loss, None, None
        inputs = self._prepare_inputs(inputs)
        text = options.without_targets(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits: Tensor = model(**text).logits
        return loss, logits, inputs.get("labels")

    # ---- checkpoints --------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers', but whole or not at all; a save that fails is tried again later."""
        run = Path(self._get_output_dir(trial))
        if trial is None:
            self.store_flos()
        parts: list[Callable[[str], None]] = [functools.partial(self.save_model, _internal_call=True)]
        if not self.args.save_only_model:
            parts += [self._save_optimizer_and_scheduler, self._save_position]
        stateful = [*self.callback_handler.callbacks, self.control]
        counts = {"skipped_steps": self.guard.skipped, "skipped_in_a_row": self.guard.in_a_row}
        counts |= self.without_targets
        checkpoint = self.checkpoints.write(run, self.state, parts, stateful, counts)
        if checkpoint is None:
            return
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers', but whole under FSDP whatever its state dict type is."""
        if self.is_fsdp_enabled:
            self._save(output_dir, state_dict=full_weights(self.model, keep=self.args.should_save))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with without_embeddings(self.model):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            if hasattr(self.own_model, "peft_config"):
                self.thought_config.save_pretrained(str(folder))
            # Pickled, never read by anything here, and the recipe says all of it.
            (folder / "training_args.bin").unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        refuse_pickles(Path(resume_from_checkpoint))
        if self.is_fsdp_enabled:
            load_full_weights(Path(resume_from_checkpoint), self.model if model is None else model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        super()._issue_warnings_after_load(training_state.without_tied(self.model, load_result))

    def _optimizer_parts(self) -> tuple[Any, Any, dict[nn.Parameter, str]]:
        """The optimiser itself, its schedule, and the names of the model's parameters."""
        put_shards_back(model := self.own_model)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer, self.lr_scheduler, training_state.parameter_names(model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            own = (*self._optimizer_parts(), self.args.should_save)
            training_state.save_optimizer(Path(output_dir), *own)
        if self.ema is not None:
            self.ema.save(output_dir, write=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            refuse_pickles(Path(checkpoint))
            training_state.load_optimizer(Path(checkpoint), *self._optimizer_parts())
        if checkpoint is not None and (copy := self.build_copy()) is not None:
            copy.load(checkpoint)
            self.ema = copy

    def _save_position(self, output_dir: str) -> None:
        """Everything else that a resumed run needs."""
        folder, args = Path(output_dir), self.args
        training_state.save_random_states(folder, args.should_save)
        if args.should_save:
            training_state.save_scaler(folder, getattr(self.accelerator, "scaler", None))
            rows = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
            rows *= self.state.global_step
            workers = args.dataloader_num_workers
            training_state.save_data_position(folder, self.train_dataset, rows, workers)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            training_state.load_scaler(Path(checkpoint), getattr(self.accelerator, "scaler", None))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            training_state.load_random_state(Path(checkpoint), self.args.process_index)

    def _load_callback_state(self) -> None:
        # transformers would look for a callback of the counts' name.
        counts = self.state.stateful_callbacks.pop(COUNTS, None)
        super()._load_callback_state()
        if counts is not None:
            self.state.stateful_callbacks[COUNTS] = counts
