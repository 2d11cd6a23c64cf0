"""How many kernels a CUDA device launches for a piece of work, counted without one.

The work runs on the CPU with the shapes that it has on the device, and every operator is counted as it
passes. Values do not matter and are not computed where that takes time: products and our kernels give
zeros. The rules:

- an operator of torch is one launch; views, empty tensors and new memory are none. Some are more, by
  the kernels that torch runs (:data:`SEVERAL`; sums are the host code's and those of a profile of an
  H200). cuBLAS's own extra kernels (clearing a workspace, adding up parts of a product) are not counted.
- an operator of ours runs its CUDA path's host code, with kernels that only count: each ``launch`` of
  ``csrc/cuda``, planned as for an H200, and each of torch's operators around them.
- what is compiled is compiled for CUDA (:mod:`benchmarks.launches_compiled`), and each call counts the
  launches in the code that inductor made.
- ``torch.optim``'s fused AdamW is one launch for 320 blocks of 65,536 elements, which is torch's own
  cutting.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from quietstar_ext import checks
from quietstar_ext.mixing_head import fused as mixing_head
from quietstar_ext.native import DTYPE_CODES, cuda_on_cpu
from quietstar_ext.operators import implementations
from quietstar_ext.thought_attention.composed import use_path

MULTIPROCESSORS = 132
# Bytes from which on values are not computed. The C library gives memory of that size as pages that
# read as zeros, and that take no room until they are written.
LARGE = 33 << 20
# Operators that torch runs as several kernels.
SEVERAL = {
    "embedding_dense_backward": 2,  # zeros, and the sum; for more than 3,072 ids: SORTED
    "_scaled_dot_product_flash_attention_for_cpu_backward": 5,  # cuDNN's, by the profile
    # A copy, or zeros, and what is written into it.
    "masked_fill": 2,
    "slice_backward": 2,
    "select_backward": 2,
    "constant_pad_nd": 2,
    "index_add": 2,
    "index_copy": 2,
    "scatter": 2,
    # The device's own sorting and scanning.
    "nonzero": 4,
    "sort": 4,
}
# A table's gradient from more ids than 3,072 is summed behind a sort, in about so many kernels.
SORTED_IDS, SORTED = 3072, 16
KINDS = ("products", "attention", "other operators of ours", "fused", "elementwise", "copies")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_STOCK_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
_COPIES = (
    *("_to_copy", "arange", "cat", "clone", "copy", "fill", "full", "full_like", "new_full"),
    *("new_ones", "new_zeros", "ones", "ones_like", "scalar_tensor", "stack", "zero", "zeros"),
    *("zeros_like", "_local_scalar_dense"),
)
_NO_LAUNCH = ("_unsafe_view", "_reshape_alias", "detach", "lift_fresh", "resize", "set")
_NEW_MEMORY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Launches(TorchDispatchMode):
    """Counts what runs inside the block.

    Attributes:
        found: launches by part, kind and name.
        part: which part the work now belongs to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str, str]] = Counter()
        self.part = "heads and losses"
        self._uncounted = self._ours = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch.compile compiles under this mode as without it."""
        return True

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """A block whose operators somebody else has counted."""
        self._uncounted += 1
        try:
            yield
        finally:
            self._uncounted -= 1

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """A block that belongs to a part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def add(self, kind: str, name: str, count: int = 1) -> None:
        """Count launches of the current part."""
        if not self._uncounted:
            self.found[self.part, kind, name] += count

    def by(self, place: int) -> Counter[str]:
        """Sums by part (0), kind (1) or name (2)."""
        sums: Counter[str] = Counter()
        for key, count in self.found.items():
            sums[key[place]] += count
        return sums

    def table(self) -> dict[str, dict[str, int]]:
        """Launches by part, and there by kind."""
        sums: dict[str, dict[str, int]] = {}
        for (part, kind, _), count in self.found.items():
            row = sums.setdefault(part, {})
            row[kind] = row.get(kind, 0) + count
        return sums

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, in_place = func._schema.name.split("::")[1], func._schema.name.endswith("_")
        if func.namespace == "quietstar":
            return self._run_ours(func, args, kwargs)
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        name = name.removesuffix("_")
        if name in _NEW_MEMORY:
            # What our operators would write stays as it is here, and may be ids.
            made = func(*args, **kwargs)
            return made.zero_() if made.device.type == "cpu" and made.nbytes < LARGE else made
        if name in _PRODUCTS:
            made = _product(func, args, kwargs)
            self.add("products", name, int(made.numel() > 0))
            return made
        if func.is_view or name in _NO_LAUNCH or not _moves(func):
            return func(*args, **kwargs)
        made = _of_shape(func, args, kwargs)
        if any(isinstance(each, Tensor) and each.numel() for each in tree_leaves((args, made))):
            count = 1 if in_place else SEVERAL.get(name, 1)
            if name == "embedding_dense_backward" and args[1].numel() > SORTED_IDS:
                count = SORTED
            kind = "attention" if name.startswith(_STOCK_ATTENTION) else "elementwise"
            self.add("copies" if name in _COPIES else kind, name, count)
        return made

    def _run_ours(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operator's host code, under this mode."""
        with self:
            return implementations[func._schema.name](*args, **kwargs)


def _of_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator gives; of large tensors only its shape, in memory that is not touched."""

    def shape_of(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("meta")
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    def memory_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        return made if made.nbytes >= LARGE else made.zero_()

    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    if all(each.nbytes < LARGE or each.device.type != "cpu" for each in tensors):
        return func(*args, **kwargs)
    if func._schema.is_mutable:
        return kwargs.get("out", args[0])
    return tree_map(memory_of, func(*tree_map(shape_of, args), **tree_map(shape_of, kwargs)))


def _moves(func: Any) -> bool:
    """Whether an operator gives or changes a tensor, or reads one on the host."""
    returns = [str(each.type) for each in func._schema.returns]
    return any("Tensor" in kind for kind in returns) or "_local_scalar_dense" in func._schema.name


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a product gives, of zeros."""
    if "out" in kwargs:
        return kwargs["out"]
    if func._schema.name.endswith("_"):
        return args[0]
    left, right = args[-2:] if "add" in func._schema.name else args[:2]
    made = left.new_empty(*left.shape[:-1], right.shape[-1])
    return made if made.nbytes >= LARGE else made.zero_()


def adamw_launches(parameters: Iterable[Tensor]) -> int:
    """Of one step of ``torch.optim.AdamW(fused=True)``: a launch has room for 36 tensors and 320 blocks
    (``MultiTensorApply.cuh``)."""
    launches = tensors = blocks = 0
    for parameter in parameters:
        chunks = -(-parameter.numel() // 65536)
        tensors += 1
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if blocks == 320 or (last and tensors == 36):
                launches += 1
                blocks = 0
                tensors = 0 if last else 1
    return launches + (blocks > 0)


class _Counting(SimpleNamespace):
    """Stands for the module with the CUDA functions: plans a call as they do for an H200, and counts."""

    def __init__(self, count: Callable[[str, str, int], None]):
        self._count = count
        super().__init__(
            cuda_mixing_max_width=lambda device: 1 << 16,
            cuda_mixing_workspace=lambda *sizes: 1,
            cuda_sample_tokens_workspace=lambda *sizes: 1,
            cuda_thought_attention_workspace=lambda *call: 1,
            cuda_thought_attention_shared_memory=lambda *sizes: (0, 1),
            cuda_mixing_first=self._counts("mixing_head", 1),
            cuda_mixing_tail=self._counts("mixing_head", 1),
            # With the sum over blocks.
            cuda_mixing_tail_backward=self._counts("mixing_head_backward", 2),
            cuda_mixing_first_backward=self._counts("mixing_head_backward", 2),
            cuda_banned_tokens=self._counts("linear_cross_entropy", 1),
            cuda_scale_in_place=self._counts("linear_cross_entropy", 1),
        )

    def _counts(self, name: str, launches: int) -> Callable[..., None]:
        return lambda *call: self._count("other operators of ours", name, launches)

    def cuda_softmax_cross_entropy(self, call: tuple[Any, ...], device: Any) -> None:
        """Gives losses of several sizes: without a difference no thought would be rewarded."""
        rows, losses = call[2], call[9]
        written = (ctypes.c_float * rows).from_address(losses)
        for row in range(rows):
            written[row] = row % 7
        self._count("other operators of ours", "linear_cross_entropy", 1)

    def cuda_sample_tokens(self, call: tuple[Any, ...], device: Any) -> None:
        """A row's parts first where rows are few, unless the fast kernels take such rows in one go; a
        bitmap (cleared, filled) where many are banned."""
        dtype, rows, vocab, banned = call[1], call[2], call[3], call[10]
        wide = dtype == DTYPE_CODES[torch.float32]
        pack = 4 if wide else 8
        chunks = -(-(vocab + pack - 1) // (128 * pack))
        entries = -(-chunks // -(-chunks // 512))
        block = 8 * -(-rows * entries // (32 * MULTIPROCESSORS))
        temperature, top_k, top_p, min_p = call[5:9]
        plain = temperature > 0 and top_k == 0 and top_p == 1 and min_p == 0 and call[17:] == (1, 0)
        at_once = plain and not wide and entries <= 64
        launches = 1 + (rows < MULTIPROCESSORS and entries > block and not at_once) + 2 * (banned > 64)
        self._count("other operators of ours", "sample_tokens", launches)

    def cuda_thought_attention(self, call: tuple[Any, ...], device: Any) -> None:
        """Keys are split, and the parts merged, where blocks of rows are fewer than multiprocessors."""
        rows, pairs, length, *_ = _attention_sizes(call)
        split = -(-rows // 128) * pairs < MULTIPROCESSORS and length > 64
        self._count("attention", "thought_attention", 1 + split)

    def cuda_thought_attention_backward(self, call: tuple[Any, ...], device: Any) -> None:
        """Ranges, rows, slot keys, text keys, and the sum of these keys' parts where they are few."""
        rows, pairs, length, size, slots = _attention_sizes(call[0])
        keys, block = (64, 32) if size <= 64 else (128, 64) if size <= 96 else (128, 32)
        tiles = -(-length // keys)
        parts = min(-(-2 * MULTIPROCESSORS // (pairs * (tiles + 1))), -(-rows // block) // 2)
        self._count(
            "attention", "thought_attention_backward", 3 + (slots > 0) + (parts > 1 and tiles > 0)
        )


def _attention_sizes(call: tuple[Any, ...]) -> tuple[int, int, int, int, int]:
    """Rows for a key head, pairs of text and key head, text tokens, a head's size (16 bits an element,
    128 at most), slots with keys."""
    _, batch, heads, kv_heads, slots, key_slots, columns, length, size = call[:9]
    return slots * columns * (heads // kv_heads), batch * kv_heads, length, size, key_slots


@contextlib.contextmanager
def counted() -> Iterator[Launches]:
    """Counts what runs inside the block, as on a CUDA device with one text kernel for all slots."""
    launches = Launches()
    # The device has this product as one operator, the CPU casts first.
    wide = mock.patch.object(mixing_head, "wide_product", lambda a, b: torch.mm(a.float(), b.float()))
    # Nor does it look at what is on it.
    blind = mock.patch.object(checks, "_can_look", lambda indices: False)
    with blind, cuda_on_cpu(_Counting(launches.add)), use_path("fused"), wide, launches:  # type: ignore[arg-type]
        yield launches
