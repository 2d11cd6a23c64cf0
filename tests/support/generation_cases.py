"""A small model and prompt that the generation tests share."""

import torch
from families import VOCABULARY, thinking_model, tiny_decoder

from quietstar import QuietStarForCausalLM

NEW = 5


def build(family: str = "llama", vocabulary: int = VOCABULARY, **fields) -> QuietStarForCausalLM:
    fields = {"thought_length": 3, "talk_length": 2, **fields}
    model = thinking_model(
        tiny_decoder(family, vocab_size=vocabulary),
        **{"start_token_id": 39, "end_token_id": 40, "seed": 11, "mixing": 0.3, "embeddings": 0.003},
        **fields,
    ).eval()
    model.generation_config.eos_token_id = None
    return model


def options(**more) -> dict:
    """Arguments of generate for the prompt's batch."""
    return {"attention_mask": prompt()[1], "max_new_tokens": NEW, "do_sample": False, **more}


def prompt(padding: int = 3, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(3, 38, (3, length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask
