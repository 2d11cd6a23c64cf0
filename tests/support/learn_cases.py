"""Batches and models of the tests of what is learned from."""

from typing import Any

import torch
from families import thinking_model, tiny_decoder
from torch import Tensor

from quietstar import QuietStarForCausalLM

THOUGHT, TALK, RATIONALES = 2, 3, 2


LENGTHS = (6, 13, 2, 9)


# Objectives with every term and rule that pads could get into.
FIELDS: dict[str, dict[str, Any]] = {
    "default": {},
    "stride": {"think_at": "stride:2"},
    "grpo": {"advantage": "normalized", "clamp_advantage": False, "entropy_bonus": 0.3},
    "rlp": {
        "reward": "information-gain",
        "advantage": "leave-one-out",
        "clamp_advantage": False,
        "nll_weight": 0.0,
        "entropy_bonus": 0.3,
        "mixing_activation": "sigmoid",
        "mixing_floor": 1.0,
    },
}


Row = dict[str, Tensor]


def build(**fields: Any) -> QuietStarForCausalLM:
    settings = {"thought_length": THOUGHT, "talk_length": TALK, "num_rationales": RATIONALES}
    model = thinking_model(tiny_decoder("llama", seed=2), **settings, **fields)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.mixing_head.fc3.weight.normal_(0, 0.3, generator=generator)
        model.thought_embedding.start.normal_(0, 0.01, generator=generator)
    return model.double().train()


def rows(copy: bool) -> list[Row]:
    """Texts with labels hidden here and there, given thoughts, and perhaps losses of a copy."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, 90, (length,), generator=generator)
        labels = ids.clone()
        labels[torch.rand(length, generator=generator) < 0.3] = -100
        labels[1] = ids[1]
        row = {"input_ids": ids, "labels": labels}
        row["thought_ids"] = torch.randint(3, 90, (RATIONALES, length, THOUGHT), generator=generator)
        if copy:
            # Of the token at each place; the first has none.
            row["baseline_losses"] = torch.rand(length, generator=generator) * 4
        made.append(row)
    return made


def lay(texts: list[list[Row]], before: int = 0, after: int = 0, right: bool = True) -> Row:
    """A batch: each row some documents one behind the other, and pads, the more the shorter it is."""
    longest = max(sum(len(text["input_ids"]) for text in row) for row in texts)
    width = before + longest + after
    shape = (len(texts), width)
    batch = {
        "input_ids": torch.full(shape, 7),
        "labels": torch.full(shape, 7),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "document_ids": torch.zeros(shape, dtype=torch.int64),
        "thought_ids": torch.full((len(texts), RATIONALES, width, THOUGHT), 5),
        "baseline_losses": torch.full(shape, 3.0),
    }
    for number, row in enumerate(texts):
        at = before if right else width - after - sum(len(text["input_ids"]) for text in row)
        for document, text in enumerate(row, 1):
            place = slice(at, at + len(text["input_ids"]))
            at = place.stop
            for name, value in text.items():
                where = (slice(None), place) if name == "thought_ids" else place
                batch[name][number][where] = value
            batch["attention_mask"][number, place] = 1
            batch["document_ids"][number, place] = document
    batch["baseline_losses"] = batch["baseline_losses"][:, 1:]
    if "baseline_losses" not in texts[0][0]:
        del batch["baseline_losses"]
    return batch
