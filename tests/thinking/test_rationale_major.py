"""Several rationales in one call of the stock attention kernels: the grids' other order in memory.

On the CPU the composed path is taken with the CUDA sources compiled for it, which is asked for here; in
a training step a GPU takes it by the length of the text.
"""

from __future__ import annotations

import pytest
import torch
from families import tiny_decoder

from quietstar import QuietStarForCausalLM
from quietstar.thinking import attention
from quietstar.thinking.shared_start import Columns, join_rows, split_rows
from quietstar_ext.thought_attention import composed, thought_attention


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("rationales", [2, 3])
def test_grids_hold_the_same_numbers(rationales, slots):
    """Split and joined, forward and backward, both orders agree bit for bit."""
    batch, heads, text, anchors, size = 2, 3, 5, 5, 4
    total = anchors * rationales
    order = torch.arange(total).unflatten(0, (anchors, rationales)).T.flatten()
    columns = Columns(total, rationales)
    major = columns._replace(rationale_major=True)
    rows = torch.randn(batch, text + anchors + (slots - 1) * total, heads, size).transpose(1, 2)
    here, there = (rows.clone().requires_grad_() for _ in range(2))
    text_here, grid_here = split_rows(here, text, columns)
    text_there, grid_there = split_rows(there, text, major)
    assert torch.equal(text_here, text_there) and torch.equal(grid_here[:, :, :, order], grid_there)
    # In memory as [B, S, R, A, H, D]: slots and rationales of a row are one batch.
    assert grid_there.permute(0, 2, 3, 1, 4).is_contiguous()
    joined_here = join_rows(text_here.transpose(1, 2), grid_here, columns)
    joined_there = join_rows(text_there.transpose(1, 2), grid_there, major)
    assert torch.equal(joined_here, joined_there) and torch.equal(joined_there.transpose(1, 2), rows)
    grids = grid_here, grid_there
    weights = torch.randn(joined_here.shape)
    of_grids = [
        torch.autograd.grad(joined, grid, weights, retain_graph=True)[0]
        for joined, grid in zip((joined_here, joined_there), grids, strict=True)
    ]
    assert torch.equal(of_grids[0][:, :, :, order], of_grids[1])
    assert of_grids[1].stride() == grid_there.stride()
    more = torch.randn(grid_here.shape)
    for joined, grid, leaf, weight in (
        (joined_here, grid_here, here, more),
        (joined_there, grid_there, there, more[:, :, :, order]),
    ):
        ((joined * weights).sum() + (grid * weight).sum()).backward()
        assert leaf.grad is not None
    torch.testing.assert_close(here.grad, there.grad, rtol=1e-6, atol=1e-6)


def thinking(family, rationales, **changes):
    return QuietStarForCausalLM.from_base(
        tiny_decoder(family, num_hidden_layers=2),
        start_token_id=94,
        end_token_id=95,
        thought_length=2,
        talk_length=2,
        num_rationales=rationales,
        self_check=False,  # it makes a packed pass of its own
        **changes,
    ).train()


def step(model, ids, mask):
    """Thoughts, losses and gradients of a training step."""
    torch.manual_seed(3)
    output = model(ids, attention_mask=mask, labels=ids)
    output.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output, found


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize(("family", "full"), [("llama", [True, True]), ("gpt_oss", [False, True])])
@pytest.mark.parametrize("rationales", [1, 2, 3])
def test_a_training_step_makes_one_call_a_row(monkeypatch, cuda_on_cpu, family, full, rationales):
    """As many stock calls as layers without a window and rows, whatever R is, of tensors that lie in
    memory as they are read; thoughts are those of the fused kernels, and so is what is learnt."""
    model = thinking(family, rationales)
    ids = torch.randint(0, 90, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with composed.use_path("fused"):
        expected, gradients = step(model, ids, mask)

    calls = {"forward": 0, "backward": 0}
    said = []

    def watch(direction, run, contiguous):
        def watched(*tensors):
            calls[direction] += 1
            for i in contiguous:
                # What lies so is handed on as it is (in_order), to either of a GPU's kernels. A single
                # rationale lies as the family leaves it.
                assert rationales == 1 or tensors[i].transpose(1, 2).is_contiguous()
            return run(*tensors)

        return watched

    def in_place(piece, batch=composed._as_batch):
        made = batch(piece)
        of_numbers = piece.dim() == 5
        assert not of_numbers or made.untyped_storage().data_ptr() == piece.untyped_storage().data_ptr()
        return made

    def attend(*tensors, **options):
        if tensors[0].shape[2] > 1:
            said.append(options["rationale_major"])
            # The composed path does not look at the ranges, but its gradient of lse would.
            start, stop = tensors[5:7]
            column, seen = torch.arange(7 * rationales), start < stop
            wanted = (column % 7 if said[-1] else column // rationales) + 1
            assert torch.equal(stop[seen], wanted.int().expand_as(stop)[seen])
            assert seen.sum() == 12 * rationales and (start[seen] == 0).all()
        return thought_attention(*tensors, **options)

    monkeypatch.setattr(composed, "stock_forward", watch("forward", composed.stock_forward, (0,)))
    backward = watch("backward", composed.stock_backward, (0, 1, 4))
    monkeypatch.setattr(composed, "stock_backward", backward)
    monkeypatch.setattr(composed, "_as_batch", in_place)
    monkeypatch.setattr(attention, "thought_attention", attend)
    with composed.use_path("composed"):
        found, others = step(model, ids, mask)
    assert said == [layer and rationales > 1 for layer in full]
    assert calls == dict.fromkeys(calls, 2 * sum(full))
    assert torch.equal(found.thought_ids, expected.thought_ids)
    assert found.thought_ids.shape[1] == rationales
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(others[name], gradient, rtol=0, atol=1e-4 * max(largest, 1e-3))


@pytest.mark.cuda_on_cpu
def test_only_where_the_composed_path_is_taken(monkeypatch, cuda_on_cpu):
    """The fused kernels want neighbours with near anchors, and other columns have no such order."""
    said = []

    def attend(*tensors, every_position=False, rationale_major=False, **options):
        if tensors[0].shape[2] > 1:
            said.append((every_position, rationale_major))
        return thought_attention(*tensors, every_position=every_position, **options)

    monkeypatch.setattr(attention, "thought_attention", attend)
    ids = torch.randint(0, 90, (1, 6))
    model = thinking("llama", 2)
    for path in ("auto", "fused"):  # the text is short
        with composed.use_path(path):
            step(model, ids, None)
    with composed.use_path("composed"):
        step(thinking("llama", 2, think_at="stride:2"), ids, None)
        step(thinking("gemma2", 2), ids, None)  # a soft-cap
    assert said == [(True, False)] * 4 + [(False, False)] * 2 + [(True, False)] * 2
