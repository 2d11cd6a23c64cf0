"""Metrics of a training step, summed on the device without keeping a graph alive."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quietstar.config import QuietStarConfig

logger = logging.getLogger("quietstar")

# The share of tokens that counts as hard: those with the highest base loss of a batch.
HARD_SHARE = 0.1


def describe(output: Any, fraction: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and counts of what is worth watching in one batch, as scalars on its device.

    The mean mixing weight hides success where few tokens profit from a thought, so it is split into
    hard tokens (highest base loss), easy ones, and the highest weights.

    Args:
        output: a :class:`~quietstar.modeling.output.QuietStarOutput` with labels.
        fraction: of a batch's rows; by so much what is a mean of the whole batch counts.
    """
    base_losses, is_target = output.base_losses, output.is_target
    one = torch.full((), fraction, device=base_losses.device)
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, total: Tensor, count: Tensor = one) -> None:
        found[name] = (total.detach().float(), count.float())

    add("base_loss", base_losses.sum(), is_target.sum())
    if output.talk_losses is None:
        return found
    rationales = output.talk_losses.shape[2]
    for k, losses in enumerate(output.talk_losses):
        add(f"talk_loss_{k}", losses.sum(), output.has_target[k].sum() * rationales)
    has_target = output.has_target[0]
    base = pad(base_losses, (0, 1)).gather(1, output.anchors) * has_target
    mixed = output.talk_losses[0].mean(1)
    add("gain", ((base - mixed) * has_target).sum(), has_target.sum())

    weight = output.mixing_weight[0].mean(1)
    hard = largest(base, has_target, HARD_SHARE)
    shares = {"": has_target, "_hard": hard, "_easy": has_target & ~hard}
    shares["_top"] = largest(weight, has_target, HARD_SHARE)
    for name, where in shares.items():
        add(f"mixing_weight{name}", torch.where(where, weight, 0.0).sum(), where.sum())

    rewarded = output.rewarded[:, None]
    total = rewarded.sum() * rationales
    add("reward", (output.reward * rewarded).sum(), total)
    add("positive_advantages", ((output.advantage > 0) & rewarded).sum(), total)
    if output.policy_loss is not None:
        add("policy_loss", output.policy_loss)
    if output.thought_logprobs is not None:
        # The mean of -log p over samples from p estimates its entropy.
        logprobs = torch.where(rewarded, output.thought_logprobs.mean(-1), 0.0)
        add("thought_entropy", -logprobs.sum(), total)
    return found


def language_model_loss(config: QuietStarConfig, means: dict[str, float]) -> float:
    """The language-model loss from its means over many batches, by :func:`describe`'s names."""
    talk = [means.get(f"talk_loss_{k}", 0.0) for k in range(config.talk_length)]
    if not config.thinks:
        return means["base_loss"]
    share = config.base_loss_weight
    return share * means["base_loss"] + (1 - share) * sum(talk) / len(talk)


def largest(values: Tensor, counts: Tensor, share: float) -> Tensor:
    """Where the largest of the values that count are, bool: a share of these, at least one."""
    order = torch.where(counts, values, -torch.inf).flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return counts & (rank.view_as(values) < (share * counts.sum()).clamp(min=1).floor())


class Average:
    """Running means of :func:`describe`'s entries; nothing is read from the device before ``pop``."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, found: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Add one batch."""
        for name, (total, count) in found.items():
            # A step that is not finite is skipped, and left out of the means as well.
            finite = torch.isfinite(total)
            total, count = torch.where(finite, total, 0.0), torch.where(finite, count, 0.0)
            old_total, old_count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (old_total + total, old_count + count)

    def __len__(self) -> int:
        """How many means there are."""
        return len(self._sums)

    def pop(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means so far, over all processes, and a fresh start.

        Args:
            reduce: sums a tensor over processes (accelerate's ``reduce``).
        """
        names = sorted(self._sums)
        if not names:
            return {}
        stacked = torch.stack([torch.stack(self._sums[name]) for name in names])
        totals, counts = reduce(stacked).unbind(1)
        self._sums.clear()
        means = zip(names, (totals / counts).tolist(), counts.tolist(), strict=True)
        # What nothing counted for has no mean.
        return {name: mean for name, mean, count in means if count}


class ThoughtMetrics:
    """What thinking did since the last log entry, and in an evaluation.

    Args:
        reduce: sums a tensor over processes.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor]):
        self._reduce = reduce
        # Of training (True) and of evaluation.
        self.averages = {True: Average(), False: Average()}
        self._tokens: Tensor | int = 0
        self._last_log = time.perf_counter()

    def add(self, output: Any, training: bool, fraction: float = 1.0) -> None:
        """Add what one batch gave, or this fraction of its rows."""
        self.averages[training].add(describe(output, fraction))

    def count_tokens(self, inputs: Mapping[str, Any]) -> None:
        """Count the tokens of a batch, padding left out."""
        mask = inputs.get("attention_mask")
        self._tokens += inputs["input_ids"].numel() if mask is None else (mask != 0).sum()

    def of_training(self) -> dict[str, float]:
        """The means, and the speed of this process, since the last call."""
        means = self.averages[True].pop(self._reduce)
        now = time.perf_counter()
        means["tokens_per_second"] = int(self._tokens) / max(now - self._last_log, 1e-9)
        self._tokens, self._last_log = 0, now
        return means

    def begin_evaluation(self) -> None:
        """Forget an evaluation that was broken off."""
        self.averages[False].pop(self._reduce)

    def add_to_evaluation(
        self, metrics: dict[str, float], prefix: str, config: QuietStarConfig, needs_targets: bool
    ) -> None:
        """Add the means to an evaluation's result, and take the loss from them.

        Raises:
            ValueError: if no batch has a target, unless that is allowed; the result then has no loss.
        """
        looked = len(self.averages[False]) > 0
        found = self.averages[False].pop(self._reduce)
        if "base_loss" in found:
            # The mean over all targets, not over batches that have different numbers of them, or none.
            found["loss"] = language_model_loss(config, found)
        elif looked and math.isfinite(metrics[f"{prefix}_loss"]):
            if needs_targets:
                raise ValueError(
                    "the evaluation data have no target (labels are all -100 or padding); expected at"
                    " least one token to predict"
                )
            del metrics[f"{prefix}_loss"]
            return
        for name, value in found.items():
            metrics[f"{prefix}_{name}"] = value


class Watch:
    """Warns, once each and with a remedy, when training goes where it is known to fail.

    Args:
        patience: log entries in a row that have to show a sign.
    """

    def __init__(self, patience: int = 3) -> None:
        self._patience = patience
        self._seen: dict[str, int] = {}

    def look(self, logs: dict[str, float], policy_weight: float, max_grad_norm: float) -> list[str]:
        """Examine one log entry; returns (and logs) the warnings it gave rise to.

        Args:
            logs: with the metrics of thinking; what is missing shows no sign.
            max_grad_norm: of a clip that the policy term shares with the language-model loss, or 0.
        """
        policy = abs(logs.get("policy_loss", 0.0)) * policy_weight
        silent = abs(logs.get("mixing_weight_top", 1.0)) < 1e-3
        signs = {
            "The mixing weight stays at 0, so thoughts have no say: raise the learning rate or"
            " embedding_scale, or set a mixing_floor (with mixing_activation: sigmoid), or see that the"
            " data has anything a thought could help with.": silent,
            "The policy term is far larger than the language-model loss; after gradient clipping it is"
            " nearly the whole update: lower policy_weight (1 to 100 works on small models) or clip it"
            " apart with policy_max_grad_norm.": (
                max_grad_norm > 0 and policy > 1000 * max(logs.get("base_loss", 1.0), 1e-3)
            ),
            "Thoughts have collapsed to nearly the same tokens (entropy near 0): set an entropy_bonus,"
            " lower policy_weight or the learning rate, or raise thought_temperature.": (
                logs.get("thought_entropy", 1.0) < 0.01 and logs.get("gain", 0.0) <= 0.01
            ),
            # Without a say no thought can earn anything, which the first warning says already.
            "No thought has a positive advantage, so REINFORCE learns nothing: raise num_rationales or"
            " thought_temperature so that thoughts differ, or take the reward base-gain or"
            " clamp_advantage: false.": (
                policy_weight > 0 and not silent and logs.get("positive_advantages", 1.0) < 1e-3
            ),
        }
        said = []
        for message, holds in signs.items():
            self._seen[message] = self._seen.get(message, 0) + 1 if holds else 0
            if self._seen[message] == self._patience:
                logger.warning(message)
                said.append(message)
        return said
