"""The CUDA kernels of linear_cross_entropy, on a CPU (cuda_on_cpu) and on a device (gpu)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from linear_cross_entropy_cases import OPTIONS, make
from torch import Tensor

from quietstar_ext.linear_cross_entropy import linear_cross_entropy
from quietstar_ext.linear_cross_entropy.cuda import _Kernel, scale_
from quietstar_ext.linear_cross_entropy.softmax import SoftmaxCrossEntropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN: dict[str, Any] = {"temperature": 1.0, "banned": None, "softcap": None, "logit_scale": 1.0}
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def unaligned(rows: int, words: int, dtype: torch.dtype, offset: int, gap: int, device: str) -> Tensor:
    """Random logits that begin ``offset`` elements into memory full of NaN, rows ``gap`` apart."""
    memory = torch.full((offset + rows * (words + gap) + 16,), torch.nan, dtype=dtype, device=device)
    logits = memory[offset:][: rows * (words + gap)].view(rows, words + gap)[:, :words]
    return logits.copy_(torch.randn(rows, words) * 3)


#                 rows  words  offset  gap
LAYOUTS = {
    "one element": (1, 1, 0, 0),
    "one pack": (2, 8, 0, 0),
    "less than a pack": (3, 3, 1, 2),
    "aligned": (5, 64, 0, 0),
    "every offset": (19, 301, 3, 0),
    "padded": (4, 1003, 0, 5),
    "several loads": (2, 9001, 1, 0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_kernel(
    device: str, options: dict[str, Any], layout: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """Loss and gradient of logits wherever they lie, against fp64; nothing beside them is written."""
    rows, words, offset, gap = layout
    if words * rows > 5000 and device == "cpu" and dtype != torch.bfloat16:
        rows = min(rows, 3)
    options = PLAIN | options
    if options["banned"] is not None:
        few = [v for v in options["banned"] if v < words - 1] * 2
        options["banned"] = torch.tensor(few, device=device) if few else None
    logits = unaligned(rows, words, dtype, offset, gap, device)
    targets = torch.randint(0, words, (rows,), device=device)
    targets[: rows // 2] = words - 1
    live = torch.rand(rows, device=device) < 0.7
    live[-1] = True
    check_kernel(logits, targets, live=live, **options)
    memory = torch.empty(0, dtype=dtype, device=device).set_(logits.untyped_storage())
    assert memory.isnan().sum() == memory.numel() - logits.numel()


def check_kernel(
    logits: Tensor, targets: Tensor, row_weights: Tensor | None = None, **options: Any
) -> None:
    """Run the kernel on logits, without and with gradient, and compare with fp64."""
    live = options.pop("live", torch.ones_like(targets, dtype=torch.bool))
    row_weights = torch.randn(len(targets)).to(logits.device) if row_weights is None else row_weights
    options = PLAIN | options
    rows, words = logits.shape
    exact = logits.double()
    plain = SoftmaxCrossEntropy(exact, **options)
    assert not plain.fused
    wanted, *sums = plain.loss(exact, targets)
    plain.gradient_(exact, targets, row_weights, *sums)
    wanted.masked_fill_(~live, 0)
    exact.masked_fill_(~live[:, None], 0)

    kernel = _Kernel(SoftmaxCrossEntropy(logits, **options), logits.new_empty(words, 1))
    nll = torch.full((2, rows), torch.nan, device=logits.device)
    before = logits.clone()
    kernel(logits, targets, live, nll[0], None)
    assert torch.equal(logits, before)
    kernel(logits, targets, live, nll[1], row_weights)
    for each in nll:
        torch.testing.assert_close(each.double(), wanted, **CLOSE)
    rtol = max(3e-5, torch.finfo(logits.dtype).eps)
    atol = 1e-7 if logits.dtype == torch.float16 else 1e-12
    # (With softcap, y has the rounding of cap · tanh.)
    torch.testing.assert_close(logits.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
@pytest.mark.cuda_on_cpu
def test_kernel_in_any_order_of_threads(cuda_on_cpu: ModuleType, order: str) -> None:
    """More rows than blocks, so that a block's shared memory is used again; the same bits each time."""
    logits = torch.randn(8, 20_003).bfloat16()
    targets, row_weights = torch.randint(0, 20_003, (8,)), torch.randn(8)
    results = []
    for each in ("forward", order):
        cuda_on_cpu.set_order(each, 5)
        x, nll = logits.clone(), torch.full((8,), torch.nan)
        _Kernel(SoftmaxCrossEntropy(x, torch.tensor([7, 99]), 1.0, None, 1.0), x.T)(
            x, targets, None, nll, row_weights
        )
        results.append((x, nll))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_longer_than_shared_memory(device: str, dtype: torch.dtype) -> None:
    """What does not stay in shared memory is read again."""
    words = (164 if device == "cpu" else 300) * 1024 // dtype.itemsize + 4099
    rows = 4 if dtype == torch.bfloat16 else 2
    logits = unaligned(rows, words, dtype, 5, 3, device)
    targets = torch.tensor([words - 40, 40, 7, 8], device=device)[:rows]
    banned = torch.tensor([0, words - 1, words - 30], device=device)
    check_kernel(logits, targets, banned=banned)


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("words", [24_800, 49_650, 49_700, 60_003])
def test_rows_on_a_device_with_less_shared_memory(cuda_on_cpu: ModuleType, words: int) -> None:
    """Rows of which two, one, or not all of one fit into the 99 KiB that an RTX 4090's blocks have."""
    cuda_on_cpu.set_shared_memory_limit(99 * 1024)
    logits = unaligned(1, words, torch.bfloat16, 1, 0, "cpu")
    check_kernel(logits, torch.tensor([words - 2]))


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        *((24_327, torch.bfloat16), (24_328, torch.bfloat16), (24_583, torch.bfloat16)),
        *((12_164, torch.float32), (12_291, torch.float32)),
    ],
    ids=str,
)
def test_rows_around_48_kib_of_shared_memory(device: str, words: int, dtype: torch.dtype) -> None:
    """What a block may have without asking: its row and the sums beside it."""
    logits = unaligned(1, words, dtype, 0, 0, device)
    check_kernel(logits, torch.tensor([words - 2], device=device))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_any_number_of_banned_words(device: str, share: float) -> None:
    """Including targets: their loss is inf, and their gradient that of the log-sum-exp."""
    logits = unaligned(9, 709, torch.float32, 2, 1, device)
    targets = torch.randint(0, 709, (9,), device=device)
    banned = (torch.rand(709) < share).nonzero()[:, 0]
    outside = torch.tensor([-1, 709, 720, 2**40])  # neither read nor written past the mask
    kernel = _Kernel(
        SoftmaxCrossEntropy(logits, torch.cat([banned, outside]).to(device), 1.0, None, 1.0), logits.T
    )
    plain = SoftmaxCrossEntropy(logits.double(), banned.to(device), 1.0, None, 1.0)
    exact = logits.double()
    wanted, *sums = plain.loss(exact, targets)
    plain.gradient_(exact, targets, torch.ones(9, device=device), *sums)
    nll = torch.full((9,), torch.nan, device=device)
    kernel(logits, targets, None, nll, torch.ones(9, device=device))
    torch.testing.assert_close(nll.double(), wanted, **CLOSE)
    torch.testing.assert_close(logits.double(), exact, rtol=3e-5, atol=1e-12)
    assert nll.isinf().tolist() == torch.isin(targets.cpu(), banned).tolist()


def test_an_almost_certain_target_loses_no_digits(device: str) -> None:
    """1 - p and -log p near p = 1, where subtracting would leave nothing."""
    logits = torch.randn(6, 500, device=device)
    targets = torch.randint(0, 500, (6,), device=device)
    above = torch.tensor([5.0, 10, 15, 20, 30, 60], device=device)
    logits.scatter_(1, targets[:, None], above[:, None])
    others = logits.double().scatter(1, targets[:, None], -torch.inf).logsumexp(1) - above.double()
    nll = torch.full((6,), torch.nan, device=device)
    kernel = _Kernel(SoftmaxCrossEntropy(logits, None, 1.0, None, 1.0), logits.T)
    kernel(logits, targets, None, nll, torch.ones(6, device=device))
    torch.testing.assert_close(nll.double(), others.exp().log1p(), rtol=1e-5, atol=0)
    at_target = logits.gather(1, targets[:, None])[:, 0].double()
    torch.testing.assert_close(at_target, -others.sigmoid(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_huge_and_infinite_logits(device: str, softcap: float | None, dtype: torch.dtype) -> None:
    logits = torch.randn(21, 50, device=device).to(dtype)
    logits[1] *= 1e30
    logits[2, 3:40] = -torch.inf
    logits[4] = -1e38
    logits[5] = 1e38
    logits[6, 20] = 3e38
    logits[7] = -3e38
    logits[7, 30:] = torch.linspace(-2, 2, 20)
    targets = torch.randint(0, 3, (21,), device=device)
    check_kernel(logits, targets, torch.ones(21, device=device), softcap=softcap)


LATER = {
    "far above": {"first": 0.0, "later": 90.0},  # beyond what a sum of the first chunk's size holds
    "further": {"first": -50.0, "later": 50.0},
    "far below": {"first": 90.0, "later": 0.0},
    "behind nothing": {"first": -torch.inf, "later": -300.0},
    "large": {"first": 1000.0, "later": 1010.0},  # no exponents for the gradient's factor
    "larger": {"first": -3e4, "later": -3e4},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LATER.values(), ids=LATER.keys())
def test_later_logits_of_another_size(device: str, case: dict[str, float], dtype: torch.dtype) -> None:
    """A thread takes its powers relative to what it reads first, which banned tokens and the target must
    not decide."""
    words, seen = 2 * 4096 + 45, 4096
    logits = unaligned(3, words, dtype, 3, 0, device)
    logits[:, :seen] += case["first"]
    logits[:, seen:] += case["later"]
    banned = torch.tensor([5, 77, words - 1], device=device)
    logits[1, banned] = 200 + max(case.values())
    logits[2, 300] = 30 + max(case.values())
    targets = torch.tensor([seen + 9, words - 30, 300], device=device)
    row_weights = torch.tensor([1e-8, -2.0, 1e4], device=device)
    for scale in (1.0, -1.0):
        check_kernel(logits * scale, targets, row_weights, banned=banned, logit_scale=scale)


def test_a_nan_or_a_wrong_target_stays_in_its_row(device: str) -> None:
    """A row that takes no part is not even read."""
    logits = torch.randn(21, 90, device=device)
    logits[[5, 6], 70] = torch.nan
    targets = torch.zeros(21, dtype=torch.int64, device=device)
    targets[8], targets[9] = 90, -100
    live = torch.ones(21, dtype=torch.bool, device=device)
    live[6] = False
    weights = torch.ones(21, device=device)
    weights[11] = 0
    nll = torch.full((21,), torch.nan, device=device)
    kernel = _Kernel(SoftmaxCrossEntropy(logits, None, 1.0, None, 1.0), logits.T)
    kernel(logits, targets, live, nll, weights)
    assert nll.isnan().nonzero().flatten().tolist() == [5, 8, 9]
    assert logits.isnan().any(1).nonzero().flatten().tolist() == [5, 8, 9]
    assert nll[6] == 0
    assert nll[11] > 0
    assert not logits[[6, 11]].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_in_place(device: str, dtype: torch.dtype) -> None:
    for count, offset in ((0, 0), (1, 1), (5, 3), (3000, 0), (4097, 5)):
        memory = torch.full((count + offset + 9,), torch.nan, dtype=dtype, device=device)
        tensor = memory[offset : offset + count].copy_(torch.randn(count))
        for factor in (0.37, 1.0):
            wanted = (tensor.float() * torch.tensor(factor, device=device)).to(dtype)
            scale_(tensor, torch.tensor(factor, device=device))
            assert torch.equal(tensor, wanted)
        assert memory.isnan().sum() == offset + 9


@pytest.mark.cuda_on_cpu
def test_bad_arguments_of_the_kernel(cuda_on_cpu: ModuleType) -> None:
    def call(
        vocab: int = 4, stride: int = 4, temperature: float = 1.0, softcap: float = 0.0, rows: int = 1
    ) -> None:
        options = (0, temperature, softcap, 1.0, *[0] * 11)
        cuda_on_cpu.cuda_softmax_cross_entropy((0, 0, rows, vocab, stride, *options), (0, 0))

    with pytest.raises(ValueError, match="vocab is 0; expected 1 to"):
        call(vocab=0)
    with pytest.raises(ValueError, match="stride is 3; expected at least 4"):
        call(stride=3)
    with pytest.raises(ValueError, match="temperature is 0"):
        call(temperature=0)
    with pytest.raises(ValueError, match="softcap is -1"):
        call(softcap=-1)
    with pytest.raises(ValueError, match="rows is 2147483647; expected 0 to"):
        call(rows=2**31 - 1)
    hidden, weight, targets = make(dtype=torch.float32)
    cuda_on_cpu.fail_launch(0)
    with pytest.raises(RuntimeError, match="injected launch failure"):
        linear_cross_entropy(hidden, weight, targets, impl="fused")
