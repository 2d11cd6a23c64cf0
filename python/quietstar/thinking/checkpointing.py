"""Gradient checkpointing: what of a layer is kept besides its input, and passes that go without.

Ordinary checkpointing keeps a layer's input and computes everything again in the backward pass. With
``{"keep": "products"}`` among its settings the outputs of matrix products and of the attention are kept
as well, and only what costs little is computed again: norms, rotary embeddings, gates, casts.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from quietstar.errors import UserError

KEEP = "keep"
CHECKPOINT = "_gradient_checkpointing_func"  # where transformers has a layer's checkpoint function
_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.linear.default,
    torch.ops.aten._grouped_mm.default,
}
# The text's attention is one of torch's operators, or ours.
_Kept = defaultdict[Any, list[tuple[Any, list[tuple[Tensor, int]]]]]
_ATTENTION = ("aten::_scaled_dot_product", "quietstar::thought_attention")


def keeps_products(checkpoint: Callable[..., Any] | None) -> bool:
    """Whether a layer's checkpoint function keeps products."""
    keywords = checkpoint.keywords if isinstance(checkpoint, functools.partial) else {}
    return keywords.get("context_fn") is _contexts


def with_policy(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's checkpoint function whose setting ``keep`` has become what torch understands.

    Raises:
        UserError: for another value, or together with what it excludes.
    """
    settings = dict(checkpoint.keywords) if isinstance(checkpoint, functools.partial) else {}
    if KEEP not in settings:
        return checkpoint
    if (kept := settings.pop(KEEP)) != "products":
        raise UserError(f"keep is {kept!r} for checkpointing; expected 'products'")
    if settings.pop("use_reentrant", False):
        raise UserError("keep: products and use_reentrant: true cannot be combined for checkpointing")
    assert isinstance(checkpoint, functools.partial)
    return functools.partial(checkpoint.func, use_reentrant=False, context_fn=_contexts, **settings)


def _contexts() -> tuple[_Keep, _Take]:
    """Around a layer's forward pass, and around the one that computes it again.

    torch's own (``create_selective_checkpoint_contexts``) wants every operator called equally often
    both times, which autocast does not do: it has cast a weight in the rollout already. And it goes
    through a graph once only.
    """
    kept: _Kept = defaultdict(list)
    return _Keep(kept), _Take(kept)


class _Keep(TorchDispatchMode):
    def __init__(self, kept: _Kept):
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        if _is_kept(operator):
            held = [t.detach() for t in tree_leaves(made) if isinstance(t, Tensor)]
            self._kept[operator].append((made, [(t, t._version) for t in held]))
        return made


class _Take(TorchDispatchMode):
    def __init__(self, kept: _Kept):
        super().__init__()
        self._kept = kept
        self._taken: Counter[Any] = Counter()

    def __enter__(self) -> Any:
        self._taken.clear()
        return super().__enter__()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_kept(operator):
            return operator(*args, **(kwargs or {}))
        number = self._taken[operator]
        self._taken[operator] += 1
        if number >= len(self._kept[operator]):
            raise RuntimeError(f"checkpointing computed {operator} more often than the layer had before")
        made, versions = self._kept[operator][number]
        if any(tensor._version != version for tensor, version in versions):
            raise RuntimeError(f"the layer has changed what {operator} gave, which checkpointing kept")
        return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, made)


@functools.cache
def _is_kept(operator: Any) -> bool:
    return operator in _PRODUCTS or str(operator.name()).startswith(_ATTENTION)


# How many threads are in passes without checkpointing, and the modules to switch it on again.
_suspended: weakref.WeakKeyDictionary[PreTrainedModel, tuple[int, list[Any]]]
_suspended = weakref.WeakKeyDictionary()
_counting = threading.Lock()


def _checkpointing(decoder: PreTrainedModel, change: int) -> None:
    """One thread more (1) or fewer (-1) that wants no checkpointing."""
    with _counting:
        threads, modules = _suspended.pop(decoder, (0, []))
        if not threads:
            modules = [m for m in decoder.modules() if getattr(m, "gradient_checkpointing", False)]
        if threads + change:
            _suspended[decoder] = (threads + change, modules)
        for module in modules:
            module.gradient_checkpointing = not threads + change


@contextlib.contextmanager
def without_checkpointing(decoder: PreTrainedModel) -> Iterator[None]:
    """For passes without gradients, where checkpointing would only drop the cache.

    It comes back when the last thread has left.
    """
    if not decoder.training:
        yield
        return
    _checkpointing(decoder, 1)
    try:
        yield
    finally:
        _checkpointing(decoder, -1)
