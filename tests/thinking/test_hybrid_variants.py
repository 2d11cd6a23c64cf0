"""Hybrids as checkpoints set them otherwise, in texts longer than a chunk, against the plain decoder
that reads the text, start, thought and end as one sequence."""

import copy

import pytest
import torch
from families import thinking_model, tiny_decoder
from torch import Tensor
from transformers import PreTrainedModel

from quietstar import QuietStarForCausalLM
from quietstar.thinking.recurrent.linear_attention import CHUNK

START, END = 94, 95
# Convolutions of one input or many, without biases; one group, or all heads their own; limits of the
# steps; no positions; output layers that are the embedding.
VARIANTS = {
    "lfm2-1": ("lfm2", {"conv_L_cache": 1}),
    "lfm2-5": ("lfm2", {"conv_L_cache": 5, "conv_bias": False, "tie_word_embeddings": True}),
    "qwen3_5": ("qwen3_5_text", {"linear_conv_kernel_dim": 2, "linear_num_key_heads": 4}),
    "olmo_hybrid": ("olmo_hybrid", {"linear_allow_neg_eigval": False, "tie_word_embeddings": True}),
    "bamba": (
        "bamba",
        {"mamba_n_groups": 1, "mamba_conv_bias": False, "mamba_proj_bias": False, "mamba_d_conv": 2},
    ),
    "bamba-limits": ("bamba", {"time_step_limit": (0.01, 0.5)}),
    "granite": ("granitemoehybrid", {"position_embedding_type": "nope", "num_local_experts": 0}),
    "falcon_h1": ("falcon_h1", {"mamba_conv_bias": False, "projectors_bias": True}),
    "nemotron_h": ("nemotron_h", {"time_step_limit": (0.01, 0.5), "conv_kernel": 2}),
    "kimi": ("kimi_linear", {"linear_conv_kernel_dim": 2, "first_k_dense_replace": 3}),
}


def build(variant: str, thought: int) -> tuple[QuietStarForCausalLM, PreTrainedModel]:
    """A model whose predictions are those after a thought, with two tokens' embeddings around it, and a
    plain copy of its decoder."""
    family, changes = VARIANTS[variant]
    decoder = tiny_decoder(family, **changes)
    plain = copy.deepcopy(decoder)
    fields = {"thought_length": thought, "talk_length": 2, "mixing_activation": "sigmoid"}
    model = thinking_model(decoder, mixing_floor=1.0, **fields).eval()
    with torch.no_grad():
        start, end = decoder.get_input_embeddings()(torch.tensor([START, END]))
        model.thought_embedding.start.copy_(start / model.config.embedding_scale)
        model.thought_embedding.end.copy_(end / model.config.embedding_scale)
    return model, plain


def after(plain: PreTrainedModel, text: Tensor, thought: Tensor) -> Tensor:
    sequence = torch.cat([text, torch.tensor([START]), thought, torch.tensor([END])])
    return plain(input_ids=sequence[None], use_cache=False).logits[0, -1]


def differs(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("thought", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_thoughts_around_the_ends_of_chunks(variant: str, thought: int):
    """Documents of one token at a chunk's end and begin, and padding as long as a chunk."""
    model, plain = build(variant, thought)
    torch.manual_seed(3)
    length, padding = 2 * CHUNK + 2, CHUNK
    ids = torch.randint(3, 90, (2, length))
    mask, documents = torch.ones_like(ids), torch.zeros_like(ids)
    mask[0, :padding] = 0
    for first in (CHUNK - 1, CHUNK, CHUNK + 1):
        documents[1, first:] += 1
    begins = torch.tensor([0] * (CHUNK - 1) + [CHUNK - 1, CHUNK] + [CHUNK + 1] * (CHUNK + 1))
    thoughts = torch.randint(3, 90, (2, 1, length, thought))
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, document_ids=documents, thought_ids=thoughts).logits
        for row, at in [
            *((0, padding + n) for n in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1)),
            *((1, n) for n in (0, CHUNK - 2, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 2, length - 1)),
        ]:
            first = int(begins[at]) if row else padding
            wanted = after(plain, ids[row, first : at + 1], thoughts[row, 0, at])
            assert differs(logits[row, at], wanted) < 5e-5, (row, at)


@pytest.mark.parametrize("short", [1, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_from_rows_of_unequal_length(variant: str, short: int):
    """One row has fewer tokens than its convolution keeps, and one ends before the other."""
    model, plain = build(variant, 2)
    torch.manual_seed(4)
    length = CHUNK + 3
    ids = torch.randint(3, 90, (2, length))
    mask = torch.ones_like(ids)
    mask[0, :-short] = 0
    call = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        stop = int(model.generate(ids, max_new_tokens=2, **call)[0, -1])
        found = model.generate(
            ids,
            **{**call, "max_new_tokens": 5, "eos_token_id": stop},
            output_logits=True,
            return_dict_in_generate=True,
        )
        spoken = {(t.row, t.step): torch.tensor(t.ids) for t in model.thoughts}
        first = (length - short, 0)
        for (row, step), said in spoken.items():
            text = found.sequences[row, first[row] : length + step]
            if stop not in found.sequences[row, length : length + step]:
                wanted = after(plain, text, said)[:START]
                assert differs(found.logits[step][row, :START], wanted) < 5e-5, (row, step)
    assert {(0, 0), (1, 0)} <= set(spoken)
