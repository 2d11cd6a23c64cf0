"""Every tested model family: the packed pass equals an ordinary run with a dense mask."""

import pytest
import torch
from families import FAMILIES, VOCABULARY, packed_pass, thinking_model, tiny_decoder
from families import gradients as gradients_of
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from quietstar import QuietStarForCausalLM
from quietstar.thinking.layout import text_positions, text_ranges

ROWS, LENGTH, THOUGHT, TALK = 2, 14, 3, 2


def build(family: str, **changes) -> QuietStarForCausalLM:
    decoder = tiny_decoder(family, **changes)
    return thinking_model(decoder, thought_length=THOUGHT, talk_length=TALK)


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
    start, stop, *_ = text_ranges(mask, ids)
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
    real = mask.bool()
    keep = torch.cat([real, real.gather(1, anchors).repeat(1, config.num_slots)], 1)
    torch.manual_seed(5)
    direction = torch.randn(ROWS, keep.shape[1], 32) * keep[..., None]

    def gradients(hidden: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (hidden * direction).sum().backward()
        return gradients_of(model)

    text, slots = packed_pass(model, ids, text_ranges(mask, ids), anchors, thoughts)
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
    ranges = text_ranges(mask, ids)
    with torch.no_grad():
        _, slots = packed_pass(model, ids, ranges, anchors, thoughts)
        moved = (anchors + 1).clamp(max=LENGTH - 1)
        _, wrong = packed_pass(model, ids, ranges, moved, thoughts)
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
        model = thinking_model(decoder)
        after = model.base(ids, attention_mask=mask).logits
    real = mask.bool()
    assert torch.allclose(before[real], after[real], atol=1e-5)


_ENCODER_DECODER = {
    **{"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    **{"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48},
    **{"is_decoder": True, "is_encoder_decoder": False, "bos_token_id": 1, "eos_token_id": 2},
    "decoder_start_token_id": 1,
}


_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("falcon", {"new_decoder_architecture": False}, "silently run without thoughts|interface"),
        ("bloom", {}, "silently run without thoughts|interface"),
        ("stablelm", {}, "silently run without thoughts|interface"),
        ("llama4_text", {}, "chunk"),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 4}, "window"),
        ("minimax", {"layer_types": ["linear_attention", "full_attention"]}, "lightning attention"),
        ("mamba", {}, "silently run without thoughts|interface|attention"),
        ("bart", _ENCODER_DECODER, "'bart' computes a thought .* differently"),
        ("marian", _ENCODER_DECODER, "'marian' computes a thought .* differently"),
        ("bigbird_pegasus", _ENCODER_DECODER, "is_causal=False"),
        ("doge", {}, "mask of its own"),
        ("diffllama", {}, "layers 0, 1 of 2 attended more than once"),
        ("nemotron", {}, "does not hand the thought layout down"),
        ("gemma3n_text", {**_PER_LAYER, "num_kv_shared_layers": 0}, "hidden_size_per_layer_input is 8"),
    ],
)
def test_families_that_would_be_wrong_are_refused(kind: str, changes: dict, message: str):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0}
    common = {**sizes, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = AutoConfig.for_model(kind, **{**common, **changes})
    decoder = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=message):
        model = thinking_model(decoder)
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


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"n_positions": 16}),
        ("gpt_bigcode", {"n_positions": 16}),
        ("opt", {"max_position_embeddings": 16}),
        ("biogpt", {"max_position_embeddings": 16}),
    ],
)
def test_learned_positions_are_not_exceeded(family: str, changes: dict):
    sizes = {
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2},
        "num_attention_heads": 4,
        **{"word_embed_proj_dim": 32, "ffn_dim": 48, "intermediate_size": 48},
        **{"attn_pdrop": 0.0, "attention_dropout": 0.0, "attention_probs_dropout_prob": 0.0},
    }
    decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **changes}))
    model = thinking_model(decoder, thought_length=THOUGHT, talk_length=TALK).eval()
    ids, _ = inputs("none")
    limit = rf"'{family}' has 16 learned ones"
    with pytest.raises(ValueError, match=f"text and thought need 20 positions; {limit}"):
        model(ids, labels=ids, thought_ids=torch.ones(ROWS, 1, LENGTH, THOUGHT, dtype=torch.long))
    with pytest.raises(ValueError, match=f"text and thought need 19 positions; {limit}"):
        model.generate(ids, max_new_tokens=1)
    fitting = ids[:, :10]
    assert model(fitting, labels=fitting).loss.isfinite()
    model.config.thought_kind = "none"
    long = torch.cat([ids, ids], dim=1)
    for use in (lambda: model(long, labels=long), lambda: model.generate(long, max_new_tokens=1)):
        with pytest.raises(ValueError, match=f"the text needs 28 positions; {limit}"):
            use()


def test_values_may_be_wider_than_keys():
    model = build("deepseek_v3", v_head_dim=20).eval()
    model.config.mixing_activation, model.config.mixing_floor = "sigmoid", 1.0
    ids, _ = inputs("none")
    thoughts = torch.randint(3, VOCABULARY - 2, (ROWS, 1, LENGTH, THOUGHT))
    packed = model(ids, labels=ids, thought_ids=thoughts)
    sampled = model(ids, labels=ids)
    again = model(ids, labels=ids, thought_ids=sampled.thought_ids)
    assert torch.allclose(sampled.talk_losses, again.talk_losses, atol=1e-5)
    assert not torch.allclose(sampled.talk_losses, packed.talk_losses, atol=1e-3)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_implementation_that_was_loaded_is_obeyed(implementation: str, tmp_path, monkeypatch):
    from transformers.models.qwen2 import modeling_qwen2

    calls = []
    stock = modeling_qwen2.eager_attention_forward
    monkeypatch.setattr(
        modeling_qwen2, "eager_attention_forward", lambda *a, **k: calls.append(1) or stock(*a, **k)
    )
    model = build("qwen2").eval()
    expected = model(*inputs("left")).logits
    assert not calls
    model.save_pretrained(tmp_path)
    decoder = AutoModelForCausalLM.from_config(
        model.base.config.__class__(**model.base.config.to_dict()), attn_implementation=implementation
    )
    decoder.load_state_dict(model.base.state_dict())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation).eval()
    fresh = thinking_model(decoder, thought_length=THOUGHT, talk_length=TALK).eval()
    fresh.load_state_dict(model.state_dict())
    for again in (opened, fresh):
        calls.clear()
        ids, mask = inputs("left")
        got = again(ids, attention_mask=mask).logits
        assert bool(calls) == (implementation == "eager")
        assert torch.allclose(got[mask.bool()], expected[mask.bool()], atol=1e-5)
        again.config.thought_kind = "none"
        calls.clear()
        again(ids, attention_mask=mask)
        assert bool(calls) == (implementation == "eager")


def test_an_implementation_that_cannot_be_combined_is_refused():
    decoder = tiny_decoder("llama")
    decoder.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match="attn_implementation is 'flash_attention_2'; expected 'sdpa' or"
    ):
        thinking_model(decoder)
    model = build("llama").eval()
    model.base.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation of the decoder was set to 'eager' after"):
        model(inputs("none")[0])


def test_how_experts_run_is_kept():
    decoder = tiny_decoder("gpt_oss")
    loaded = decoder.config._experts_implementation
    assert loaded is not None
    model = thinking_model(decoder)
    assert model.base.config._experts_implementation == loaded


class _Asks(torch.nn.Module):
    """Calls a layer's attention with something more."""

    def __init__(self, layer: torch.nn.Module, **more):
        super().__init__()
        self.layer, self.more = layer, more

    def forward(self, **kwargs):
        return self.layer(**{**kwargs, **self.more})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"position_bias": torch.zeros(1)}, "LlamaAttention calls its attention with position_bias"),
        ({"head_mask": torch.ones(4)}, "calls its attention with head_mask"),
        ({"is_causal": False}, "is_causal=False"),
        ({"attention_mask": torch.zeros(1, 1, 6, 6)}, "mask of its own"),
        ({"cu_seq_lens_q": None, "output_attentions": False}, None),
    ],
)
def test_what_attention_would_ignore_is_refused(more: dict, message: str | None):
    decoder = tiny_decoder("llama")
    layer = decoder.model.layers[1]
    layer.self_attn = _Asks(layer.self_attn, **more)
    model = thinking_model(decoder, self_check=False).eval()
    model._checked = {"logits"}
    if message is None:
        assert model(inputs("none")[0]).logits.isfinite().all()
    else:
        with pytest.raises(ValueError, match=message):
            model(inputs("none")[0])
