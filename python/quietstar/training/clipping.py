"""Clipping: the policy's gradient apart from the language-model loss's.

With the reference's policy weight of 1e6 and one global clip, the clip is set by the policy's gradient
and the language-model loss's is scaled down with it, to next to nothing. Here each has its own norm:

    gradient = clip(∇ language_loss, max_grad_norm) + clip(∇ thinking_loss, policy_max_grad_norm)

Both are sums over all accumulated micro-batches before they are clipped. Cost: the graph of a
micro-batch is walked twice, once for each loss (a backward pass more, with gradient checkpointing a
recomputation more), and stays whole during the first walk; one more gradient of every trained parameter
is held until the optimiser's step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from quietstar.thinking.fsdp2 import put_shards_back


def total_norm(tensors: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """Norm over all entries of all tensors, a scalar; sharded tensors count whole, as do their shards
    with plain tensors beside them. 0 without tensors."""
    groups: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    norms = []
    for group in groups.values():
        norm = get_total_norm(group, norm_type)
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros(())


def average_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in place."""
    tensors = list(tensors)
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for tensor, work in zip(tensors, works, strict=True):
        if work is not None:
            work.wait()
        tensor.div_(dist.get_world_size())


class PolicyClipper:
    """The gradient of the thinking loss, kept apart until both parts are clipped.

    Args:
        max_norm: to clip it to.
    """

    def __init__(self, max_norm: float):
        self.max_norm = max_norm
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self._parameters: list[nn.Parameter] = []
        self._loss: Tensor | None = None
        self._norms: list[Tensor] = []

    @contextlib.contextmanager
    def micro_batch(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Surrounds forward and backward of a micro-batch; behind the ``last`` of a step both gradients
        are averaged over the processes.

        DDP would average the gradients of one backward pass only.
        """
        # Between forward and backward FSDP2 shows gathered parameters, which get no gradient.
        put_shards_back(model)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._loss = None
        if isinstance(model, FSDPModule):
            # Unreduced it would keep both gradients in one place of its own, over all micro-batches.
            model.set_requires_gradient_sync(True)
        if not isinstance(model, DistributedDataParallel):
            yield
            return
        with model.no_sync():
            yield
        if last:
            own = [p.grad for p in model.parameters() if p.grad is not None]
            average_over_processes([*own, *self.gradients.values()])

    def backward(self, loss: Tensor, run: Callable[[Tensor], None]) -> None:
        """Let ``run`` send the thinking loss back; its gradients are added up here and not in
        ``parameter.grad``."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        others = [p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = self.gradients.pop(parameter, None)
        try:
            with torch.autocast(loss.device.type, enabled=False):
                run(loss)
        finally:
            for parameter, other in zip(self._parameters, others, strict=True):
                if parameter.grad is not None:
                    self.gradients[parameter] = parameter.grad
                parameter.grad = other

    def whole_loss(self, language_loss: Tensor) -> Tensor:
        """The micro-batch's loss with the part that was sent back here."""
        return language_loss if self._loss is None else language_loss + self._loss

    def merge(self) -> None:
        """Clip, add to ``parameter.grad`` and forget; the norm before clipping goes to the log."""
        if not self.gradients:
            return
        gradients, self.gradients = self.gradients, {}
        norm = total_norm(gradients.values())
        factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter, gradient in gradients.items():
            gradient.mul_(factor.to(gradient.device))
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        self._norms.append(norm)

    def logs(self) -> dict[str, float]:
        """The mean norm since the last call."""
        norms, self._norms = self._norms, []
        return {"policy_grad_norm": float(torch.stack(norms).mean())} if norms else {}
