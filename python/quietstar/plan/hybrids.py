"""What the layers of a hybrid decoder keep and compute, counted in a pass that takes no memory.

Layers that hand states on come in several kinds, and those that attend between them have gates and norms
of their own. So nothing of them is written down as a formula: one layer of each kind runs a packed pass
over one text on fake tensors, which have shapes and no numbers, and what autograd keeps is added up.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
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
        products: operations of its products without weights, forward.
        remembered: bytes that it keeps during a rollout.
    """

    count: int
    kept: float
    shared: float
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
                made = _run(decoder, packed, watch)
                _run(decoder, text)
            del made
        columns = shape.anchors * shape.rationales
        for kind, layer in layers.items():
            # The casts of its weights are counted with the other layers'.
            casts = 2 * _weights(layer) if autocast else 0
            remembered = _remembered(text, layer, columns, shape.slots)
            kept, shared, products = (each[kind] for each in (watch.kept, watch.shared, watch.products))
            yield LayerKind(types[kind], kept - casts, shared, products, remembered)


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
        self._given: dict[int, Tensor] = {}
        self._now: str | None = None
        self._seen = {p.untyped_storage()._cdata for p in decoder.parameters()}
        for kind, layer in layers.items():
            layer.register_forward_pre_hook(functools.partial(self._enter, kind))
            layer.register_forward_hook(self._leave)
            for part in layer.modules():
                if isinstance(part, nn.Linear):
                    part.register_forward_hook(self._note)
        self.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept))
        self.enter_context(_Products(self))

    def _enter(self, kind: str, *_: Any) -> None:
        self._now = kind

    def _leave(self, *_: Any) -> None:
        self._now = None

    def _note(self, _: Any, __: Any, output: Tensor) -> None:
        self._given[output.untyped_storage()._cdata] = output  # held, so that no other takes its place

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if self._now is not None and storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.kept[self._now] += storage.nbytes()
            if storage._cdata in self._given:
                self.shared[self._now] += storage.nbytes()
        return tensor

    def count(self, operator: Any, arguments: Any) -> None:
        """Add the operations of one call, if it is a product without a weight."""
        if self._now is None:
            return
        if operator is torch.ops.aten.bmm.default:
            left, right = arguments[:2]
            self.products[self._now] += 2 * left.numel() * right.shape[-1]
        elif operator is torch.ops.aten.linalg_solve_triangular.default:
            left, right = arguments[:2]
            self.products[self._now] += left.shape[-1] * right.numel()


class _Products(TorchDispatchMode):
    def __init__(self, watch: _Watch):
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._watch.count(operator, args)
        return operator(*args, **(kwargs or {}))


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
