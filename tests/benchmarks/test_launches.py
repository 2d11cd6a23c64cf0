"""Counted launches: the rules, our kernels' own count, and a packed pass that must not launch more."""

import functools
from collections import Counter
from collections.abc import Callable

import attention_cases
import cuda_sources
import linear_cross_entropy_cases
import pytest
import torch
import torch.nn.functional as F
from benchmark_files import benchmark

import quietstar_ext as ext
from quietstar_ext.native import cuda_on_cpu

launches = benchmark("launches")
steps = benchmark("bench_launches")
compiled = benchmark("launches_compiled")

# What a layer and all else of a packed pass launches at most, forward and backward: whoever makes it
# less writes the smaller number here.
LAYER, REST = {"off": 151, "compile": 72}, 76
SHAPE_LAYERS = 32


def kinds_of(run: Callable[[], object]) -> Counter[str]:
    with launches.counted() as found:
        run()
    return found.by(1)


class TestRules:
    def test_what_moves_nothing(self):
        x = torch.randn(4, 6)
        run = [
            lambda: x.view(6, 4).T[1:, None].expand(3, 5, 6).unbind(),
            lambda: torch.empty_like(x).new_empty(3),
            lambda: x.detach().reshape(24),
            lambda: torch.empty(0) + 1,
        ]
        assert [kinds_of(each) for each in run] == [Counter()] * 4

    def test_kinds(self):
        x = torch.randn(2, 4, 6).requires_grad_()
        weight = torch.randn(3, 6).requires_grad_()
        assert kinds_of(lambda: F.linear(x, weight)) == {"products": 1}
        assert kinds_of(lambda: F.linear(x.transpose(0, 1), weight)) == {"products": 1, "copies": 1}
        assert kinds_of(lambda: (x.exp() + x).sum()) == {"elementwise": 3}
        # The gradient's ones, expanded; two products; their sum in x's gradient, and its copy.
        both = kinds_of(lambda: (F.linear(x, weight) + F.linear(x, weight)).sum().backward())
        assert both["products"] == 2 + 4

    def test_values_of_large_tensors_are_not_computed(self, monkeypatch):
        monkeypatch.setattr(launches, "LARGE", 1000)
        x, small = torch.ones(20, 20), torch.ones(2)
        with launches.counted() as found:
            y, z = (x * 2).bfloat16() + 1, small * 2
            written = x.mul_(3)
        assert y.shape == x.shape and y.dtype == torch.bfloat16 and z.tolist() == [2, 2]
        assert written is x and float(x.max()) == 1
        assert found.by(2) == {"mul": 3, "_to_copy": 1, "add": 1}

    @pytest.mark.parametrize(
        ("sizes", "wanted"),
        # A launch has room for 320 blocks of 65,536 elements, and for 36 tensors.
        [([65536 * 320], 1), ([65536 * 320 + 1], 2), ([1] * 36, 1), ([1] * 37, 2), ([], 0)],
    )
    def test_adamw(self, sizes: list[int], wanted: int):
        assert launches.adamw_launches(torch.empty(size, device="meta") for size in sizes) == wanted

    def test_layers(self):
        counts = {d: {"forward": {"products": 5 + 7 * d, "copies": 3}} for d in (1, 2, 4)}
        assert steps.extrapolated(counts, 32) == {"forward": {"products": 229, "copies": 3}}
        counts[4]["forward"]["copies"] = 4
        with pytest.raises(ValueError, match="has 3, 3 and 4 copies with 1, 2 and 4 layers"):
            steps.extrapolated(counts, 32)


def attention(rows: int, text: int, size: int, slots: int = 2) -> None:
    sizes = (1, 2, 1, slots, slots, rows, text, size)
    tensors, start, stop, _ = attention_cases.make(*sizes, dtype=torch.bfloat16)
    ext.thought_attention(*tensors, start, stop, impl="fused").float().sum().backward()


def cross_entropy(**options: torch.Tensor) -> None:
    tensors = linear_cross_entropy_cases.make(9, 32, 67, torch.bfloat16)
    ext.linear_cross_entropy(*tensors, impl="fused", **options).sum().backward()


def mixing(rows: int) -> None:
    base, thought = (torch.randn(n, 16, dtype=torch.bfloat16).requires_grad_() for n in (5, rows))
    shapes = [(16, 32), (16,), (16, 16), (16,), (1, 16)]
    weights = [torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    mixed, w = ext.mixing_head(base, thought, *weights, base_index=torch.arange(rows) % 5, impl="fused")
    (mixed.sum() + w.sum()).backward()


def sample(rows: int, banned: int, vocab: int = 30000, **options: float) -> None:
    ids = torch.arange(banned) if banned else None
    logits = torch.randn(rows, vocab).bfloat16()
    ext.sample_tokens(logits, seed=1, banned=ids, impl="fused", **options)


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize(
    "run",
    [
        functools.partial(attention, 40, 100, 128),
        functools.partial(attention, 3, 20, 128),
        functools.partial(attention, 3, 100, 64, slots=1),
        functools.partial(attention, 200, 70, 64),
        cross_entropy,
        functools.partial(cross_entropy, banned=torch.tensor([1, 4])),
        functools.partial(mixing, 12),
        functools.partial(sample, 2, 0),
        functools.partial(sample, 2, 0, vocab=3000),
        functools.partial(sample, 6, 0),
        functools.partial(sample, 2, 70),
        functools.partial(sample, 2, 0, vocab=70000),
        functools.partial(sample, 2, 0, top_p=0.9),
    ],
)
def test_our_operators_launch_so_many(run: Callable[[], None], monkeypatch):
    """Against the sources: their launches on the CPU, whose device has three multiprocessors."""
    monkeypatch.setattr(launches, "MULTIPROCESSORS", 3)
    module = cuda_sources.load()
    before = module.launches()
    with cuda_on_cpu(module):
        run()
    kinds = kinds_of(run)
    counted = kinds["attention"] + kinds["other operators of ours"]
    assert counted == module.launches() - before > 0


def packed_pass(way: str) -> tuple[int, int]:
    """Launches of a packed pass, forward and backward: of a layer, and of all else."""
    ids = torch.randint(0, 60, (1, 24))
    found = []
    for layers in (1, 2):
        by_part = steps.count_step(steps.build("tiny", layers), ids, way).by(0)
        assert set(by_part) == set(steps.PARTS) - {steps.OPTIMIZER}
        found.append(sum(count for part, count in by_part.items() if part.startswith("packed pass")))
    one, two = found
    return two - one, 2 * one - two


def test_a_packed_pass_launches_no_more():
    layer, rest = packed_pass("off")
    assert layer <= LAYER["off"] and rest <= REST


@pytest.mark.slow
def test_compiled_layers_halve_a_packed_pass():
    """As inductor would compile them for an H200, with the layers of the Mistral-7B shape."""
    as_they_are, compiled_layers = packed_pass("off"), packed_pass("compile")
    layer, rest = compiled_layers
    assert layer <= LAYER["compile"] and rest <= REST
    whole = [each * SHAPE_LAYERS + rest for each, rest in (as_they_are, compiled_layers)]
    assert whole[1] <= whole[0] / 2


@pytest.mark.slow
def test_compiled_code_is_counted():
    """A norm is one kernel, a product and what follows it two launches more."""

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return F.silu(F.linear(normed, weight)) * x

    x, weight = torch.randn(8, 64), torch.randn(64, 64)
    with launches.counted() as found, compiled.compiled_for_cuda(found):
        y = torch.compile(run)(x, weight)
    assert found.by(1) == {"fused": 2, "products": 1} and y.shape == x.shape
    assert all(name.startswith("triton_") for _, kind, name in found.found if kind == "fused")
