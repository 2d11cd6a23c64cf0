"""A training step runs on the fused operators; nothing in it is rows x vocabulary or rows x keys."""

import pytest
import torch
from families import thinking_model, tiny_decoder
from watch import Watch

from quietstar_ext import use_impl

VOCABULARY, LENGTH, ROWS = 4096, 64, 2


def step(padding: str) -> Watch:
    decoder = tiny_decoder("llama", vocab_size=VOCABULARY, num_hidden_layers=2)
    fields = {"start_token_id": 4094, "end_token_id": 4095, "thought_length": 4, "talk_length": 2}
    model = thinking_model(decoder, mixing=0.3, **fields).train()
    ids = torch.randint(0, 4000, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :5] = 0
    watch = Watch()
    with watch:
        model(ids, attention_mask=mask, labels=ids).loss.backward()
    return watch


@pytest.mark.parametrize("padding", ["none", "left"])
def test_fused_operators_all_the_way(padding: str):
    watch = step(padding)
    for name in (
        "quietstar.thought_attention",
        "quietstar.thought_attention_backward",
        "quietstar.linear_sample",
        "quietstar.linear_cross_entropy_forward_and_backward",
    ):
        assert name in watch.called, sorted(n for n in watch.called if "quietstar" in n)
    assert any("mixing_head" in n for n in watch.called)
    assert any("mixing_head" in n and "backward" in n for n in watch.called)
    assert not {"aten._softmax", "aten._log_softmax", "aten.logsumexp"} & watch.called
    columns = 2 * LENGTH
    slots = columns * (4 + 2 + 1)
    talk_rows = ROWS * (LENGTH - 1 + 2 * columns)
    size, where = watch.largest
    assert size < talk_rows * VOCABULARY / 2, where
    # 4 heads: the scores of one row of the batch alone would be this many.
    assert size < 4 * slots * LENGTH, where


def test_the_references_would_be_noticed():
    with use_impl("reference"):
        watch = step("none")
    # linear_sample is one registered operator that picks inside.
    assert {n for n in watch.called if "quietstar" in n} <= {"quietstar.linear_sample"}
    assert watch.largest[0] >= ROWS * (LENGTH - 1 + 4 * LENGTH) * VOCABULARY
