"""What the layers of a hybrid decoder keep and compute, counted in a pass that takes no memory.

Layers that hand states on come in several kinds, and those that attend between them have gates and norms
of their own. So nothing of them is written down as a formula: one layer of each kind runs a packed pass
over one text on fake tensors, which have shapes and no numbers, and back. What autograd keeps is added
up, and what the backward pass has in hand besides is read from its allocations.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from quietstar.thinking.attention import take_layouts
from quietstar.thinking.layout import ThoughtLayout, text_ranges
from quietstar.thinking.recurrent.linear_attention import Folding, chunk_size
from quietstar.thinking.text_part import decoder_layers, text_body

# Inputs of a convolution that the rollout keeps of every column; no known family keeps more.
BEHIND = 3


@dataclass(frozen=True)
class LayerKind:
    """Layers of one kind, and what one of them costs for one text with its columns.

    Attributes:
        count: how many there are.
        kept: bytes that it keeps for the backward pass; shared: those of them that linear layers gave.
        in_hand: bytes that are there besides at the peak of its backward pass, or of the forward pass
            that checkpointing runs before it; weights' gradients are not counted.
        products: operations of its products without weights, forward.
        remembered: bytes that it keeps during a rollout.
    """

    count: int
    kept: float
    shared: float
    in_hand: float
    products: float
    remembered: float


@dataclass(frozen=True)
class Shape:
    """One text and its columns: N tokens, A anchors, R rationales, S slots."""

    length: int
    anchors: int
    rationales: int
    slots: int


class Hybrid:
    """A decoder some of whose layers hand states on; reads no weights."""

    def __init__(self, config: PretrainedConfig):
        self._config = copy.deepcopy(config)  # which gets an attention of its own
        self._known: dict[tuple[Shape, str, bool], tuple[LayerKind, ...]] = {}

    def kinds(self, shape: Shape, precision: str, frozen: bool) -> tuple[LayerKind, ...]:
        """Its layers by kind.

        Args:
            precision: as of a :class:`~quietstar.plan.costs.Step`; frozen: only adapters are trained.
        """
        key = (shape, precision, frozen)
        if key not in self._known:
            self._known[key] = tuple(self._count(*key))
        return self._known[key]

    def _count(self, shape: Shape, precision: str, frozen: bool) -> Iterator[LayerKind]:
        packed, text = _layouts(shape)
        types = Counter(self._config.layer_types)
        autocast = precision == "autocast"
        with FakeTensorMode(allow_non_fake_inputs=True):
            dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
            decoder = AutoModelForCausalLM.from_config(self._config, dtype=dtype)
            take_layouts(decoder)
            if frozen:  # adapters need what goes into a linear layer, as a trained weight does
                decoder.requires_grad_(False)
                for module in decoder.modules():
                    if isinstance(module, nn.Linear):
                        module.weight.requires_grad_(True)
            layers = _one_of_each(decoder, list(types))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                watch = _Watch(decoder, layers)
                watch.run_back(_run(decoder, packed, watch))
                _run(decoder, text)
        columns = shape.anchors * shape.rationales
        for kind, layer in layers.items():
            # The casts of its weights are counted with the other layers'.
            casts = 2 * _weights(layer) if autocast else 0
            remembered = _remembered(text, layer, columns, shape.slots)
            kept, shared, products = (each[kind] for each in (watch.kept, watch.shared, watch.products))
            in_hand = watch.allocations.in_hand(kind, decoder)
            yield LayerKind(types[kind], kept - casts, shared, in_hand, products, remembered)


def _layouts(shape: Shape) -> tuple[ThoughtLayout, ThoughtLayout]:
    """Of a packed pass and of a rollout's first pass, on real tensors."""
    ranges = text_ranges(None, torch.zeros(1, shape.length, dtype=torch.int64))
    anchors = torch.arange(shape.anchors) * shape.length // shape.anchors
    columns = anchors.repeat_interleave(shape.rationales)[None]
    packed = ThoughtLayout.over(ranges, columns, shape.slots, rationales=shape.rationales)
    # Which columns hang from a chunk depends on numbers, which fake tensors have none of.
    for decays in (1, 2):  # one for a key, or one for each of its elements
        size = chunk_size(shape.length, decays)
        chunks = math.ceil(shape.length / size)
        packed.foldings[(1, size, chunks)] = Folding(columns, packed.text_start, size, chunks)
    text = ThoughtLayout.over(ranges, columns[:, :0], 0, phase="text")
    return packed, text


def _one_of_each(decoder: PreTrainedModel, kinds: list[str]) -> dict[str, nn.Module]:
    """The decoder's first layer of each kind, which become all that it has."""
    types, layers = decoder.config.get_text_config().layer_types, decoder_layers(decoder)
    chosen = {kind: layers[types.index(kind)] for kind in kinds}
    for module in list(text_body(decoder).modules()):
        for name, part in module.named_children():
            if isinstance(part, nn.ModuleList) and list(part) == layers:
                setattr(module, name, nn.ModuleList(chosen.values()))
    return chosen


def _run(decoder: PreTrainedModel, layout: ThoughtLayout, watch: _Watch | None = None) -> Any:
    width = decoder.get_input_embeddings().embedding_dim
    packed = layout.phase == "packed"
    rows = sum(layout.slot_rows(layout.num_slots)) if packed else 0
    shape, dtype = (1, layout.text_length + rows, width), next(decoder.parameters()).dtype
    positions = layout.packed_positions() if packed else torch.arange(layout.text_length)[None]
    with watch or torch.no_grad():
        return text_body(decoder)(
            inputs_embeds=torch.zeros(shape, dtype=dtype).requires_grad_(packed),
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
            position_ids=positions,
            use_cache=False,
            thought_layout=layout,
        ).last_hidden_state


class _Watch(contextlib.ExitStack):
    """What each layer keeps for the backward pass, and operations of its products without weights."""

    def __init__(self, decoder: PreTrainedModel, layers: dict[str, nn.Module]):
        super().__init__()
        self.kept: Counter[str] = Counter()
        self.shared: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        self.allocations = _Allocations()
        self._given: dict[int, Tensor] = {}
        self._now: str | None = None
        self._seen = {self.allocations.key(p.untyped_storage()) for p in decoder.parameters()}
        for kind, layer in layers.items():
            layer.register_forward_pre_hook(functools.partial(self._enter, kind))
            layer.register_forward_hook(functools.partial(self._leave, kind))
            for part in layer.modules():
                if isinstance(part, nn.Linear):
                    part.register_forward_hook(self._note)
        self.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept))
        self.enter_context(_Operators(self))

    def run_back(self, hidden: Tensor) -> None:
        """The backward pass of what was watched."""
        self._given.clear()
        with _Operators(self):
            hidden.backward(torch.ones_like(hidden))

    def _enter(self, kind: str, *_: Any) -> None:
        self._now = kind
        self.allocations.mark(kind, "in")

    def _leave(self, kind: str, _: Any, __: Any, output: Any) -> None:
        self._now = None
        given = output[0] if isinstance(output, tuple) else output
        if given.requires_grad:
            self.allocations.mark(kind, "out")
            given.register_hook(lambda _: self.allocations.mark(kind, "back"))

    def _note(self, _: Any, __: Any, output: Tensor) -> None:
        self._given[output.untyped_storage()._cdata] = output  # held, so that no other takes its place

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = self.allocations.key(storage)
        if self._now is not None and key not in self._seen:
            self._seen.add(key)
            self.kept[self._now] += storage.nbytes()
            if storage._cdata in self._given:
                self.shared[self._now] += storage.nbytes()
        return tensor

    def note(self, operator: Any, arguments: Any, output: Any) -> None:
        """Add one call's output, and its operations, if it is a layer's product without a weight."""
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self.allocations.add(tensor)
        if self._now is None:
            return
        if operator is torch.ops.aten.bmm.default:
            left, right = arguments[:2]
            self.products[self._now] += 2 * left.numel() * right.shape[-1]
        elif operator is torch.ops.aten.linalg_solve_triangular.default:
            left, right = arguments[:2]
            self.products[self._now] += left.shape[-1] * right.numel()


class _Operators(TorchDispatchMode):
    def __init__(self, watch: _Watch):
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = operator(*args, **(kwargs or {}))
        self._watch.note(operator, args, output)
        return output


class _Allocations:
    """When memory was taken and given back, and where among it each layer's passes were."""

    def __init__(self) -> None:
        self._changes: list[tuple[int, int]] = []  # the storage's number, bytes
        self._alive: dict[int, int] = {}
        self._count = 0
        self._marks: dict[tuple[str, str], int] = {}

    def add(self, tensor: Tensor) -> None:
        """Note a tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._count += 1
        self._alive[key] = self._count
        self._changes.append((self._count, size))
        weakref.finalize(storage, self._free, key, size)

    def key(self, storage: torch.UntypedStorage) -> int:
        """A number that no other storage ever has; an address may be another's later."""
        return self._alive.get(storage._cdata, -storage._cdata)

    def _free(self, key: int, size: int) -> None:
        self._changes.append((self._alive.pop(key), -size))

    def mark(self, kind: str, place: str) -> None:
        """A layer is entered (``in``) or left (``out``), or its backward pass begins (``back``), where
        that of the layer behind it ends."""
        self._marks.setdefault((kind, place), len(self._changes))

    def in_hand(self, kind: str, decoder: PreTrainedModel) -> float:
        """Bytes at a layer's peak besides what is there between its forward and its backward pass."""
        grads = (p.grad for p in decoder.parameters() if p.grad is not None)
        left_out = {self._alive.get(g.untyped_storage()._cdata) for g in grads}
        begin = self._marks[kind, "back"]
        later = (at for (_, place), at in self._marks.items() if place == "back" and at > begin)
        forward = self._changes[self._marks[kind, "in"] : self._marks[kind, "out"]]
        back = self._changes[begin : min(later, default=len(self._changes))]
        changes = [(number, -change) for number, change in reversed(forward)]
        return max(_highest(part, left_out) for part in (changes, back))


def _highest(changes: list[tuple[int, int]], left_out: set[int | None]) -> float:
    level = highest = 0
    for number, change in changes:
        if number not in left_out:
            level += change
            highest = max(highest, level)
    return highest


def _weights(layer: nn.Module) -> int:
    return sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))


def _remembered(text: ThoughtLayout, layer: nn.Module, columns: int, slots: int) -> float:
    """Bytes of a rollout, from what a text pass has left in its layout."""
    index = {getattr(m, "layer_idx", None) for m in layer.modules()}
    found = 0.0
    for number, keys in text.keys.items():
        if number in index:
            share = (keys.k_text.nbytes + keys.v_text.nbytes) / text.text_length
            found += share * (text.text_length + columns * slots)
    for number, states in text.states.items():
        if number not in index:
            continue
        if states.inputs is not None:
            found += states.inputs.nbytes * (1 + BEHIND * columns / text.text_length)
        if (memory := states.memory) is not None:
            sizes = (t.shape[-1] for t in (memory.keys, memory.values, memory.decay))
            of_slot = memory.keys.shape[1] * sum(sizes)
            found += sum(t.nbytes for t in memory) + 4 * of_slot * columns * slots
    return found
