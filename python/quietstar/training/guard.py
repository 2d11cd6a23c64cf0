"""Guard: a step whose loss or gradient is not finite is skipped, and nothing poisoned is saved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from quietstar.training.clipping import total_norm

logger = logging.getLogger("quietstar")


class NonFiniteLoss(RuntimeError):
    """Training met losses, gradients or weights that are not numbers; nothing was saved after that."""


class NonFiniteGuard:
    """Counts and skips steps with a loss or gradient that is not finite.

    A skipped step takes its batches and its place in the learning rate's schedule; weights, optimiser
    state and averaged copy stay as they were. All processes skip together.

    Args:
        limit: more skipped steps in a row than this raise :class:`NonFiniteLoss`.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0
        self._losses_finite: Tensor | None = None

    def saw(self, loss: Tensor) -> None:
        """Note a micro-batch's loss; nothing is read from the device."""
        finite = torch.isfinite(loss.detach())
        self._losses_finite = finite if self._losses_finite is None else self._losses_finite & finite

    def skips(
        self,
        parameters: Iterable[nn.Parameter],
        step: int,
        *,
        add_up: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        scale: float | None = None,
        already: bool = False,
    ) -> bool:
        """Decide about a step, after all its backward passes; if it is skipped, its gradients are gone.

        Without gradients an optimiser of torch does nothing at all: no decay, no count, no state.

        Args:
            step: its number, from 1.
            add_up: sums a tensor over the processes.
            scale: of a gradient scaler (float16), which has to see a gradient that is not finite: it
                then skips the step itself and lowers its scale. Until that is down to 1, such a step
                does not count towards the limit.
            already: whoever holds the gradients (DeepSpeed) found one that is not finite and has skipped
                the step; it is counted here.

        Raises:
            NonFiniteLoss: at the limit, or at once if the weights themselves are not finite.
        """
        parameters = list(parameters)
        norm = total_norm(p.grad for p in parameters if p.grad is not None)
        losses = torch.ones((), dtype=torch.bool)
        if self._losses_finite is not None:
            losses, self._losses_finite = self._losses_finite, None
        bad = torch.stack([~losses.to(norm.device), ~torch.isfinite(norm) | already]).float()
        loss_bad, gradient_bad = (add_up(bad) > 0).tolist()
        if not loss_bad and not gradient_bad:
            self.in_a_row = 0
            return False
        overflow = scale is not None and gradient_bad
        if not overflow:
            for parameter in parameters:
                parameter.grad = None
        self.skipped += 1
        what = "loss" if loss_bad else "gradient"
        if not weights_are_finite(parameters):
            raise NonFiniteLoss(
                f"the {what} at step {step} is not finite, nor are the weights; training stopped and the"
                " last checkpoint is kept"
            )
        self.in_a_row += not (overflow and scale is not None and scale > 1)
        if self.in_a_row > self.limit:
            row = f" ({self.in_a_row} skipped steps in a row)" if self.in_a_row > 1 else ""
            raise NonFiniteLoss(
                f"the {what} at step {step} is not finite{row}; training stopped and the last checkpoint"
                " is kept (try a lower learning rate or policy_weight)"
            )
        logger.warning("the %s at step %d is not finite; the step is skipped", what, step)
        return True

    def check_before_saving(self, parameters: Iterable[nn.Parameter], step: int) -> None:
        """Raise :class:`NonFiniteLoss` if the weights that are about to be saved are not finite."""
        if not weights_are_finite(parameters):
            raise NonFiniteLoss(
                f"the weights after step {step} are not finite; training stopped and the last checkpoint"
                " is kept (try a lower learning rate)"
            )


def weights_are_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether all entries of the trained parameters are numbers."""
    with torch.no_grad():
        trained = [p.detach() for p in parameters if p.requires_grad]
        # A process may hold an empty shard, which has no largest entry; so each looks at its own.
        own = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
        finite = torch.isfinite(total_norm([p for p in own if p.numel()], float("inf"))).float()
        if any(isinstance(p, DTensor) for p in trained):
            dist.all_reduce(finite, dist.ReduceOp.MIN)
        return bool(finite)
