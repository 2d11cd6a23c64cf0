"""A small model and prompt that the generation tests share."""

import torch
from families import VOCABULARY, tiny_decoder

from quietstar import QuietStarForCausalLM


def build(family: str = "llama", vocabulary: int = VOCABULARY, **fields) -> QuietStarForCausalLM:
    model = QuietStarForCausalLM.from_base(
        tiny_decoder(family, vocab_size=vocabulary),
        **{"start_token_id": 39, "end_token_id": 40, "thought_length": 3, "talk_length": 2, **fields},
    ).eval()
    torch.manual_seed(11)
    with torch.no_grad():
        model.thought_embedding.start.normal_(0, 0.003)
        model.mixing_head.fc3.weight.normal_(0, 0.3)
    model.generation_config.eos_token_id = None
    return model


def prompt(padding: int = 3, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(3, 38, (3, length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask
