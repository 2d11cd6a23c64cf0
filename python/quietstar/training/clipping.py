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

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


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


class PolicyGradient:
    """The gradient of the thinking loss, kept apart until both parts are clipped.

    Args:
        max_norm: to clip it to.
    """

    def __init__(self, max_norm: float):
        self.max_norm = max_norm
        self.gradients: dict[nn.Parameter, Tensor] = {}

    def add(self, parameters: Iterable[nn.Parameter], backward: Callable[[], None]) -> None:
        """Run a backward pass whose gradients are added up here and not in ``parameter.grad``."""
        parameters = list(parameters)
        others = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = self.gradients.pop(parameter, None)
        try:
            backward()
        finally:
            for parameter, other in zip(parameters, others, strict=True):
                if parameter.grad is not None:
                    self.gradients[parameter] = parameter.grad
                parameter.grad = other

    def merge(self) -> Tensor:
        """Clip, add to ``parameter.grad`` and forget; returns the norm before clipping, a scalar."""
        gradients, self.gradients = self.gradients, {}
        norm = total_norm(gradients.values())
        factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter, gradient in gradients.items():
            gradient.mul_(factor.to(gradient.device))
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return norm
