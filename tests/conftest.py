"""Fixtures that several test files share."""

import copy
import functools
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_sources
import pytest
import seeds
import torch
from poison import poisoned_memory

# Before huggingface_hub is imported, which reads it once: no test asks the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
# `python -m pytest` puts the repository root first on sys.path, where the sources of quietstar_ext would
# hide the installed package; with the native module built in place they are what is to be tested.
if not list((ROOT / "quietstar_ext").glob("_native*")):
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

import quietstar_ext  # noqa: E402
from quietstar_ext import native  # noqa: E402

# The processes of `pytest -n` share the processor's cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

SIMD_LEVELS = ("generic", "avx2", "avx512")
# Cases of a test that run under the sanitizers, which take ten times as long.
MAX_SANITIZED = 5
# Seconds: the first test of the CUDA sources on the CPU compiles them, on as many cores as are free.
WITH_A_BUILD = 1800
# What a plain `pytest` leaves out of whole folders; --slow, -m or a file's name bring it back.
LEFT_OUT = ("slow", "cuda_on_cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow", action="store_true", help="run the slow tests and CUDA sources on the CPU, too"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out some tests of whole folders, and under the sanitizers all but some cases of a test;
    give those time that may have to build."""
    kept = items
    for item in items:
        if item.get_closest_marker("cuda_on_cpu") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(WITH_A_BUILD))
    named = any(".py" in argument for argument in config.args)
    if not (named or config.getoption("--slow") or config.getoption("-m")):
        kept = [item for item in kept if not any(map(item.get_closest_marker, LEFT_OUT))]
    if cuda_sources.SANITIZED:
        kept = some_cases(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    if "PYTEST_XDIST_WORKER" in os.environ:  # what takes longest must not be begun last
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


def some_cases(items: list[pytest.Item]) -> list[pytest.Item]:
    """At most ``MAX_SANITIZED`` cases of every test, spread over all of them.

    Of the operators' contract so many are kept for every operator.
    """
    cases: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("cuda_on_cpu"):
            name, _, case = item.nodeid.partition("[")
            operator, on, _ = case.partition(" on ")
            cases.setdefault((name, operator if on else ""), []).append(item)
    kept = set()
    for of_one in cases.values():
        step = max(1.0, len(of_one) / MAX_SANITIZED)
        kept |= {of_one[int(i * step)] for i in range(min(len(of_one), MAX_SANITIZED))}
    return [item for item in items if item in kept]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A process per core that this one may use, and up to 4 GiB for each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, memory >> 32))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file stay in one process, since many share what took long to make; not on a GPU."""
    if config.getoption("-m") == "gpu":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True)
def drawn_values(request) -> None:
    """Every test draws from a seed of its own."""
    seeds.begin(request.node.nodeid)


@pytest.fixture(params=SIMD_LEVELS)
def simd(request) -> Iterator[str]:
    """Run the test once per instruction set, and skip those that this machine does not have."""
    level: str = request.param
    if level not in quietstar_ext.build_info()["simd_supported"]:
        pytest.skip(f"this machine has no {level}")
    with quietstar_ext.use_simd(level):
        assert quietstar_ext.build_info()["simd"] == level
        yield level


@pytest.fixture(scope="session")
def stdlib_tokenizer_once() -> Iterator[None]:
    """Recipes whose tokenizer is trained on the standard library share one, which takes seconds."""
    from quietstar.data import stdlib

    train = functools.cache(stdlib.stdlib_tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdlib, "stdlib_tokenizer", lambda *given: copy.deepcopy(train(*given)))
        yield


@pytest.fixture
def threads() -> Iterator[None]:
    """Give the number of torch's threads back as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_outputs(request) -> Iterator[None]:
    """In the tests of the operators on a GPU, what a kernel does not write is NaN.

    Not beside the stock attention, which has no deterministic backward.
    """
    on_a_gpu = request.node.get_closest_marker("gpu") is not None
    if on_a_gpu and request.path.parent.name == "operators" and "composed" not in request.path.stem:
        with poisoned_memory():
            yield
    else:
        yield


@pytest.fixture
def cuda_on_cpu() -> Iterator[ModuleType]:
    """CPU tensors take the CUDA path, with the CUDA sources compiled for the CPU.

    Outputs hold NaN until they are written. The module's ``set_order`` chooses the order of threads,
    ``set_shared_memory_limit`` how much of it a block may have.
    """
    module = cuda_sources.load()
    module.set_order("forward", 0)
    module.set_shared_memory_limit(module.shared_memory_limit)
    with poisoned_memory(), native.cuda_on_cpu(module):
        yield module


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.cuda_on_cpu),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def kernel_device(request) -> Iterator[str]:
    """The device of a test's tensors, where the CUDA kernels run: a GPU, or the CPU with the CUDA
    sources compiled for it. That they ran there is asserted."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")
        yield "cuda"
        return
    module: ModuleType = request.getfixturevalue("cuda_on_cpu")
    before = module.launches()
    yield "cpu"
    assert module.launches() > before, "no CUDA kernel ran"
