#!/usr/bin/env python3
"""Every operator once per dtype and option on small, awkward shapes, forward and backward, with the
kernels of one device: what compute-sanitizer watches in scripts/gpu_check.sh.

    python scripts/small_calls.py [--device cuda] [--without-libraries]

``--without-libraries`` makes matrix products of elementwise ones and sums: some tools do not survive the
kernels of cuBLAS. Nothing is compared here; the tests do that. Exit status 1: a call failed, or gave
what is not finite.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quietstar_ext import (
    linear_cross_entropy,
    linear_cross_entropy_sum,
    linear_sample,
    mixing_head,
    sample_tokens,
    thought_attention,
)
from quietstar_ext.operators import implementations

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Call = Callable[[], object]


def sampling(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    options = (
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "banned": [3, 500]},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "banned": [0]},
    )
    for words in (1003, 40_000):
        logits = (torch.randn(3, words, device=device) * 2).to(dtype)
        for option in options:
            yield (
                f"sample_tokens {words} {option}",
                lambda x=logits, o=option: sample_tokens(x, seed=5, impl="fused", **o),
            )
    hidden = torch.randn(5, 24, device=device).to(dtype)
    weight = torch.randn(515, 24, device=device).to(dtype)
    for option in options[2:]:
        yield (
            f"linear_sample {option}",
            lambda o=option: linear_sample(hidden, weight, seed=5, impl="fused", **o),
        )


def cross_entropy(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    options = ({}, {"temperature": 3.0, "banned": [2, 500]}, {"softcap": 5.0, "logit_scale": 0.5})
    for words in (515, 33_000):
        hidden = torch.randn(9, 16, device=device).to(dtype).requires_grad_()
        weight = torch.randn(words, 16, device=device).to(dtype).requires_grad_()
        targets = torch.randint(3, 500, (9,), device=device)
        targets[4] = -100
        weights = torch.rand(9, device=device)
        for option in options:

            def rows(h=hidden, w=weight, t=targets, o=option) -> object:
                loss = linear_cross_entropy(h, w, t, impl="fused", **o).sum()
                return loss, *torch.autograd.grad(loss, (h, w))

            def total(h=hidden, w=weight, t=targets, r=weights, o=option) -> object:
                loss, losses = linear_cross_entropy_sum(h, w, t, r, impl="fused", **o)
                return losses, *torch.autograd.grad(loss, (h, w))

            yield f"linear_cross_entropy {words} {option}", rows
            yield f"linear_cross_entropy_sum {words} {option}", total


def mixing(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for positions, rows, width in ((4, 11, 19), (7, 40, 64), (3, 9, 1032)):

        def draw(*shape: int) -> Tensor:
            return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype).requires_grad_()

        shapes = ((width, 2 * width), (width,), (width, width), (width,), (1, width))
        tensors = [draw(positions, width), draw(rows, width), *(draw(*shape) for shape in shapes)]
        index = torch.randint(0, positions, (rows,), device=device)
        for activation in ("identity", "sigmoid"):

            def run(t=tensors, i=index, a=activation) -> object:
                mixed, w = mixing_head(*t, a, base_index=i, impl="fused")
                return mixed, w, *torch.autograd.grad(mixed.sum() + w.sum(), t)

            yield f"mixing_head {positions} {rows} {width} {activation}", run


def attention(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    #    B  Hq Hkv  N  Sq Sk   D
    for b, hq, hkv, n, sq, sk, d in (
        (2, 4, 2, 19, 3, 3, 32),
        (1, 2, 1, 70, 5, 5, 64),
        (1, 4, 4, 33, 1, 4, 128),
    ):
        shapes = ((hq, sq, n), (hkv, n), (hkv, n), (hkv, sk, n), (hkv, sk, n))
        tensors = [
            torch.randn(b, *shape, d, device=device).to(dtype).requires_grad_() for shape in shapes
        ]
        stop = torch.arange(1, n + 1, dtype=torch.int32, device=device).expand(b, n).contiguous()
        start = (stop - 40).clamp(min=0).to(torch.int32)
        for option in ({}, {"sliding_window": 9}, {"softcap": 3.0}):

            def run(t=tensors, a=start, z=stop, o=option) -> object:
                out = thought_attention(*t, a, z, impl="fused", **o)
                return out, *torch.autograd.grad(out.float().sum(), t)

            yield f"thought_attention {n} {sq} {sk} {d} {option}", run


class WithoutLibraries(TorchDispatchMode):
    """In the block no matrix product is a library's, inside the operators or out of them.

    Attributes:
        replaced: how many were made otherwise.
    """

    replaced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet, aten = kwargs or {}, func.overloadpacket, torch.ops.aten
        if func.namespace == "quietstar":
            with self:  # which a call of the operator itself would not be
                return implementations[func.name()](*args, **kwargs)
        if packet in (aten.matmul, aten.linear):
            with self:
                return func.decompose(*args, **kwargs)
        if packet not in (aten.mm, aten.addmm, aten.addmm_):
            return func(*args, **kwargs)
        self.replaced += 1
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        a, b = (given[name] for name in (("self", "mat2") if packet is aten.mm else ("mat1", "mat2")))
        wide = torch.promote_types(a.dtype, torch.float32)
        product = (a.to(wide)[:, :, None] * b.to(wide)[None]).sum(1) * given.get("alpha", 1)
        beta = 0 if packet is aten.mm else given.get("beta", 1)
        if beta:  # 0: what stands there may be anything
            product += beta * given["self"]
        if packet is aten.addmm_ or "out" in given:
            return given["self" if packet is aten.addmm_ else "out"].copy_(product)
        return product.to(given.get("out_dtype", a.dtype))


def finite(result: object) -> bool:
    tensors = result if isinstance(result, tuple) else (result,)
    return all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument(
        "--without-libraries", action="store_true", help="no matrix product of a library"
    )
    options = parser.parse_args()
    with WithoutLibraries() if options.without_libraries else contextlib.nullcontext():
        called, failed = run(options)
    print(f"{called} calls, {failed} failed")
    return 1 if failed or not called else 0


def run(options: argparse.Namespace) -> tuple[int, int]:
    """How many calls were made, and how many of them failed."""
    failed = called = 0
    for dtype in DTYPES:
        for operator in (sampling, cross_entropy, mixing, attention):
            for name, call in operator(options.device, dtype):
                if options.only not in name:
                    continue
                called += 1
                try:
                    good = finite(call())
                    if not good:
                        print(f"not finite: {name} {dtype}", flush=True)
                except Exception:
                    good = False
                    print(f"failed: {name} {dtype}\n{traceback.format_exc(limit=-3)}", flush=True)
                failed += not good
    return called, failed


if __name__ == "__main__":
    sys.exit(main())
