"""quietstar_ext/native.py: whether the CUDA kernels of a build run on a device, without one."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
import torch

from quietstar_ext import native

BUILT = "sm_80, sm_90, sm_100, compute_80"


#   what the kernels were built for, capability, driver, runtime
@pytest.mark.parametrize(
    ("archs", "capability", "driver", "runtime"),
    [
        (BUILT, (8, 0), 13000, 13000),
        (BUILT, (8, 6), 13000, 13000),  # machine code of sm_80
        (BUILT, (8, 9), 13020, 13000),
        (BUILT, (9, 0), 13000, 13010),  # of any minor version
        (BUILT, (10, 3), 13000, 13000),
        (BUILT, (12, 0), 13000, 13000),  # PTX
        ("sm_80, compute_80", (9, 0), 12040, 12040),
        ("sm_80, compute_80", (12, 1), 13000, 12080),
        ("sm_90a", (9, 0), 13000, 13000),
        ("sm_100f", (10, 3), 13000, 13000),
    ],
)
def test_kernels_run(archs: str, capability: tuple[int, int], driver: int, runtime: int) -> None:
    assert native.capability_unsupported_reason(archs, capability, driver, runtime, "cuda:0") is None


@pytest.mark.parametrize(
    ("archs", "capability", "driver", "runtime", "reason"),
    [
        (
            *(BUILT, (7, 5), 12040, 13000),
            "the CUDA kernels need compute capability 8.0 or more, and cuda:0 has 7.5",
        ),
        (
            *(BUILT, (9, 0), 12040, 13000),
            "the CUDA kernels were built with CUDA 13.0, and the driver supports CUDA 12.4 at most; "
            "update the driver, or reinstall with the nvcc of CUDA 12 on the PATH",
        ),
        (
            *("sm_90, sm_100", (8, 0), 13000, 13000),
            "the CUDA kernels were built for sm_90, sm_100, and cuda:0 has compute capability 8.0; "
            "reinstall with QUIETSTAR_CUDA_ARCHS=sm_80",
        ),
        (
            *("sm_80, sm_90a", (10, 0), 13000, 13000),
            "the CUDA kernels were built for sm_80, sm_90a, and cuda:0 has compute capability 10.0; "
            "reinstall with QUIETSTAR_CUDA_ARCHS=sm_100",
        ),
        (
            *(BUILT, (12, 0), 13000, 13010),
            "cuda:0 has compute capability 12.0, for which a driver for CUDA 13.1 or newer has to "
            "compile the CUDA kernels, and this one is for CUDA 13.0; update the driver, or reinstall "
            "with QUIETSTAR_CUDA_ARCHS=sm_120",
        ),
        ("sm_89", (8, 6), 13000, 13000, "the CUDA kernels were built for sm_89, and cuda:0 has"),
        ("sm_100f", (12, 0), 13000, 13000, "the CUDA kernels were built for sm_100f, and cuda:0 has"),
    ],
)
def test_why_kernels_do_not_run(
    archs: str, capability: tuple[int, int], driver: int, runtime: int, reason: str
) -> None:
    found = native.capability_unsupported_reason(archs, capability, driver, runtime, "cuda:0")
    assert found is not None
    assert found.startswith(reason)


@pytest.mark.cuda_on_cpu
def test_versions(cuda_on_cpu: ModuleType) -> None:
    """Driver first, then runtime."""
    assert cuda_on_cpu.cuda_versions() == [13010, 13000]


def test_a_device_that_cannot_is_known_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question is asked while a function is traced, where native functions cannot be called."""
    asked = []

    def capability(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 9, 0

    module = SimpleNamespace(
        build_info=lambda: {"cuda_archs": BUILT}, cuda_versions=lambda: [12080, 13000]
    )
    monkeypatch.setattr(native, "_module", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    native._device_unsupported_reason.cache_clear()
    torch.compiler.reset()
    try:

        @torch.compile(fullgraph=True, backend="eager")
        def compiled(x: torch.Tensor) -> torch.Tensor:
            return x + 1 if native._cuda_unsupported_reason(x.device) is None else x - 1

        assert torch.equal(compiled(torch.ones(2)), torch.zeros(2))
        assert "at most; update the driver" in str(native._cuda_unsupported_reason(torch.device("cpu")))
        assert len(asked) == 1
    finally:
        native._device_unsupported_reason.cache_clear()
