"""One training step of a small model on thoughts that it samples: for ways to run it that change no
result."""

import pytest
import torch
from families import gradients, thinking_model
from torch import Tensor

from quietstar import QuietStarForCausalLM

IDS = torch.randint(3, 36, (2, 9), generator=torch.Generator().manual_seed(2))
Step = tuple[float, dict[str, Tensor]]


def build(family: str = "llama", **fields) -> QuietStarForCausalLM:
    fields = {"start_token_id": 39, "end_token_id": 40, "thought_length": 3, "talk_length": 2, **fields}
    return thinking_model(family, mixing=0.3, embeddings=0.003, **fields).train()


def step(model: QuietStarForCausalLM, ids: Tensor = IDS) -> Step:
    """Loss and gradients; the thoughts are those of one seed."""
    model.zero_grad()
    torch.manual_seed(5)
    ids = ids.to(model.device)
    output = model(ids, labels=ids)
    output.loss.backward()
    return output.loss.item(), gradients(model)


def same(found: Step, wanted: Step) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        size = float(value.abs().max())
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=2e-4 * size + 1e-7, msg=name)
