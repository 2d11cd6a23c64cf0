"""A layer that hands a state on: its packed pass against the same thoughts as whole sequences.

One decoder layer with its MLP, width 128, in fp32: a short convolution (LFM2), the gated delta rule
(Qwen3.5, heads of 64) and Mamba-2 (Bamba). Every position of a text of 256 tokens thinks, 15 slots,
forward and backward.

- ``whole sequences, one batch``: 256 sequences of the text up to the anchor and the slots behind it,
  padded at the right, through the family's own code.
- ``whole sequences, one by one``: each at its own length, without padding.
- ``attention layer, packed``: a layer of softmax attention in the same decoder, thought_attention fused.
- ``chunks of C``: the packed pass with other chunks of the text than it has.

The families' code is transformers' in PyTorch; fla's and mamba_ssm's kernels need a GPU and were not
measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import compare, record
from quietstar.thinking.attention import take_layouts
from quietstar.thinking.layout import ThoughtLayout, text_ranges
from quietstar.thinking.recurrent import linear_attention

LENGTH, SLOTS, WIDTH = 256, 15, 128
COMMON = {
    **{"vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0},
}
GATED_DELTA = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 64, "linear_value_head_dim": 64},
}
MAMBA_2 = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_expand": 2}
# By what is measured: family, kind of layer, and its settings.
LAYERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "short convolution": ("lfm2", "conv", {}),
    "gated delta rule": ("qwen3_5_text", "linear_attention", GATED_DELTA),
    "Mamba-2": ("bamba", "linear_attention", {**MAMBA_2, "mamba_n_groups": 1}),
}
CHUNKS = (16, 64, 128)


def body(family: str, kind: str, settings: dict[str, Any]) -> Any:
    """A decoder's body of one layer, which takes layouts."""
    other = kind if kind != "full_attention" else LAYERS_OF[family]
    kinds = [kind, "full_attention" if kind == other else other]
    if family == "bamba":
        settings = {**settings, "attn_layer_indices": [kinds.index("full_attention")]}
    else:
        settings = {**settings, "layer_types": kinds}
    torch.manual_seed(0)
    decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **settings}))
    take_layouts(decoder)
    found = decoder.base_model
    found.layers = nn.ModuleList(found.layers[:1])
    return found


LAYERS_OF = {family: kind for family, kind, _ in LAYERS.values()}


class Runs:
    """Forward and backward passes over the same thoughts; ``text`` [1, N, d], ``slots`` [1, S, N, d]."""

    def __init__(self, body: Any, slots: int = SLOTS):
        self.body, self.count = body, slots
        torch.manual_seed(1)
        self.text = torch.randn(1, LENGTH, WIDTH)
        self.slots = torch.randn(1, slots, LENGTH, WIDTH)
        self.direction = torch.randn(LENGTH, slots, WIDTH)
        self.ids = torch.zeros(1, LENGTH, dtype=torch.int64)

    def packed(self) -> Tensor:
        """Hidden states [N, S, d] of the slots."""
        anchors = torch.arange(LENGTH)[None]
        layout = ThoughtLayout.over(
            text_ranges(None, self.ids), anchors, self.count, every_position=True
        )
        embeds = torch.cat([self.text, self.slots.flatten(1, 2)], dim=1)
        hidden = self.body(
            inputs_embeds=embeds,
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
            position_ids=layout.packed_positions(),
            use_cache=False,
            thought_layout=layout,
        ).last_hidden_state
        found: Tensor = hidden[0, LENGTH:].unflatten(0, (self.count, LENGTH)).transpose(0, 1)
        return found

    def sequences(self) -> list[Tensor]:
        return [torch.cat([self.text[0, : at + 1], self.slots[0, :, at]]) for at in range(LENGTH)]

    def in_one_batch(self) -> Tensor:
        rows = nn.utils.rnn.pad_sequence(self.sequences(), batch_first=True)
        hidden = self.body(inputs_embeds=rows, use_cache=False).last_hidden_state
        return torch.stack([hidden[at, at + 1 : at + 1 + self.count] for at in range(LENGTH)])

    def step(self, forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            self.body.zero_grad()
            (forward() * self.direction).sum().backward()

        return run

    def one_by_one(self) -> None:
        self.body.zero_grad()
        for at, row in enumerate(self.sequences()):
            hidden = self.body(inputs_embeds=row[None], use_cache=False).last_hidden_state[0, at + 1 :]
            (hidden * self.direction[at]).sum().backward()


@pytest.mark.parametrize("what", LAYERS)
def bench_layer(benchmark: Any, what: str) -> None:
    family, kind, settings = LAYERS[what]
    runs = Runs(body(family, kind, settings))
    with torch.no_grad():
        torch.testing.assert_close(runs.packed(), runs.in_one_batch(), atol=1e-4, rtol=1e-3)
    packed = runs.step(runs.packed)
    attention = Runs(body(family, "full_attention", settings))
    quick = {"packed": packed, "attention layer, packed": attention.step(attention.packed)}
    if kind != "conv":
        quick |= {f"chunks of {size}": _with_chunks(packed, size) for size in CHUNKS}
    slow = {
        "packed": packed,
        "whole sequences, one batch": runs.step(runs.in_one_batch),
        "whole sequences, one by one": runs.one_by_one,
    }
    # The slow ones take a hundred times as long: once, and once to warm up.
    table = compare(slow, rounds=1, on_host=True) | compare(quick, rounds=7, on_host=True)
    record("hybrids", f"{what}, a layer's packed pass, N{LENGTH} S{SLOTS} width {WIDTH}", table)
    benchmark.pedantic(packed, rounds=2)


def _with_chunks(run: Callable[[], None], size: int) -> Callable[[], None]:
    def changed() -> None:
        with patch.object(linear_attention, "CHUNK", size):
            run()

    return changed
