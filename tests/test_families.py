"""Every tested model family: the packed pass equals an ordinary run with a dense mask."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, VOCABULARY, tiny_decoder
from torch import Tensor

from quietstar import QuietStarForCausalLM
from quietstar.layout import text_positions, text_ranges
from quietstar.think import packed_pass

ROWS, LENGTH, THOUGHT, TALK = 2, 14, 3, 2


def build(family: str, **changes) -> QuietStarForCausalLM:
    return QuietStarForCausalLM.from_base(
        tiny_decoder(family, **changes),
        thought_length=THOUGHT,
        talk_length=TALK,
        start_token_id=VOCABULARY - 2,
        end_token_id=VOCABULARY - 1,
    )


def inputs(padding: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(3, VOCABULARY - 2, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :4] = 0
    if padding == "right":
        mask[1, -3:] = 0
    return ids, mask


def dense_masks(mask: Tensor, anchors: Tensor, slots: int, window: int | None) -> dict[str, Tensor]:
    """Visibility written out from its definition, one [B, 1, L, L] mask per kind of layer."""
    batch, length = mask.shape
    columns = anchors.shape[1]
    # Every token as (anchor or own position, depth, column); text has depth 0 and no column.
    position = torch.cat([torch.arange(length), anchors[0].repeat(slots)])
    depth = torch.cat(
        [torch.zeros(length, dtype=torch.long), torch.arange(1, slots + 1).repeat_interleave(columns)]
    )
    column = torch.cat([torch.full((length,), -1), torch.arange(columns).repeat(slots)])
    is_text = column < 0
    real = torch.ones(batch, len(position), dtype=torch.bool)
    real[:, :length] = mask.bool()
    to_text = is_text[None, :] & (position[None, :] <= position[:, None])
    to_slot = (column[None, :] == column[:, None]) & ~is_text[None, :] & ~is_text[:, None]
    to_slot &= depth[None, :] <= depth[:, None]
    near = torch.ones_like(to_text)
    if window is not None:
        reach = position + depth
        near = reach[None, :] > reach[:, None] - window
    kinds = {"full_attention": to_text | to_slot, "sliding_attention": (to_text | to_slot) & near}
    found = {}
    for kind, seen in kinds.items():
        seen = seen[None] & real[:, None, :]
        # A row that sees nothing has to see something in an ordinary softmax; nobody reads it.
        seen = seen | (torch.eye(len(position), dtype=torch.bool) & ~seen.any(-1, keepdim=True))
        found[kind] = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    return found


def dense_run(model: QuietStarForCausalLM, ids, mask, anchors, thoughts) -> Tensor:
    """The same packed sequence through the untouched decoder in eager mode, with dense masks."""
    base, config = model.base, model.config
    window = getattr(base.config, "sliding_window", None)
    masks = dense_masks(mask, anchors, config.num_slots, window)
    start, stop, _ = text_ranges(mask, ids)
    text = text_positions(start, stop)
    columns = anchors.shape[1]
    at = text.gather(1, anchors)
    positions = torch.cat([text] + [at + d for d in range(1, config.num_slots + 1)], 1)
    embed = base.get_input_embeddings()
    s = config.embedding_scale
    start_e = (model.thought_embedding.start * s).expand(len(ids), columns, -1)
    end_e = (model.thought_embedding.end * s).expand(len(ids), columns, -1)
    parts = [embed(ids), start_e]
    parts += [embed(thoughts[:, :, t]) for t in range(config.thought_length)]
    parts += [end_e]
    for k in range(1, config.talk_length):
        parts += [embed(ids.gather(1, (anchors + k).clamp(max=ids.shape[1] - 1)))]
    types = getattr(base.config, "layer_types", None)
    if types is not None and len(set(types)) > 1 or base.config.model_type in ("qwen2", "qwen3"):
        given: Tensor | dict = masks
    elif window is not None:
        given = masks["sliding_attention"]
    else:
        given = masks["full_attention"]
    ours = base.config._attn_implementation
    base.config._attn_implementation = "eager"
    try:
        return base.base_model(
            inputs_embeds=torch.cat(parts, 1),
            attention_mask=given,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
    finally:
        base.config._attn_implementation = ours


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_pass_equals_a_dense_mask(family: str, padding: str):
    model = build(family)
    config = model.config
    ids, mask = inputs(padding)
    anchors = torch.arange(LENGTH).repeat_interleave(2).expand(ROWS, -1)
    thoughts = torch.randint(3, VOCABULARY - 2, (ROWS, 2 * LENGTH, THOUGHT))
    with torch.no_grad():
        model.thought_embedding.start.normal_(0, 0.003)
        model.thought_embedding.end.normal_(0, 0.003)
    meta = model.thought_embedding(config.embedding_scale)
    real = mask.bool()
    keep = torch.cat([real, real.gather(1, anchors).repeat(1, config.num_slots)], 1)
    torch.manual_seed(5)
    direction = torch.randn(ROWS, keep.shape[1], 32) * keep[..., None]

    def gradients(hidden: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (hidden * direction).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    text, slots = packed_pass(model.base, config, meta, ids, text_ranges(mask, ids), anchors, thoughts)
    packed = torch.cat([text, slots.flatten(1, 2)], 1)
    ours = gradients(packed)
    dense = dense_run(model, ids, mask, anchors, thoughts)
    theirs = gradients(dense)
    scale = dense[keep].abs().max()
    assert (packed - dense)[keep].abs().max() / scale < 1e-5
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-12)
        assert error < 2e-5, f"gradient of {name} differs by {error:.1e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_layout_would_be_noticed(family: str):
    """The comparison above has teeth: moving every anchor by one changes the result by a lot."""
    model = build(family)
    ids, mask = inputs("none")
    anchors = torch.arange(LENGTH).expand(ROWS, -1)
    thoughts = torch.randint(3, VOCABULARY - 2, (ROWS, LENGTH, THOUGHT))
    meta = model.thought_embedding(model.config.embedding_scale)
    ranges = text_ranges(mask, ids)
    with torch.no_grad():
        _, slots = packed_pass(model.base, model.config, meta, ids, ranges, anchors, thoughts)
        moved = (anchors + 1).clamp(max=LENGTH - 1)
        _, wrong = packed_pass(model.base, model.config, meta, ids, ranges, moved, thoughts)
    assert (slots - wrong).abs().max() / slots.abs().max() > 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_forward_is_untouched(family: str):
    """Without thoughts the decoder computes what it computed before, padding included."""
    decoder = tiny_decoder(family)
    if getattr(decoder.config, "attn_logit_softcapping", None):
        # Some releases of transformers leave the soft-cap out of torch's fused attention.
        decoder.set_attn_implementation("eager")
    ids, mask = inputs("left")
    with torch.no_grad():
        before = decoder(ids, attention_mask=mask).logits
        model = QuietStarForCausalLM.from_base(decoder, start_token_id=94, end_token_id=95)
        after = model.base(ids, attention_mask=mask).logits
    real = mask.bool()
    assert torch.allclose(before[real], after[real], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("falcon", {"new_decoder_architecture": False}, "silently run without thoughts|interface"),
        ("bloom", {}, "silently run without thoughts|interface"),
        ("stablelm", {}, "silently run without thoughts|interface"),
        ("llama4_text", {}, "chunk"),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 4}, "window"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of type"),
        ("mamba", {}, "silently run without thoughts|interface|attention"),
    ],
)
def test_families_that_would_be_wrong_are_refused(kind: str, changes: dict, message: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(kind, **{**common, **changes})
    decoder = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=message):
        model = QuietStarForCausalLM.from_base(decoder, start_token_id=94, end_token_id=95)
        ids, _ = inputs("none")
        model(ids, labels=ids, thought_ids=torch.ones(ROWS, 1, LENGTH, 5, dtype=torch.long))


def test_positions_past_a_length_dependent_rope_are_refused():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
    }
    model = build("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    ids, _ = inputs("none")
    with pytest.raises(ValueError, match="need 20 positions.*longrope"):
        model(ids, labels=ids, thought_ids=torch.ones(ROWS, 1, LENGTH, THOUGHT, dtype=torch.long))


def test_learned_positions_are_not_exceeded():
    model = build("gpt2", n_positions=16)
    ids, _ = inputs("none")
    with pytest.raises(ValueError, match="need 20 positions; 'gpt2' has 16"):
        model(ids, labels=ids, thought_ids=torch.ones(ROWS, 1, LENGTH, THOUGHT, dtype=torch.long))
