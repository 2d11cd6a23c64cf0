"""The CUDA kernels of mixing_head: the same tests run by the CPU (cuda_on_cpu) and on a device (gpu)."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from mixing_head_cases import NAMES, concatenated, gradients, make, make_clear_of_zero
from mixing_head_cuda_cases import (
    DTYPES,
    fused,
    make_with_large_biases,
    moved,
    truth,
)
from torch import Tensor

from quietstar_ext import mixing_head
from quietstar_ext.mixing_head import fused as mixing_head_cuda
from quietstar_ext.native import DTYPE_CODES, cuda_kernels
from quietstar_ext.precision import compute_dtype

# Where a test runs: "cpu", with the CUDA sources compiled for it, or "cuda".
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.cuda_on_cpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a test's tensors, on which the CUDA kernels run; that they did is asserted."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")
        yield "cuda"
        return
    module: ModuleType = request.getfixturevalue("cuda_on_cpu")
    before = module.launches()
    yield "cpu"
    assert module.launches() > before, "no CUDA kernel ran"


ORDERS = ["forward", "reverse", "shuffled"]
#             P  rows  d  base_index
SHAPES = {
    "row for row": (9, 9, 8, False),
    "one element": (1, 1, 1, True),
    "one row": (3, 1, 16, True),
    "odd width": (4, 21, 19, True),
    "some bases unused": (40, 7, 24, True),
    "one base": (1, 11, 32, True),
    "many rows": (60, 131, 40, True),
}


@pytest.mark.parametrize("activation", ["identity", "sigmoid"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_the_reference(device, shape, activation) -> None:
    tensors, index = moved(make_clear_of_zero(*shape, dtype=torch.float32), device)
    wanted = truth(tensors, activation, index)
    for name, a, b in zip(
        ["mixed", "w", *NAMES], fused(tensors, activation, index), wanted, strict=True
    ):
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1)
        assert error < 2e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_budget(device, dtype) -> None:
    """Our error against the fp64 truth is within that of the same MLP in this dtype."""
    names = ["mixed", "w", *NAMES]
    errors, budgets, sizes = (dict.fromkeys(names, 0.0) for _ in range(3))
    shape = (20, 60, 64) if device == "cpu" else (512, 2048, 512)
    for _ in range(6):
        tensors, index = make_with_large_biases(*shape, dtype, device)
        outputs = concatenated(tensors, "identity", index)
        theirs = [*outputs, *gradients(outputs, tensors)]
        ours, exact = fused(tensors, "identity", index), truth(tensors, "identity", index)
        assert all(o.dtype == dtype for o in ours)
        for name, t, a, b in zip(names, exact, ours, theirs, strict=True):
            errors[name] += float((a - t).detach().norm())
            budgets[name] += float((b - t).detach().norm())
            sizes[name] += float(t.detach().norm())
    unit = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    for name in names:
        assert errors[name] <= budgets[name] + unit * sizes[name], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_cancel_before_they_are_rounded(device, dtype) -> None:
    """The halves of the first layer are 100 times as large as their sum: rounded to 16 bits before they
    are added, hardly a digit of it would be left."""
    width = 32
    base, index = torch.randn(5, width).to(dtype), torch.randint(0, 5, (20,))
    near = 1 + torch.randint(-1, 2, (20, width)) / 128
    thought = (base[index] * near).to(dtype)
    w_base = (torch.randn(width, width) * 64).to(dtype)
    w1, b1 = torch.cat([w_base, -w_base], 1), torch.randn(width).to(dtype)
    w2, b2 = torch.eye(width, dtype=dtype), torch.zeros(width, dtype=dtype)
    w3 = torch.randn(1, width).to(dtype)
    tensors, index = moved(([base, thought, w1, b1, w2, b2, w3], index), device)
    _, w = mixing_head(*tensors, base_index=index, impl="fused")
    exact = [t.detach().double() for t in tensors]
    _, wanted = mixing_head(*exact, base_index=index, impl="reference")
    exact[6].abs_()
    _, size = mixing_head(*exact, base_index=index, impl="reference")
    error = (w.detach().double() - wanted).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps * size.max()


@pytest.mark.parametrize(
    ("width", "rows", "dtype"),
    [(515, 3, torch.float32), (4104, 2, torch.bfloat16), (1032, 9, torch.float16)],
    ids=str,
)
def test_wide_rows_without_products(device, width, rows, dtype) -> None:
    """Rows with more pieces than a thread holds in registers; the products' place is taken by random
    numbers, as their size is not what is tested."""
    steps = Steps(positions=2, rows=rows, width=width, dtype=dtype, device=device)
    steps.run_and_check()


@pytest.mark.parametrize("rows", [7, 40])
def test_positions_of_many_rows(device, rows) -> None:
    """More rows of a position than are loaded at once, and more rows than a block's share."""
    steps = Steps(positions=3, rows=rows, width=24, dtype=torch.bfloat16, device=device)
    steps.index[: rows // 2] = 1
    steps.run_and_check()


class Steps:
    """The four kernels, each on operands of its own."""

    def __init__(self, positions: int, rows: int, width: int, dtype: torch.dtype, device: str) -> None:
        self.dtype = dtype
        wide = compute_dtype(dtype)
        self.index = torch.randint(0, positions, (rows,)).to(device)

        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape).to(device, dtype)

        def poison(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.full(shape, torch.nan, device=device, dtype=dtype)

        by_row, by_position = (rows, width), (positions, width)
        self.tensors = {
            "index": self.index,
            "base": draw(*by_position),
            "thought": draw(*by_row),
            "from_base": draw(*by_position, dtype=wide),
            "product": draw(*by_row, dtype=wide),
            "b1": draw(width),
            "h1": poison(*by_row),
            "h2": draw(*by_row),
            "w3": draw(width) / width**0.5,
            "mixed": poison(*by_row),
            "w": poison(rows),
            "gate": poison(rows, dtype=wide),
            "grad_mixed": draw(*by_row),
            "grad_gate": draw(rows, dtype=wide),
            "grad_thought": poison(*by_row),
            "grad_base": poison(*by_position),
            "grad_h1": draw(*by_row),
            "grad_from_base": poison(*by_position),
            "grad_h2": poison(*by_row),
            "grad_b1": poison(width),
            "grad_b2": poison(width),
            "grad_w3": poison(width),
        }
        code = DTYPE_CODES[dtype]
        self.sizes = (code, rows, positions, width, True)
        size = cuda_kernels().cuda_mixing_workspace(code, rows, positions, width)
        self.tensors["workspace"] = poison(size, dtype=torch.float32)

    def run(self, step: str) -> None:
        mixing_head_cuda._launch(step, self.sizes, self.tensors)

    def equal(self, name: str, wanted: Tensor) -> None:
        """An output, but for its rounding and that of fp32 sums."""
        got = self.tensors[name].double()
        unit = torch.finfo(self.dtype).eps
        tolerance = unit * wanted.abs() + 1e-5 * wanted.abs().max() + 1e-6
        assert ((got - wanted).abs() <= tolerance).all(), name

    def run_and_check(self) -> None:
        t = {name: x.double() for name, x in self.tensors.items() if x.is_floating_point()}
        index, positions = self.index, t["base"].shape[0]
        self.run("first")
        self.equal("h1", (t["product"] + t["from_base"][index] + t["b1"]).relu())
        self.run("tail")
        gate = (t["h2"].relu() @ t["w3"]).sigmoid()
        self.equal("gate", gate)
        self.equal("w", gate)
        self.equal("mixed", torch.lerp(t["base"][index], t["thought"], gate[:, None]))

        self.run("tail_backward")
        difference = t["thought"] - t["base"][index]
        outer = t["grad_gate"] + (t["grad_mixed"] * difference).sum(1)
        outer = (outer * gate * (1 - gate))[:, None]
        grad_h2 = torch.where(t["h2"] > 0, outer * t["w3"], 0.0)
        self.equal("grad_thought", gate[:, None] * t["grad_mixed"])
        self.equal("grad_h2", grad_h2)
        self.equal("grad_b2", grad_h2.sum(0))
        self.equal("grad_w3", (outer * t["h2"].relu()).sum(0))

        self.tensors["workspace"].fill_(torch.nan)
        first, order = mixing_head_cuda._rows_of_positions(index, positions)
        self.tensors.update(first=first, order=order)
        self.run("first_backward")
        masked = torch.where(self.tensors["h1"] > 0, t["grad_h1"], 0.0)
        self.equal("grad_h1", masked)

        def by_position(rows: Tensor) -> Tensor:
            return torch.zeros_like(t["base"]).index_add_(0, index, rows)

        self.equal("grad_from_base", by_position(masked))
        self.equal("grad_b1", masked.sum(0))
        self.equal("grad_base", by_position((1 - gate[:, None]) * t["grad_mixed"]))


def test_zero_last_layer(device) -> None:
    """As initialised: w = 0, the mixture is the base to the last bit, and w3 still learns."""
    tensors, index = moved(make(5, 23, 16, True, dtype=torch.bfloat16), device)
    tensors[6] = torch.zeros_like(tensors[6]).requires_grad_()
    mixed, w, *grads = fused(tensors, "identity", index)
    assert not w.any()
    assert torch.equal(mixed, tensors[0][index])
    found = dict(zip(NAMES, grads, strict=True))
    assert found["w3"].any()
    assert not any(found[name].any() for name in ["w1", "b1", "w2", "b2", "thought"])


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize(("positions", "rows"), [(0, 0), (3, 0), (3, 2)])
def test_positions_without_rows(cuda_on_cpu, positions, rows) -> None:
    tensors, _ = make(positions, rows, 8, False, dtype=torch.float32)
    mixed, w, *grads = fused(tensors, "identity", torch.zeros(rows, dtype=torch.int64))
    assert mixed.shape == (rows, 8)
    assert w.shape == (rows, 1)
    assert not grads[0][1:].any()
    assert rows or not any(grad.any() for grad in grads)


def unaligned(tensor: Tensor) -> Tensor:
    """A contiguous copy that starts one element behind a multiple of 16 bytes."""
    storage = torch.full((tensor.numel() + 8,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    copy = storage[1 : 1 + tensor.numel()].view(tensor.shape)
    copy.copy_(tensor)
    return copy


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "change",
    [unaligned, lambda t: torch.stack([t, t * torch.nan], -1)[..., 0]],
    ids=["unaligned", "strided"],
)
def test_inputs_of_any_address(device, change, dtype) -> None:
    tensors, index = moved(make_clear_of_zero(6, 9, 16, True, dtype=dtype), device)
    plain = [t.detach() for t in tensors]
    wanted = fused(tensors, "sigmoid", index)
    got = fused([change(t).requires_grad_() for t in plain], "sigmoid", index)
    for name, a, b in zip(["mixed", "w", *NAMES], got, wanted, strict=True):
        # Other addresses may choose other products.
        error = (a.double() - b.double()).norm()
        assert error <= 8 * torch.finfo(dtype).eps * b.double().norm() + 1e-6, name


@pytest.mark.parametrize("place", range(2), ids=NAMES[:2])
def test_nan_stays_in_its_rows(device, place) -> None:
    tensors, index = moved(make(6, 30, 16, True, dtype=torch.bfloat16), device)
    with torch.no_grad():
        tensors[place][2, 5] = torch.nan
    mixed, w = mixing_head(*tensors, base_index=index, impl="fused")
    hit = index == 2 if place == 0 else torch.arange(30, device=index.device) == 2
    assert w[hit].isnan().all()
    assert mixed[hit].isnan().all()
    assert mixed[~hit].isfinite().all()
    assert w[~hit].isfinite().all()


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_same_bits_in_every_order(cuda_on_cpu, dtype) -> None:
    tensors, index = make(7, 33, 19 if dtype == torch.float32 else 40, True, dtype=dtype)
    results = []
    for order in ORDERS:
        cuda_on_cpu.set_order(order, 5)
        results.append(fused(tensors, "sigmoid", index))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("skip", range(6))
def test_a_failed_launch_is_reported(cuda_on_cpu, skip) -> None:
    tensors, index = make(5, 9, 8, True, dtype=torch.float32)
    cuda_on_cpu.fail_launch(skip)
    with pytest.raises(RuntimeError, match="kernel mixing_.*: injected launch failure"):
        fused(tensors, "identity", index)
    fused(tensors, "identity", index)


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("wrong", [-1, 2])
def test_an_index_out_of_range_is_found_by_the_kernel(cuda_on_cpu, wrong) -> None:
    steps = Steps(positions=2, rows=5, width=8, dtype=torch.float32, device="cpu")
    steps.index[3] = wrong
    with pytest.raises(RuntimeError, match="kernel mixing_first.*base_index is out of range"):
        steps.run("first")


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize(("kib", "most"), [(99, 12656), (163, 20480), (227, 20480)])
def test_widths_beyond_the_kernels(cuda_on_cpu, kib: int, most: int) -> None:
    """What a block's shared memory can hold, refused before anything is launched."""
    cuda_on_cpu.set_shared_memory_limit(kib * 1024)
    assert most == mixing_head_cuda.max_width(torch.device("cpu"))
    steps = Steps(positions=1, rows=1, width=most, dtype=torch.float32, device="cpu")
    for step in ("first", "tail", "tail_backward", "first_backward"):
        steps.run(step)
    zero = torch.zeros(1)
    size = most + 1
    shapes = [(1, size), (1, size), (size, 2 * size), (size,), (size, size), (size,), (1, size)]
    with pytest.raises(RuntimeError, match=f"takes widths up to {most} on this device, not {size}"):
        mixing_head(*(zero.expand(shape) for shape in shapes), impl="fused")
    steps = Steps(positions=1, rows=1, width=size, dtype=torch.float32, device="cpu")
    for step in ("first", "tail", "tail_backward", "first_backward"):
        with pytest.raises(ValueError, match=f"width is {size}; expected 1 to {most} on this device"):
            steps.run(step)


@pytest.mark.parametrize("width", [6128, 6144, 6149])
def test_widths_around_48_kib_of_shared_memory(device, width) -> None:
    """What a block may have without asking; 6144 is the width of real models."""
    steps = Steps(positions=1, rows=1, width=width, dtype=torch.bfloat16, device=device)
    for step in ("first", "tail", "tail_backward", "first_backward"):
        steps.run(step)
    assert all(steps.tensors[name].isfinite().all() for name in ("grad_b2", "grad_w3", "grad_h2"))


@pytest.mark.parametrize("positions", [4, 2**15])
def test_rows_of_positions(positions) -> None:
    index = torch.randint(0, min(positions, 40), (200,))
    first, order = mixing_head_cuda._rows_of_positions(index, positions)
    assert first.dtype == order.dtype == torch.int64
    assert first.shape == (positions + 1,)
    for p in range(min(positions, 41)):
        assert torch.equal(order[first[p] : first[p + 1]], (index == p).nonzero().flatten())
