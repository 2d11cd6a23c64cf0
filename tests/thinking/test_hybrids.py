"""Decoders that mix attention with layers that hand states on: thoughts equal plain runs of one sequence
per column."""

import copy
import functools
import pickle
import sys

import pytest
import torch
from families import HYBRIDS, VOCABULARY, gradients, packed_pass, thinking_model, tiny_decoder
from torch import Tensor
from transformers import AutoModelForCausalLM

from quietstar import QuietStarForCausalLM
from quietstar.thinking.layout import TextRanges, text_ranges
from quietstar.thinking.recurrent import linear_attention

ROWS, LENGTH, THOUGHT, TALK = 2, 14, 3, 2
SCANS = ("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Chunks shorter than the texts, so that states go from one to the next."""
    monkeypatch.setattr(linear_attention, "CHUNK", 4)


def build(family: str, changes: dict | None = None, **fields) -> QuietStarForCausalLM:
    fields = {"thought_length": THOUGHT, "talk_length": TALK, **fields}
    decoder = tiny_decoder(family, **(changes or {}))
    return thinking_model(decoder, seed=4, mixing=0.3, embeddings=0.003, **fields)


def text(kind: str) -> tuple[Tensor, Tensor, TextRanges]:
    torch.manual_seed(3)
    ids = torch.randint(3, VOCABULARY - 2, (ROWS, LENGTH))
    mask, documents = torch.ones_like(ids), None
    if kind == "left":
        mask[0, :5] = 0
    if kind == "right":
        mask[1, -5:] = 0
    if kind == "documents":
        mask[1, -2:] = 0
        documents = torch.tensor([[0] * 5 + [1] * 2 + [2] * 7, [0] * 1 + [1] * 8 + [2] * 5])
    return ids, mask, text_ranges(mask, ids, documents)


def plain_runs(model: QuietStarForCausalLM, ids, ranges: TextRanges, anchors, thoughts):
    """Hidden states of texts [B, N, d] and slots [B, S, M, d], each column a sequence of its own that
    begins with its document; padding is left at zero."""
    config, embed = model.config, model.base.get_input_embeddings()
    start, end = model.thought_decoder.start_end_embeddings()
    body, size = model.base.base_model, config.num_slots
    sequences, places = [], []
    for row in range(ROWS):
        for column, anchor in enumerate(anchors[row].tolist()):
            first = int(ranges.start[row, anchor])
            if first > anchor:
                continue  # padding
            said = [*embed(ids[row, first : anchor + 1]), start, *embed(thoughts[row, column]), end]
            ahead = [min(anchor + k, LENGTH - 1) for k in range(1, config.talk_length)]
            said += list(embed(ids[row, ahead]))
            sequences.append(torch.stack(said))
            places.append((row, column, anchor, len(said)))
    embeds = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    if body.config.model_type == "falcon_h1":  # which does so by itself with tokens only
        embeds = embeds * body.config.embedding_multiplier
    found = body(inputs_embeds=embeds, use_cache=False).last_hidden_state
    text = torch.zeros(ROWS, LENGTH, found.shape[-1])
    slots = torch.zeros(ROWS, size, anchors.shape[1], found.shape[-1])
    for hidden, (row, column, anchor, count) in zip(found, places, strict=True):
        text[row, anchor] = hidden[count - size - 1]
        slots[row, :, column] = hidden[count - size : count]
    return text, slots


def largest(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def changes_chunks(model: QuietStarForCausalLM, monkeypatch) -> bool:
    """Let the family's own scan go by chunks of another size, if it has one."""
    home, changed = sys.modules[type(model.base).__module__], False
    for name in SCANS:
        if scan := getattr(home, name, None):
            monkeypatch.setattr(home, name, functools.partial(scan, chunk_size=4))
            changed = True
    for module in model.modules():
        if hasattr(module, "ssm_state_size"):
            module.chunk_size, changed = 16, True
    return changed


@pytest.mark.parametrize("kind", ["none", "left", "right", "documents"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_the_packed_pass_equals_one_sequence_per_column(family: str, kind: str, monkeypatch):
    model = build(family)
    ids, _, ranges = text(kind)
    # Of positions that no chunk has equally many of; two columns at each, as rationales have.
    anchors = torch.arange(LENGTH)[torch.arange(LENGTH) != 9].repeat_interleave(2).expand(ROWS, -1)
    thoughts = torch.randint(3, VOCABULARY - 2, (*anchors.shape, THOUGHT))
    real = (ranges.start < ranges.stop)[..., None]
    real[:, 9] = False  # where no plain run ends
    torch.manual_seed(5)
    direction = torch.randn(ROWS, LENGTH + model.config.num_slots * anchors.shape[1], 32)
    kept = torch.cat(
        [real[..., 0], real[..., 0].gather(1, anchors).repeat(1, model.config.num_slots)], dim=1
    )

    def hidden_and_gradients(run) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        text, slots = run(model, ids, ranges, anchors, thoughts)
        hidden = torch.cat([text, slots.flatten(1, 2)], 1)
        (hidden * direction * kept[..., None]).sum().backward()
        return hidden.detach()[kept], gradients(model)

    ours, our_gradients = hidden_and_gradients(packed_pass)
    theirs, their_gradients = hidden_and_gradients(plain_runs)
    # The family's own result changes by so much when its scan goes by chunks of another size.
    noise = gradient_noise = 0.0
    if changes_chunks(model, monkeypatch):
        again, its_gradients = hidden_and_gradients(plain_runs)
        noise = largest(again, theirs)
        gradient_noise = max(largest(its_gradients[n], g) for n, g in their_gradients.items())
        assert noise < 5e-5 and gradient_noise < 5e-4
    assert largest(ours, theirs) < 1e-5 + 2 * noise
    assert set(our_gradients) == set(their_gradients)
    for name, gradient in their_gradients.items():
        error = largest(our_gradients[name], gradient)
        assert error < 5e-5 + 2 * gradient_noise, f"gradient of {name} differs by {error:.1e}"


def test_layers_that_are_an_mlp_alone_may_stand_between():
    kinds = ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"]
    model = build("nemotron_h", {"layers_block_type": kinds})
    ids, _, ranges = text("documents")
    anchors = torch.arange(LENGTH).expand(ROWS, -1)
    thoughts = torch.randint(3, VOCABULARY - 2, (*anchors.shape, THOUGHT))
    real = (ranges.start < ranges.stop)[..., None]
    with torch.no_grad():
        for found, wanted in zip(
            packed_pass(model, ids, ranges, anchors, thoughts),
            plain_runs(model, ids, ranges, anchors, thoughts),
            strict=True,
        ):
            seen = real if found.dim() == 3 else real[:, None]
            assert largest(found * seen, wanted * seen) < 2e-5


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_wrong_state_would_be_noticed(family: str):
    """The comparison above has teeth: a state one token old changes every thought."""
    model = build(family)
    ids, _, ranges = text("none")
    anchors = torch.arange(1, LENGTH).expand(ROWS, -1)
    thoughts = torch.randint(3, VOCABULARY - 2, (*anchors.shape, THOUGHT))
    with torch.no_grad():
        _, slots = packed_pass(model, ids, ranges, anchors, thoughts)
        _, wrong = packed_pass(model, ids, ranges, anchors - 1, thoughts)
    assert (slots - wrong).abs().max() / slots.abs().max() > 0.02


@pytest.mark.parametrize("kind", ["left", "right", "documents"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_what_the_rollout_samples_has_the_same_losses_when_it_is_given(family: str, kind: str):
    model = build(family, num_rationales=2, think_at="stride:2")
    ids, mask, ranges = text(kind)
    documents = None if kind != "documents" else ranges.start * mask
    call = {"attention_mask": mask, "labels": ids, "document_ids": documents}
    with torch.no_grad():  # the rollout's own hidden states
        sampled = model(ids, thought_temperature=1.0, **call)
    model.train()
    again = model(ids, thought_ids=sampled.thought_ids, **call)
    for name in ("base_losses", "talk_losses", "reward", "mixing_weight"):
        assert torch.allclose(getattr(sampled, name), getattr(again, name), atol=2e-5), name
    other = model(ids, thought_ids=sampled.thought_ids.flip(-1), **call)
    assert not torch.allclose(again.talk_losses, other.talk_losses, atol=1e-3)


@pytest.mark.parametrize("family", HYBRIDS)
def test_checkpointing_and_reused_outputs_change_no_gradient(family: str):
    model = build(family, num_rationales=2).train()
    ids, mask, _ = text("left")
    thoughts = torch.randint(3, VOCABULARY - 2, (ROWS, 2, LENGTH, THOUGHT))

    def run(**call) -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        model(ids, attention_mask=mask, labels=ids, **call).loss.backward()
        return gradients(model)

    def check(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
        assert set(found) == set(wanted)
        for name, gradient in wanted.items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max()), (
                name
            )

    given, sampled = run(thought_ids=thoughts), run()
    model.reuse_rollout(True)
    check(run(), sampled)
    model.reuse_rollout(False)
    for kept in (None, {"keep": "products"}):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kept)
        check(run(thought_ids=thoughts), given)
        check(run(), sampled)
        model.gradient_checkpointing_disable()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text", "falcon_h1"])
def test_torch_compile_leaves_these_layers_out(family: str):
    """Of every kind one: what is compiled around them gives the same gradients."""
    model = build(family).train()
    ids, mask, _ = text("left")
    call = {"attention_mask": mask, "labels": ids}
    call["thought_ids"] = torch.randint(3, VOCABULARY - 2, (ROWS, 1, LENGTH, THOUGHT))
    model(ids, **call).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    torch.compile(model, backend="eager")(ids, **call).loss.backward()
    for name, gradient in gradients(model).items():
        assert largest(gradient, wanted[name]) < 1e-4, name


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("family", HYBRIDS)
def test_generation_with_a_cache_equals_reading_everything_again(family: str, chunk: int | None):
    model = build(family).eval()
    ids, mask, _ = text("left")
    found = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        thinking="every:2",
        prefill_chunk_size=chunk,
    )
    for step in range(4):
        so_far = found.sequences[:, : LENGTH + step]
        seen = torch.cat([mask, torch.ones(ROWS, step, dtype=mask.dtype)], dim=1)
        model.config.thought_kind = "sampled" if step % 2 == 0 else "none"
        with torch.no_grad():
            logits = model(so_far, attention_mask=seen, logits_to_keep=1).logits[:, 0]
        wanted = logits[:, : VOCABULARY - 2]
        error = (found.logits[step][:, : VOCABULARY - 2] - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-5


@pytest.mark.parametrize("family", HYBRIDS)
def test_beams_take_their_states_along(family: str):
    model = build(family).eval()
    ids, _, _ = text("none")
    call = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False}
    with_cache = model.generate(ids, **call)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **call))


@pytest.mark.parametrize("family", HYBRIDS)
def test_saved_copied_and_pickled_models_think_the_same(family: str, tmp_path):
    model = build(family).eval()
    ids, _, _ = text("none")
    with torch.no_grad():
        wanted = model(ids).logits
        model.save_pretrained(tmp_path)
        for again in (
            AutoModelForCausalLM.from_pretrained(tmp_path).eval(),
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
        ):
            assert largest(again(ids).logits, wanted) < 1e-5
        # A copy has layers of its own.
        next(again.base.base_model.layers[0].parameters()).add_(1.0)
        assert not torch.allclose(again(ids).logits, wanted, atol=1e-3)
        assert torch.allclose(model(ids).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("family", HYBRIDS)
def test_half_precision_is_finite(family: str):
    model = build(family).to(torch.bfloat16).train()
    ids, mask, _ = text("left")
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    model.zero_grad()
    full = build(family).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = full(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(full).values())


@pytest.mark.parametrize("family", HYBRIDS)
def test_ordinary_passes_are_the_decoders_own(family: str):
    decoder = tiny_decoder(family)
    ids, _, _ = text("none")
    with torch.no_grad():
        before = decoder(ids).logits
        model = thinking_model(decoder)
        assert torch.equal(model.base(ids).logits, before)
        ours = model.base.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(
        ours, tiny_decoder(family).generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    )


@pytest.mark.parametrize("family", HYBRIDS)
def test_no_kernel_takes_a_functions_place_in_passes_with_thoughts(family: str, monkeypatch):
    model = build(family).eval()
    ids, mask, _ = text("left")
    wanted = model(ids, attention_mask=mask).logits  # with the self-check, which runs the family's own
    home = sys.modules[type(model.base).__module__]
    names = [name for name in vars(home) if "conv1d" in name or "delta_" in name or "scan" in name]
    assert names

    def fail(*_, **__):
        raise AssertionError("a function of the family's module was called")

    for name in names:
        monkeypatch.setattr(home, name, fail)
    again = copy.deepcopy(model)
    assert torch.allclose(again(ids, attention_mask=mask).logits, wanted, atol=1e-6)
    again.generate(ids, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(AssertionError, match="of the family's module"):
        model.base(ids)


def test_layers_of_which_one_took_no_part_are_named():
    model = build("lfm2").eval()
    del model.base.model.layers[2].conv.forward
    ids, _, _ = text("none")
    with pytest.raises(ValueError, match="'lfm2': layer 2 of 3 made no use of the thought layout"):
        model(ids)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_weights_that_accelerate_puts_away(family: str, when: str):
    """A mixer's own, and those that it hands to a function."""
    from accelerate import cpu_offload

    wanted = build(family).eval()
    decoder = tiny_decoder(family)
    if when == "before":
        cpu_offload(decoder, execution_device=torch.device("cpu"))
    model = thinking_model(decoder).eval()
    if when == "after":
        cpu_offload(decoder, execution_device=torch.device("cpu"))
    assert all(p.device.type == "meta" for p in model.base.base_model.layers[0].parameters())
    model.config = wanted.config
    model.mixing_head, model.thought_embedding = wanted.mixing_head, wanted.thought_embedding
    ids, mask, _ = text("left")
    with torch.no_grad():
        logits = wanted(ids, attention_mask=mask).logits
        assert largest(model(ids, attention_mask=mask).logits, logits) < 1e-6
