"""A thought longer than the sliding window, against the plain decoder's own run of one sequence."""

import pytest
import torch
from families import VOCABULARY, packed_pass, thinking_model, tiny_decoder
from families import gradients as gradients_of
from torch import Tensor

from quietstar import QuietStarForCausalLM
from quietstar.thinking.batch_share import BatchShard
from quietstar.thinking.layout import text_ranges
from quietstar.thinking.text_batch import TextBatch

LENGTH, THOUGHT, TALK = 9, 6, 3
SLOTS = THOUGHT + 2 + TALK - 1
START, END = VOCABULARY - 2, VOCABULARY - 1
# Mistral's windows are narrower than, as wide as and wider than what a thought holds; the others add
# what comes with their windows: soft-caps, sinks, layers without one.
DECODERS = [
    *(("mistral", window) for window in (1, 4, 5, 7, THOUGHT + 2, SLOTS + 1)),
    *((family, 4) for family in ("qwen2", "gemma2", "gemma3_text", "gpt_oss", "phi3")),
]


def build(family: str, window: int) -> QuietStarForCausalLM:
    """Mixing weight 1: the thought's prediction stands alone."""
    decoder = tiny_decoder(family, sliding_window=window)
    fields = {"thought_length": THOUGHT, "talk_length": TALK, "mixing_activation": "sigmoid"}
    model = thinking_model(decoder, seed=11, embeddings=0.004, mixing_floor=1.0, **fields).eval()
    model.generation_config.eos_token_id = None
    return model


def text(rows: int) -> Tensor:
    torch.manual_seed(3)
    return torch.randint(3, START, (rows, LENGTH))


def plain_hidden(model: QuietStarForCausalLM, ids: Tensor, chain: Tensor) -> Tensor:
    """Of the untouched decoder in eager mode, over ``ids`` [N] and a chain of embeddings [S, d]."""
    base = model.base
    embeds = torch.cat([base.get_input_embeddings()(ids), chain])[None]
    ours = base.config._attn_implementation
    base.set_attn_implementation("eager")
    try:
        return base.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0]
    finally:
        base.set_attn_implementation(ours)


def chain_of(model: QuietStarForCausalLM, ids: Tensor, anchor: int, thought: Tensor) -> Tensor:
    """Embeddings [S, d] of start, thought, end and the true tokens that follow the anchor."""
    embed, (start, end) = model.base.get_input_embeddings(), model.thought_embedding(100.0)
    following = ids[[min(anchor + k, LENGTH - 1) for k in range(1, TALK)]]
    return torch.cat([start[None], embed(thought), end[None], embed(following)])


@pytest.mark.parametrize(("family", "window"), DECODERS)
def test_packed_pass_with_gradients(family: str, window: int):
    model = build(family, window)
    ids = text(1)
    thoughts = torch.randint(3, START, (1, LENGTH, THOUGHT))
    direction = torch.randn(SLOTS, LENGTH, model.base.config.hidden_size)
    anchors = torch.arange(LENGTH)[None]

    def gradients(slots: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (slots * direction).sum().backward()
        return gradients_of(model)

    _, slots = packed_pass(model, ids, text_ranges(None, ids), anchors, thoughts)
    wanted = torch.stack(
        [
            plain_hidden(model, ids[0, : m + 1], chain_of(model, ids[0], m, thoughts[0, m]))[m + 1 :]
            for m in range(LENGTH)
        ],
        dim=1,
    )
    torch.testing.assert_close(slots[0], wanted, rtol=1e-4, atol=1e-4)
    ours, theirs = gradients(slots[0]), gradients(wanted)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-5, name


@pytest.mark.parametrize(("family", "window"), DECODERS)
def test_rollout(family: str, window: int):
    model = build(family, window)
    ids = text(2)
    ranges, shard = text_ranges(None, ids), BatchShard(seed=5)
    batch = TextBatch(model.config, ids, ranges, rationales=2, shard=shard)
    found = model.thought_decoder.rollout(batch, model.config.num_slots)
    assert found.ids is not None and found.slot_hidden is not None
    for row in range(2):
        for column in (0, 3, 8, 2 * LENGTH - 1):
            m = int(found.anchors[row, column // 2])
            chain = chain_of(model, ids[row], m, found.ids[row, column])
            with torch.no_grad():
                wanted = plain_hidden(model, ids[row, : m + 1], chain)[m + 1 :]
            torch.testing.assert_close(found.slot_hidden[row, :, column], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "window"), DECODERS[1:])
def test_generation(family: str, window: int):
    """Greedy, from a cache that holds only the window's part of the text: each token in its turn is the
    plain decoder's first choice."""
    model = build(family, window)
    ids = text(2)
    made = model.generate(ids, max_new_tokens=3, do_sample=False)
    thoughts = {(t.row, t.step): t.ids for t in model.thoughts}
    start, end = model.thought_embedding(100.0)
    embed, head = model.base.get_input_embeddings(), model.base.get_output_embeddings()

    @torch.no_grad()
    def is_best(token: int, seen: Tensor, chain: list[Tensor]) -> bool:
        """Up to what rounding decides."""
        logits = head(plain_hidden(model, seen, torch.stack(chain))[-1])
        logits[[START, END]] = -torch.inf
        return bool(logits[token] >= logits.max() - 1e-3)

    for row in range(2):
        for step in range(3):
            seen, chain = made[row, : LENGTH + step], [start]
            for token in thoughts[row, step]:
                assert is_best(token, seen, chain)
                chain.append(embed(torch.tensor(token)))
            assert len(chain) == 1 + THOUGHT
            assert is_best(int(made[row, LENGTH + step]), seen, [*chain, end])
