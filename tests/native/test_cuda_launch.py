"""csrc/cuda/launch.cuh on the CPU: shared memory, errors that stay behind, the current device."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.cuda_on_cpu
KIB = 1024
STATIC = 1 * KIB  # of the kernel that run_shared_memory runs


@pytest.fixture
def module(cuda_on_cpu: ModuleType) -> Iterator[ModuleType]:
    """With no context on any device at first."""
    cuda_on_cpu.reset_devices()
    yield cuda_on_cpu
    cuda_on_cpu.reset_devices()


def scale(module: ModuleType, device: int) -> torch.Tensor:
    """Ones, doubled by a kernel on the device."""
    data, factor = torch.ones(8), torch.tensor(2.0)
    module.cuda_scale_in_place(data.data_ptr(), 0, 8, factor.data_ptr(), (device, 0))
    return data


@pytest.mark.parametrize("bytes_", [4, 32 * KIB, 48 * KIB - STATIC, 48 * KIB, 48 * KIB + 4, 100 * KIB])
def test_static_and_dynamic_memory_together(module: ModuleType, bytes_: int) -> None:
    assert module.run_shared_memory(bytes_ // 4) == 2


@pytest.mark.parametrize("limit", [99 * KIB, 163 * KIB])
def test_all_that_a_block_may_have(module: ModuleType, limit: int) -> None:
    module.set_shared_memory_limit(limit)
    assert module.run_shared_memory((limit - STATIC) // 4) == 2
    with pytest.raises(RuntimeError, match=f"shared_memory.*invalid launch: {limit + 4} bytes"):
        module.run_shared_memory((limit - STATIC) // 4 + 1)
    with pytest.raises(RuntimeError, match="shared_memory: invalid argument"):
        module.run_shared_memory(limit // 4 + 1)
    assert module.run_shared_memory(10) == 2


@pytest.mark.parametrize("wrong", ["device", "shared memory", "launch"])
def test_an_error_is_reported_once(module: ModuleType, wrong: str) -> None:
    """A call that goes well does not report the one before."""
    with pytest.raises(RuntimeError, match="invalid|injected"):
        if wrong == "device":
            scale(module, 2)
        elif wrong == "shared memory":
            module.run_shared_memory(200 * KIB // 4)
        else:
            module.fail_launch(0)
            scale(module, 0)
    assert torch.equal(scale(module, 0), torch.full((8,), 2.0))


def test_the_device_before_is_current_again(module: ModuleType) -> None:
    scale(module, 0)
    assert torch.equal(scale(module, 1), torch.full((8,), 2.0))
    assert module.has_context(1)
    assert module.current_device() == 0


def test_no_context_on_a_device_that_nobody_uses(module: ModuleType) -> None:
    """A process whose tensors are all on one GPU takes no memory of the first."""
    assert torch.equal(scale(module, 1), torch.full((8,), 2.0))
    assert module.has_context(1)
    assert not module.has_context(0)
