"""Slot steps as one CUDA graph: launched once for a whole chain instead of kernel by kernel.

A slot step is a decoding step: hundreds of kernels of a few microseconds each, which the host cannot
launch as fast as the device runs them. What kept them from being captured, and what is done about it:

- **growing shapes**: each slot sees one slot more, so not a step but the whole chain of slots is
  captured, each with its own shapes; the text's keys lie in buffers whose length is rounded up, and the
  range that a column sees (``text_start``, ``text_stop``) is read on the device;
- **addresses**: text, anchors, keys, embeddings of the meta tokens and the seed are copied into buffers
  that stay where they are;
- **the seed** is a device tensor, read by the sampling kernel; the offsets of slots and rows do not
  change and are part of the graph.

``slot_steps`` is the same loop with and without: :class:`Chain` only changes what it is given. A chain
is built for one combination of shapes and options and captured when that comes for the second time, so
that what comes once is not paid for; the latest few are kept, and each keeps its keys, hidden states
and buffers on the device: about what a rollout needs while it runs.

``QUIETSTAR_GRAPHS=auto`` (or :func:`use_graphs`) switches it on. It is off by default as long as it has
not been measured on a device.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.config import QuietStarConfig
from quietstar.thinking.batch_share import WHOLE, BatchPart
from quietstar.thinking.layout import LayerKeys, ThoughtLayout
from quietstar.thinking.positions import rope_limits
from quietstar_ext.dispatch import Setting

logger = logging.getLogger("quietstar")

MODES = ("off", "auto", "buffers")
# Text buffers of a single column per row (generation) grow by so many tokens at a time.
TEXT_STEP = 256
MOST_CHAINS = 4

Steps = tuple[Tensor | None, Tensor | None, list[Tensor]]
Loop = Callable[..., Steps]

_mode = Setting("QUIETSTAR_GRAPHS", MODES)
_chains: weakref.WeakKeyDictionary[PreTrainedModel, OrderedDict[Hashable, Chain | str | None]] = (
    weakref.WeakKeyDictionary()
)
# A chain's buffers hold one call's inputs at a time.
_one_at_a_time = threading.RLock()


def use_graphs(mode: str) -> contextlib.AbstractContextManager[None]:
    """Choose how slot steps run inside the block.

    ``"off"``: kernel by kernel. ``"auto"``: on a CUDA device as a graph from the second time on, where
    that is possible. ``"buffers"``: over the graph's buffers on any device, but without a graph (for
    tests).
    """
    return _mode.use(mode)


def forget(decoder: PreTrainedModel) -> None:
    """Drop a decoder's chains and their memory."""
    _chains.pop(decoder, None)


def run_slots(
    loop: Loop,
    decoder: PreTrainedModel,
    config: QuietStarConfig,
    meta: tuple[Tensor, Tensor],
    input_ids: Tensor,
    steps: ThoughtLayout,
    *,
    temperature: float,
    seed: int | Tensor,
    last: int,
    part: BatchPart = WHOLE,
) -> Steps:
    """``loop`` (:func:`quietstar.thinking.think.slot_steps`), replayed where the mode says so and it
    can be.

    Arguments and results are the loop's.
    """
    mode = _mode.get()
    arguments = (decoder, config, meta, input_ids, steps)
    options = {"temperature": temperature, "last": last, "part": part}
    if mode == "off" or last == 0 or torch.compiler.is_compiling():
        return loop(*arguments, seed=seed, **options)
    device = steps.anchors.device
    if mode == "auto" and device.type != "cuda":
        return loop(*arguments, seed=seed, **options)
    with _one_at_a_time:
        return _run_known(loop, arguments, mode, seed, options)


def _run_known(
    loop: Loop,
    arguments: tuple[PreTrainedModel, QuietStarConfig, tuple[Tensor, Tensor], Tensor, ThoughtLayout],
    mode: str,
    seed: int | Tensor,
    options: dict[str, Any],
) -> Steps:
    """A chain over its buffers, if there is one for this combination, or the loop itself."""
    decoder, _, meta, input_ids, steps = arguments
    known = _chains.setdefault(decoder, OrderedDict())
    key = _key(*arguments, **options)
    found = known.get(key)
    if found is None and (mode == "buffers" or key in known):
        reason = _why_not(decoder)
        found = Chain(loop, *arguments, options) if reason is None else reason
        if reason is not None:
            logger.warning("slot steps are not captured in a graph: %s", reason)
    known[key] = found
    known.move_to_end(key)
    while len(known) > MOST_CHAINS:
        known.popitem(last=False)
    if not isinstance(found, Chain):
        return loop(*arguments, seed=seed, **options)
    found.fill(meta, input_ids, steps, seed)
    if mode == "buffers":
        return found.run()
    try:
        return found.replay()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        known[key] = str(error).splitlines()[0]
        logger.warning("slot steps are not captured in a graph: %s", known[key])
        torch.cuda.synchronize(steps.anchors.device)
        return loop(*arguments, seed=seed, **options)


def _key(
    decoder: PreTrainedModel,
    config: QuietStarConfig,
    meta: tuple[Tensor, Tensor],
    input_ids: Tensor,
    steps: ThoughtLayout,
    temperature: float,
    last: int,
    part: BatchPart,
) -> Hashable:
    """Everything that a graph has fixed and that may be another the next time."""
    device = steps.anchors.device
    kind = device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    thought = (config.thought_kind, config.thought_length, config.start_token_id, config.end_token_id)
    return (
        device,
        tuple(steps.anchors.shape),
        tuple(steps.row_start.shape),
        tuple(input_ids.shape),
        _capacity(steps),
        steps.num_slots,
        tuple((t.shape, t.dtype) for t in meta),
        thought,
        (temperature, last, part.index, part.count),
        (autocast, decoder.training),
        # Weights that moved (another dtype, an adapter merged, a unit gathered elsewhere).
        hash(tuple(weight.data_ptr() for weight in decoder.parameters())),
    )


def _capacity(steps: ThoughtLayout) -> int:
    """Length of the text buffers: the text's in a rollout, rounded up where the text grows."""
    length = max(keys.offset + keys.k_text.shape[2] for keys in steps.keys.values())
    if length == steps.text_length:
        return length
    return math.ceil(length / TEXT_STEP) * TEXT_STEP


def _why_not(decoder: PreTrainedModel) -> str | None:
    """What about a decoder cannot be captured, as half a sentence; None where nothing is known."""
    for module in decoder.modules():
        if "FSDP" in type(module).__name__ or "FullyShardedDataParallel" in type(module).__name__:
            return "the weights are sharded, and gathered ones move"
        if hasattr(module, "_hf_hook"):
            return "the weights are moved between devices by accelerate's hooks"
    for kind, _ in rope_limits(decoder):
        return f"{kind!r} rotary embeddings look at the longest position on the host"
    return None


class Chain:
    """Buffers of one chain of slots, and its graph once it was captured.

    Args:
        loop, decoder, config, options: what runs, and with which options (``temperature``, ``last``,
            ``part``).
        meta, input_ids, steps: a first call's, for shapes; nothing of them is kept.
    """

    def __init__(
        self,
        loop: Loop,
        decoder: PreTrainedModel,
        config: QuietStarConfig,
        meta: tuple[Tensor, Tensor],
        input_ids: Tensor,
        steps: ThoughtLayout,
        options: dict[str, Any],
    ):
        self._loop, self._config, self._options = loop, config, options
        self._decoder = weakref.ref(decoder)  # the chains are kept by the decoder's life
        self._meta = tuple(torch.empty_like(t, requires_grad=False) for t in meta)
        self._input_ids = torch.empty_like(input_ids)
        self._seed = torch.zeros(1, dtype=torch.int64, device=input_ids.device)
        self._steps = _like(steps, _capacity(steps))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Steps | None = None
        self._read: torch.Event | None = None

    @torch.no_grad()
    def fill(
        self, meta: tuple[Tensor, Tensor], input_ids: Tensor, steps: ThoughtLayout, seed: int | Tensor
    ) -> None:
        """Copy a call's inputs into the buffers."""
        if self._read is not None:  # another thread's stream may still copy what the last call gave
            torch.cuda.current_stream(self._seed.device).wait_event(self._read)
        own = self._steps
        to = [*self._meta, self._input_ids, own.anchors, own.row_start, own.row_stop]
        to += [own.text_start, own.text_stop]
        source = [*(t.detach() for t in meta), input_ids, steps.anchors, steps.row_start, steps.row_stop]
        source += [steps.text_start, steps.text_stop]
        for layer, keys in steps.keys.items():
            # A sliding-window cache holds only the tail of the text: it goes where it belongs.
            place = slice(keys.offset, keys.offset + keys.k_text.shape[2])
            to += [own.keys[layer].k_text[:, :, place], own.keys[layer].v_text[:, :, place]]
            source += [keys.k_text, keys.v_text]
        torch._foreach_copy_(to, source)
        if isinstance(seed, Tensor):
            self._seed.copy_(seed)
        else:
            self._seed.fill_(seed)

    @torch.no_grad()
    def run(self) -> Steps:
        """The loop over the buffers."""
        decoder = self._decoder()
        assert decoder is not None
        with without_checkpointing(decoder):
            return self._loop(
                decoder,
                self._config,
                self._meta,
                self._input_ids,
                self._steps,
                seed=self._seed,
                **self._options,
            )

    def replay(self) -> Steps:
        """The same as a graph, captured at the first call; the results are the caller's own."""
        device = self._seed.device
        with torch.cuda.device(device):
            if self._graph is None:
                self._capture()
            assert self._graph is not None and self._outputs is not None
            self._graph.replay()
            ids, logprobs, kept = self._outputs
            own = (
                None if ids is None else ids.clone(),
                None if logprobs is None else logprobs.clone(),
                [hidden.clone() for hidden in kept],
            )
            self._read = torch.cuda.current_stream().record_event()
        return own

    def _capture(self) -> None:
        # Autocast keeps the weights that it has cast. Those from before must not get into the graph, and
        # those of the graph must not get out of it; inside, each is cast once per replay.
        torch.clear_autocast_cache()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.run()  # libraries make their workspaces
        torch.cuda.current_stream().wait_stream(side)
        torch.clear_autocast_cache()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (loaders, communication) may go on using the device.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = self.run()
        finally:
            torch.clear_autocast_cache()
        self._graph, self._outputs = graph, outputs


def _like(steps: ThoughtLayout, capacity: int) -> ThoughtLayout:
    """A layout of the same shapes over memory of its own, with room for ``capacity`` text tokens."""
    own = ThoughtLayout(
        steps.row_start.clone(),
        steps.row_stop.clone(),
        steps.anchors.clone(),
        steps.num_slots,
        phase=steps.phase,
    )
    for layer, keys in steps.keys.items():
        batch, heads, _, size = keys.k_text.shape
        # Zeros: what is behind the text is never used, but a masked NaN would still be one.
        own.keys[layer] = LayerKeys(
            keys.k_text.new_zeros(batch, heads, capacity, size),
            keys.v_text.new_zeros(batch, heads, capacity, keys.v_text.shape[3]),
        )
    return own


_suspended: weakref.WeakKeyDictionary[PreTrainedModel, list[Any]] = weakref.WeakKeyDictionary()
_suspenders: weakref.WeakKeyDictionary[PreTrainedModel, int] = weakref.WeakKeyDictionary()
_counting = threading.Lock()


@contextlib.contextmanager
def without_checkpointing(decoder: PreTrainedModel) -> Iterator[None]:
    """For passes without gradients, where checkpointing would only drop the cache.

    It comes back when the last thread has left.
    """
    if not decoder.training:
        yield
        return
    with _counting:
        if not _suspenders.get(decoder):
            _suspended[decoder] = [
                m for m in decoder.modules() if getattr(m, "gradient_checkpointing", False)
            ]
            for module in _suspended[decoder]:
                module.gradient_checkpointing = False
        _suspenders[decoder] = _suspenders.get(decoder, 0) + 1
    try:
        yield
    finally:
        with _counting:
            _suspenders[decoder] -= 1
            if not _suspenders[decoder]:
                for module in _suspended.pop(decoder):
                    module.gradient_checkpointing = True
