"""The output weight of a rollout under autocast: cast once, and anew for the next rollout."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import thinking_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quietstar import QuietStarForCausalLM
from quietstar.thinking.cuda_graphs import use_graphs
from quietstar.thinking.output_layer import OutputLayer

SLOTS = 3

WAYS = [
    pytest.param(("cpu", "off"), id="plain"),
    pytest.param(("cpu", "buffers"), id="buffers"),
    pytest.param(("cuda", "auto"), id="graph", marks=pytest.mark.gpu),
]


class Casts(TorchDispatchMode):
    """Counts casts of a weight to 16 bits, by its shape."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.shape, self.count = weight.shape, 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten._to_copy.default and made.dtype == torch.bfloat16:
            self.count += made.shape == self.shape
        return made


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device; slot steps run the given way."""
    device, mode = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with use_graphs(mode):
        yield device


def build(device: str) -> QuietStarForCausalLM:
    fields = {"start_token_id": 39, "end_token_id": 40, "thought_length": SLOTS, "talk_length": 2}
    return thinking_model("llama", mixing=0.3, embeddings=0.003, **fields).train().to(device)


def output_weight(model: QuietStarForCausalLM) -> Tensor:
    return model.base.get_output_embeddings().weight


@contextmanager
def cast_in_every_call() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputLayer, "for_draws", lambda self: self)
        yield


def rollout(model: QuietStarForCausalLM, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16):
        made = model(ids)
    return made.thought_ids, made.thought_logprobs


def counted(model: QuietStarForCausalLM, run: Callable[[], Any]) -> int:
    with Casts(output_weight(model)) as casts:
        run()
    return casts.count


def test_once_in_a_rollout() -> None:
    model, ids = build("cpu"), torch.randint(3, 38, (2, 9))
    with use_graphs("off"):
        rollout(model, ids, 0)  # the first use is checked, with the weights as they are
        once = counted(model, lambda: rollout(model, ids, 0))
        with cast_in_every_call():
            every = counted(model, lambda: rollout(model, ids, 0))
        without = counted(model, lambda: model(ids))
    assert (once, every, without) == (1, SLOTS, 0)


def test_the_same_thoughts_with_weights_that_change_in_place(way: str) -> None:
    """Again and again, so that a graph is captured, and replayed over other weights."""
    model = build(way)
    seen = []
    for number in range(4):
        ids = torch.randint(3, 38, (2, 9), device=way)
        found = rollout(model, ids, number)
        with use_graphs("off"), cast_in_every_call():
            wanted = rollout(model, ids, number)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        again = rollout(model, ids, number)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        with torch.no_grad():
            output_weight(model).normal_()
        seen.append((found[1], rollout(model, ids, number)[1]))
    assert not any(torch.equal(before, after) for before, after in seen)


def test_nothing_is_left_of_it(way: str) -> None:
    model, ids = build(way), torch.randint(3, 38, (2, 9), device=way)
    for _ in range(3):
        rollout(model, ids, 0)
    gc.collect()
    shape = output_weight(model).shape
    left = [
        t
        for t in gc.get_objects()
        if type(t) is Tensor and t.dtype == torch.bfloat16 and t.shape == shape
    ]
    assert not left


def test_in_float32_it_is_the_weight_itself() -> None:
    weight = torch.nn.Parameter(torch.randn(7, 4))
    layer = OutputLayer(weight, None, 1.0)
    assert layer.for_draws().weight.data_ptr() == weight.data_ptr()
    assert not layer.for_draws().weight.requires_grad and layer.weight is weight
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.for_draws().weight.dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32
