"""Torch's own kernels of the composed path: the private operators are what the calls of them expect."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from quietstar_ext.thought_attention import stock


@pytest.mark.parametrize("name", stock.SCHEMAS)
def test_private_operators_are_declared_as_expected(name):
    declared = str(getattr(torch.ops.aten, name).default._schema)
    assert declared.startswith(f"aten::{name}{stock.SCHEMAS[name]} -> ("), (
        f"torch {torch.__version__} declares {declared}; look at what thought_attention/stock.py"
        " passes it, then change SCHEMAS"
    )


@pytest.mark.parametrize("kernel", stock.KERNELS)
def test_another_declaration_is_noticed(monkeypatch, kernel):
    for name in (f"_scaled_dot_product_{kernel}_attention", f"_no_such_{kernel}_attention"):
        assert stock.declared_otherwise(kernel) is None
        with monkeypatch.context() as patch:
            patch.setitem(stock.SCHEMAS, name, "(Tensor query, Tensor key)")
            assert f"declares aten::{name} in another way" in stock.declared_otherwise(kernel)
            (other,) = set(stock.KERNELS) - {kernel}
            assert stock.declared_otherwise(other) is None


@pytest.mark.parametrize("kernel", stock.KERNELS)
@pytest.mark.parametrize("groups", [1, 3])
def test_calls_of_the_gpu_operators_fit(groups, kernel):
    """Shapes and arguments without a GPU: torch's own shape functions see the calls."""
    if kernel == "cudnn" and torch.version.cuda is None:
        pytest.skip("this torch was built without CUDA, and cuDNN's operators want it")
    with FakeTensorMode(), stock.use_stock(kernel):
        s, heads, n, d = 3, 2, 5, 16
        q = torch.empty(s, n, heads * groups, d, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        k = torch.empty(heads, n, d, dtype=torch.bfloat16, device="cuda").expand(s, -1, -1, -1)
        assert stock.stock_unsupported_reason(q) is None
        out, lse = stock.stock_forward(q, k, k, 0.25)
        assert out.shape == q.shape and lse.shape == (s, heads * groups, n)
        assert lse.dtype == torch.float32
        dq, dk, dv = stock.stock_backward(out, q, k, k, out, lse, 0.25)
        assert dq.shape == q.shape and dk.shape == dv.shape == k.shape


class Copies(TorchDispatchMode):
    """Dtypes of the tensors that are copied."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in (torch.ops.aten.clone.default, torch.ops.aten.contiguous.default):
            self.dtypes.append(args[0].dtype)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_take_sixteen_bytes_at_a_time(dtype):
    bits = torch.randint(-(2**15), 2**15, (4, 6, 5, 16), dtype=torch.int16)  # NaN of any kind among them
    made = bits.view(dtype)
    for tensor, copied in (
        (made, []),
        (made.transpose(0, 1), [torch.complex128]),
        (made[:, :, 1::2], [torch.complex128]),
        (made[..., 8:], [torch.complex128]),
        (made[:1].expand(3, -1, -1, -1), [torch.complex128]),
        (made[..., 4:12], [dtype]),
        (made[..., :12], [dtype]),
        (made.transpose(2, 3), [dtype]),
    ):
        with Copies() as copies:
            found = stock.in_order(tensor)
        assert copies.dtypes == copied
        assert found.is_contiguous() and found.dtype == dtype and found.shape == tensor.shape
        assert torch.equal(found.view(torch.int16), tensor.contiguous().view(torch.int16))


def test_what_a_stock_kernel_does_not_take():
    with FakeTensorMode():
        for size, dtype, kernel, words in (
            (64, torch.float32, "flash", "bfloat16 and float16"),
            (60, torch.float16, "flash", "a multiple of 8, not 60"),
            (136, torch.float16, "cudnn", "at most 128 in both directions, not 136"),
        ):
            q = torch.empty(1, 2, 3, 8, size, dtype=dtype, device="cuda")
            with stock.use_stock(kernel):
                assert words in stock.stock_unsupported_reason(q)
    with pytest.raises(ValueError, match="'other'; expected one of auto, flash, cudnn"):
        stock.use_stock("other").__enter__()
