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

In generation the text's newest token can be part of its chain (``SlotRun.new_text``): its keys come out
with the results, for the text's cache.

The loop is the same with and without: :class:`Chain` only changes what it is given. A chain
is built for one combination of shapes and options and captured when that comes for the second time, so
that what comes once is not paid for; the latest few are kept, and each keeps its keys, hidden states
and buffers on the device: about what a rollout needs while it runs. Batches whose lengths keep changing
stop being captured (:class:`_Known`), and so does what does not fit the memory.

It is on for CUDA devices; ``QUIETSTAR_GRAPHS=off`` (or :func:`use_graphs`) switches it off. On an H200
it took 7 to 28 per cent off a training step of the Mistral-7B shape, up to 4 off one of the
Llama-3.2-1B shape (docs/gpu_paths.md).
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quietstar.config import QuietStarConfig
from quietstar.thinking.checkpointing import without_checkpointing
from quietstar.thinking.kept_outputs import KeptOutputs
from quietstar.thinking.layout import LayerKeys, ThoughtLayout
from quietstar.thinking.positions import rope_limits
from quietstar.thinking.recurrent.mixers import hands_states_on
from quietstar.thinking.slots import SlotResults, SlotRun, run_slots_singly
from quietstar_ext.dispatch import Setting

logger = logging.getLogger("quietstar")

MODES = ("auto", "off", "buffers")
# Text buffers of a single column per row (generation) grow by so many tokens at a time.
TEXT_STEP = 256
MAX_CHAINS = 4
# A capture costs about as much as three chains launched kernel by kernel, and a replay saves a part of
# one: so many replays pay for a capture beyond the first.
REPLAYS_PER_CAPTURE = 8

_mode = Setting("QUIETSTAR_GRAPHS", MODES)
_chains: weakref.WeakKeyDictionary[PreTrainedModel, _Known] = weakref.WeakKeyDictionary()
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


def run_slots(decoder: PreTrainedModel, config: QuietStarConfig, run: SlotRun) -> SlotResults:
    """:func:`quietstar.thinking.slots.run_slots_singly`, replayed where the mode says so and
    it can be."""
    mode = _mode.get()
    off = mode == "off" or (mode == "auto" and not _can_capture(run.layout.anchors.device))
    if off or run.last == 0 or torch.compiler.is_compiling():
        return run_slots_singly(decoder, config, run)
    with _one_at_a_time:
        return _run_known(decoder, config, run, mode)


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


class _Known(OrderedDict[Hashable, "Chain | str | None"]):
    """A decoder's latest combinations: the chain, or why there is none, or None before the second time.

    Captures are paid for by replays, so that lengths that keep changing do not cost more than they would
    kernel by kernel.
    """

    captures = replays = 0
    full = False  # a chain did not fit the memory

    def may_capture(self) -> bool:
        return not self.full and self.captures < MAX_CHAINS + self.replays // REPLAYS_PER_CAPTURE

    def remember(self, key: Hashable, found: Chain | str | None) -> None:
        self[key] = found
        self.move_to_end(key)
        while len(self) > MAX_CHAINS:
            self.popitem(last=False)

    def give_back_memory(self) -> None:
        self.clear()
        self.full = True
        torch.cuda.empty_cache()


def _run_known(
    decoder: PreTrainedModel, config: QuietStarConfig, run: SlotRun, mode: str
) -> SlotResults:
    """A chain over its buffers, if there is one for this combination, or the loop itself."""
    known = _chains.setdefault(decoder, _Known())
    key = _key(decoder, config, run)
    found = known.get(key)
    if found is None and (mode == "buffers" or (key in known and known.may_capture())):
        found = _unsupported_reason(decoder) or _NEW
        if found is not _NEW:
            logger.warning("slot steps are not captured in a graph: %s", found)
    known.remember(key, None if found is _NEW else found)
    if found is _NEW or isinstance(found, Chain):
        try:
            return _run_chain(known, key, (decoder, config, run), mode)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if mode == "buffers":
                raise
            reason, full = str(error).splitlines()[0], _is_out_of_memory(error)
        logger.warning("slot steps are not captured in a graph: %s", reason)
        torch.cuda.synchronize(run.layout.anchors.device)
        known[key] = reason
        if full:  # here, where the error's frames hold nothing of the failed capture any more
            known.give_back_memory()
            known[key] = reason
    return run_slots_singly(decoder, config, run)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """An error, or one behind it: ending a capture that has failed raises another."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


_NEW = "a chain is to be made"


def _run_chain(
    known: _Known, key: Hashable, call: tuple[PreTrainedModel, QuietStarConfig, SlotRun], mode: str
) -> SlotResults:
    chain = known[key]
    if not isinstance(chain, Chain):
        chain = known[key] = Chain(*call)
    chain.fill(call[2])
    if mode == "buffers":
        return _own_copy(chain.run())
    known.captures += not chain.captured
    results = chain.replay()
    known.replays += 1
    return results


def _key(decoder: PreTrainedModel, config: QuietStarConfig, run: SlotRun) -> Hashable:
    """Everything that a graph fixes and that may differ at the next call."""
    layout, shard = run.layout, run.shard
    device = layout.anchors.device
    kind = device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    thought = (config.thought_kind, config.thought_length, config.start_token_id, config.end_token_id)
    return (
        device,
        tuple(layout.anchors.shape),
        tuple(layout.row_start.shape),
        tuple(run.input_ids.shape),
        _capacity(layout),
        (layout.num_slots, layout.rationales),
        tuple((t.shape, t.dtype) for t in run.start_end),
        thought,
        (run.temperature, run.last, run.together, run.new_text, run.keeps, shard.index, shard.count),
        (autocast, decoder.training),
        # Weights that moved (another dtype, an adapter merged, a unit gathered elsewhere).
        hash(tuple(_addresses(decoder))),
    )


def _addresses(decoder: PreTrainedModel) -> list[int]:
    """Of every weight, whatever module it is in by now. ``parameters()`` would make all their names as
    well, which takes four times as long, at every call."""
    found: list[int] = []
    left: list[torch.nn.Module] = [decoder]
    seen = set(left)
    for module in left:  # grows
        if module._parameters:
            found += [weight.data_ptr() for weight in module._parameters.values() if weight is not None]
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                left.append(child)
    return found


def _capacity(layout: ThoughtLayout) -> int:
    """Length of the text buffers: the text's in a rollout, rounded up where the text grows."""
    length = max(keys.offset + keys.k_text.shape[2] for keys in layout.keys.values())
    if length == layout.text_length:
        return length
    return math.ceil(length / TEXT_STEP) * TEXT_STEP


def _unsupported_reason(decoder: PreTrainedModel) -> str | None:
    """Why a decoder cannot be captured in a graph, as half a sentence; None where nothing is known."""
    for module in decoder.modules():
        if "FSDP" in type(module).__name__ or "FullyShardedDataParallel" in type(module).__name__:
            return "the weights are sharded, and gathered ones move"
        if hasattr(module, "_hf_hook"):
            return "the weights are moved between devices by accelerate's hooks"
    if hands_states_on(decoder):
        return "its layers hand states on, which no graph keeps"
    for kind, _ in rope_limits(decoder):
        return f"{kind!r} rotary embeddings look at the longest position on the host"
    return None


class Chain:
    """Buffers of one chain of slots, and its graph once it was captured.

    Args:
        run: a first call's, for shapes and options; no tensor of it is kept.
    """

    def __init__(self, decoder: PreTrainedModel, config: QuietStarConfig, run: SlotRun):
        self._config = config
        self._decoder = weakref.ref(decoder)  # the chains are kept by the decoder's life
        start, end = (torch.empty_like(t, requires_grad=False) for t in run.start_end)
        self._seed = torch.zeros(1, dtype=torch.int64, device=run.input_ids.device)
        self._run = replace(
            run,
            start_end=(start, end),
            input_ids=torch.empty_like(run.input_ids),
            layout=_empty_copy(run.layout, _capacity(run.layout)),
            seed=self._seed,
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: SlotResults | None = None
        self._read: torch.Event | None = None
        self._replays = 0

    @property
    def captured(self) -> bool:
        return self._graph is not None

    @torch.no_grad()
    def fill(self, run: SlotRun) -> None:
        """Copy a call's inputs into the buffers."""
        if self._read is not None:  # another thread's stream may still copy what the last call gave
            torch.cuda.current_stream(self._seed.device).wait_event(self._read)
        to, source = _inputs(self._run), _inputs(run)
        for layer, keys in run.layout.keys.items():
            # A sliding-window cache holds only the tail of the text: it goes where it belongs.
            place = slice(keys.offset, keys.offset + keys.k_text.shape[2])
            own = self._run.layout.keys[layer]
            to += [own.k_text[:, :, place], own.v_text[:, :, place]]
            source += [keys.k_text, keys.v_text]
        torch._foreach_copy_(to, source)
        if isinstance(run.seed, Tensor):
            self._seed.copy_(run.seed)
        else:
            self._seed.fill_(run.seed)

    @torch.no_grad()
    def run(self) -> SlotResults:
        """The loop over the buffers."""
        decoder = self._decoder()
        assert decoder is not None
        with without_checkpointing(decoder):
            return run_slots_singly(decoder, self._config, self._run)

    def replay(self) -> SlotResults:
        """The same as a graph, captured at the first call; the results are the caller's own."""
        device = self._seed.device
        with torch.cuda.device(device):
            if self._graph is None:
                self._capture()
            assert self._graph is not None and self._outputs is not None
            self._replays += 1  # first: what the last call was given is overwritten from now on
            self._graph.replay()
            own = replace(_own_copy(self._outputs), kept=self._kept(self._outputs.kept))
            self._read = torch.cuda.current_stream().record_event()
        return own

    def _kept(self, made: KeptOutputs | None) -> KeptOutputs | None:
        """What the graph has kept, where it lies: it is large, and good until the next replay."""
        now = self._replays
        if made is None:
            return None
        return KeptOutputs(dict(made.parts), made.rows, lambda: self._replays == now)

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


def _own_copy(made: SlotResults) -> SlotResults:
    """Results that the next run over the buffers does not overwrite; what was kept stays where it is."""
    return SlotResults(
        None if made.ids is None else made.ids.clone(),
        None if made.logprobs is None else made.logprobs.clone(),
        [hidden.clone() for hidden in made.hidden],
        {layer: (keys.clone(), values.clone()) for layer, (keys, values) in made.text_keys.items()},
        made.kept,
    )


def _inputs(run: SlotRun) -> list[Tensor]:
    """The tensors of a run that a graph reads, but for keys and seed."""
    layout = run.layout
    ranges = [layout.row_start, layout.row_stop, layout.text_start, layout.text_stop]
    return [*(t.detach() for t in run.start_end), run.input_ids, layout.anchors, *ranges]


def _empty_copy(layout: ThoughtLayout, capacity: int) -> ThoughtLayout:
    """A layout of the same shapes over memory of its own, with room for ``capacity`` text tokens."""
    ranges = (layout.row_start.clone(), layout.row_stop.clone())
    own = ThoughtLayout(
        *(*ranges, layout.anchors.clone(), layout.num_slots),
        phase=layout.phase,
        rationales=layout.rationales,
    )
    for layer, keys in layout.keys.items():
        batch, heads, _, size = keys.k_text.shape
        # Zeros: what is behind the text is never used, but a masked NaN would still be one.
        own.keys[layer] = LayerKeys(
            keys.k_text.new_zeros(batch, heads, capacity, size),
            keys.v_text.new_zeros(batch, heads, capacity, keys.v_text.shape[3]),
        )
    return own
