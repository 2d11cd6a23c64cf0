"""What QuietStarTrainer rejects before training: models, options and data sets that it cannot use.

Every option of transformers' Trainer either has its effect on training with thoughts or stands in the
tables here, or is checked once the devices are known (:func:`check_parallelism`,
:func:`check_gradients`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from quietstar.config import QuietStarConfig
from quietstar.thinking.fused_layers import uses_liger
from quietstar.thinking.noise import refusal_of_neftune
from quietstar.training.arguments import argument
from quietstar.training.optional_packages import check_loggers

logger = logging.getLogger("quietstar")
_OWN_LOSS = "the loss is the thoughts' own (QuietStarConfig sets its terms and weights)"
# Arguments of TrainingArguments: the values that are taken, and why no others.
_ARGUMENTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0.0,), _OWN_LOSS),
    "label_names": ((None, ["labels"]), "the model takes its targets from labels"),
    "liger_kernel_config": ((None,), "use_liger_kernel takes all kernels but the losses"),
}
# Parameters of Trainer itself.
_PARAMETERS = {"compute_loss_func": _OWN_LOSS}


def computes_bf16(device: torch.device | str) -> bool:
    """Whether a device multiplies bfloat16 in hardware; a CPU that does not takes several times longer
    than for float32."""
    if torch.device(device).type != "cpu":
        return True
    found = torch.cpu.get_capabilities()
    return any(value is True for name, value in found.items() if "bf16" in name)


def decoder_of(model: Any) -> PreTrainedModel:
    """The decoder inside a Quiet-STaR model, adapters around it or not."""
    decoder: PreTrainedModel = (model.get_base_model() if hasattr(model, "peft_config") else model).base
    return decoder


def check_model(model: Any) -> None:
    """Reject what is not a Quiet-STaR model (adapters around one are fine).

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
    """Reject options without an effect, loggers that are not installed, and what is not a data set.

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
    # A collator of the user's own may make input_ids of any column that it is left.
    reads_rows = given.get("data_collator") is None or getattr(args, "remove_unused_columns", True)
    _check_rows("train_dataset", given.get("train_dataset"), reads_rows)
    evaluation = given.get("eval_dataset")
    for part in evaluation.values() if isinstance(evaluation, dict) else [evaluation]:
        _check_rows("eval_dataset", part, reads_rows)


def _check_rows(name: str, rows: Any, reads_rows: bool) -> None:
    if isinstance(rows, str | Path):
        raise ValueError(f"{name} is {str(rows)!r}; expected rows with input_ids and labels")
    if isinstance(rows, Mapping):
        raise ValueError(
            f"{name} is a {type(rows).__name__} of {', '.join(map(str, rows)) or 'nothing'}; expected"
            " one data set: at each index a row, with input_ids and labels"
        )
    if isinstance(rows, Sized) and not len(rows):
        raise ValueError(f"{name} is empty; expected rows with input_ids and labels")
    columns = getattr(rows, "column_names", None)
    if reads_rows and isinstance(columns, list) and "input_ids" not in columns:
        raise ValueError(
            f"{name} has no input_ids, only {', '.join(map(str, columns)) or 'nothing'}; expected rows"
            " with input_ids and labels (of text, what a tokenizer makes of it)"
        )


def check_batch(batch: Mapping[str, Any]) -> None:
    """Reject a batch without tokens or labels, or with losses of its own to measure the reward against.

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
    if batch.get("baseline_losses") is not None:
        raise ValueError(
            "the batch has baseline_losses, but QuietStarTrainer measures against the losses of the"
            " copy that it averages itself; expected rows without that column"
        )


def without_targets(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as it is predicted from, at every position: without labels, and without anchors, which
    would leave the predictions at themselves alone, unless given thoughts belong to them."""
    left = {"labels", "baseline_losses"}
    if inputs.get("thought_ids") is None:
        left.add("anchors")
    return {name: value for name, value in inputs.items() if name not in left}


def check_parallelism(trainer: Trainer) -> None:
    """Reject kinds of parallelism that thoughts do not support.

    Raises:
        ValueError: names the kind, and what is supported.
    """
    args, state = trainer.args, trainer.accelerator.state
    if args.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError(
            f"fsdp is {args.fsdp!r} on {args.device.type}, where accelerate would run DDP"
            " instead; expected an accelerator, or fsdp left out"
        )
    if trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_config version is {state.fsdp_plugin.fsdp_version}; expected 2 (a rollout needs"
            " the output layer's own weight, which FSDP1 flattens)"
        )
    if trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        raise ValueError(
            "DeepSpeed zero_stage is 3; expected 0 to 2, or FSDP2, which shards the same (a rollout"
            " would gather every layer at every slot)"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"one process would run {args.n_gpu} GPUs (torch's DataParallel), which thoughts do"
            " not support; expected a process for each (torchrun, accelerate launch), or one GPU"
        )
    if trainer.accelerator.num_processes > 1:
        _check_several_processes(args)
    sizes = {
        "tensor": trainer.get_tp_size(),
        "context": trainer.get_cp_size(),
        "sequence": trainer.get_sp_size(),
    }
    for kind, size in sizes.items():
        if size > 1:
            raise ValueError(
                f"{kind} parallelism over {size} processes is not supported with thoughts; expected"
                " data parallelism (DDP, FSDP2)"
            )


def _check_several_processes(args: TrainingArguments) -> None:
    if not args.average_tokens_across_devices:
        raise ValueError(
            "average_tokens_across_devices is False; expected True, every mean is over the whole batch"
        )
    if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy is 'batch_rebalance', which gives processes different numbers"
            " of rows; expected another"
        )


def check_gradients(trainer: Any, keeps_copy: bool) -> None:
    """Reject what handles gradients or weights in a way that training with thoughts cannot follow.

    Args:
        keeps_copy: whether an averaged copy is needed.

    Raises:
        ValueError: names the option.
    """
    if trainer.args.fp16 and trainer.args.device.type == "cpu":
        raise ValueError("fp16 is True, which has no effect on a CPU; expected False (or bf16)")
    if trainer.args.bf16 and not computes_bf16(trainer.args.device):
        logger.warning("bf16 is True on a CPU that computes bfloat16 in software; bf16=false is faster")
    alpha = trainer.args.neftune_noise_alpha
    if alpha:
        raise ValueError(refusal_of_neftune(alpha))
    liger = trainer.args.use_liger_kernel or uses_liger(decoder_of(trainer.own_model))
    if liger and trainer.args.device.type != "cuda":
        raise ValueError(
            f"use_liger_kernel or fused_layers asks for liger-kernel on {trainer.args.device.type}; its"
            " kernels expect a CUDA device"
        )
    kept = getattr(trainer.args, "activation_checkpointing_kwargs", None)
    kept = kept or getattr(trainer.args, "gradient_checkpointing_kwargs", None) or {}
    if kept.get("keep") and trainer.args.torch_compile:
        raise ValueError(
            "torch_compile is True and checkpointing has keep: products, which it does not see; expected"
            " one of them"
        )
    deepspeed = trainer.is_deepspeed_enabled
    policy_max_norm = argument(trainer.args, "policy_max_grad_norm")
    rows = argument(trainer.args, "rows_per_backward")
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    steps_at_once = "lomo" in optim or optim.endswith("layerwise")
    owner = "DeepSpeed" if deepspeed else optim if steps_at_once else None
    if owner is not None and rows is not None:
        raise ValueError(
            f"rows_per_backward is {rows} with {owner}, which handles gradients itself; expected null"
        )
    if trainer.args.fp16:
        # The scaler looks at one gradient, and would not lower its scale for the other.
        owner = "fp16 (bf16 works)"
    if owner is not None and policy_max_norm is not None:
        raise ValueError(
            f"policy_max_grad_norm is {policy_max_norm} with {owner}, which handles"
            " gradients itself; expected null"
        )
    if deepspeed and keeps_copy:
        raise ValueError(
            "reward is 'information-gain' with DeepSpeed, which hides the parameters that the"
            " averaged copy follows; expected another reward, DDP or FSDP"
        )
