"""Generating with thoughts, per new token, at a context of 256 tokens.

Against the reference's way, which runs the whole prefix and a thought at every position again for each
new token (once with the operators of this package, once as published, with dense masks and logits at
every depth), and against plain generation without thoughts, for which the ideal is T + 1 decoding steps
instead of one: the new token goes with the start token, and the last thought token with the end token.
The model is the recipe ``tiny``: hidden 128, 4 layers, vocabulary 2048, T = 5.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import compare, listening, record
from benchmarks.sequential import sequential_step
from quietstar import QuietStarForCausalLM

CONTEXT, NEW = 256, 8


def build() -> QuietStarForCausalLM:
    """The tiny recipe's model with random weights and a head that listens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = listening(LlamaForCausalLM(config), 0.1, thought_length=5).eval()
    model.generation_config.eos_token_id = None
    return model


def bench_generation(benchmark) -> None:  # type: ignore[no-untyped-def]
    """Time for eight new tokens, greedy, one row."""
    model = build()
    ids = torch.randint(0, 2046, (1, CONTEXT))
    options = {"max_new_tokens": NEW, "do_sample": False}

    def ours() -> torch.Tensor:
        return model.generate(ids, **options)

    def plain() -> torch.Tensor:
        return model.generate(ids, thinking="never", **options)

    @torch.no_grad()
    def everything_again() -> torch.Tensor:
        text = ids
        for _ in range(NEW):
            logits = model(text).logits[:, -1]
            logits[:, [2046, 2047]] = -torch.inf
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
        return text

    @torch.no_grad()
    def as_published() -> None:
        model.config.num_rationales = 1
        text = ids
        for _ in range(NEW):
            sequential_step(model, text)
            text = torch.cat([text, text[:, -1:]], 1)

    assert torch.equal(ours(), everything_again())
    table = compare(
        {
            "cached text, one thought per new token": ours,
            "plain generation, no thoughts": plain,
            "whole prefix and all thoughts again, our operators": everything_again,
            "whole prefix and all thoughts again, as published": as_published,
        },
        rounds=7,
        on_host=True,
    )
    record("generation", f"generation, {NEW} tokens after {CONTEXT}, tiny recipe", table)
    benchmark.pedantic(ours, rounds=2)
