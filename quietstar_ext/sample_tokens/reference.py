"""Reference of sample_tokens: plain PyTorch, in float64, on any device that has it."""

from __future__ import annotations

import math

import torch

from quietstar_ext.sample_tokens.call import Drawn, SampleTokens, Sampling

_LOW = 0xFFFFFFFF


def philox_uniform(seed: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """One float64 number in [0, 1) per counter, from Philox4x32-10 (Salmon et al., SC 2011).

    seed: int64, one element, the 64-bit key. counter: int64 of any shape, the low half of the 128-bit
    counter. The number is made of the upper 53 bits of the first two output words, word 1 above
    word 0.
    """

    def multiply(word: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
        product = word * factor  # wraps like unsigned arithmetic; int64 keeps all 64 bits
        return (product >> 32) & _LOW, product & _LOW

    key = seed.reshape(())
    k0, k1 = key & _LOW, (key >> 32) & _LOW
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2 = c3 = torch.zeros_like(counter)
    for _ in range(10):
        high0, low0 = multiply(c0, 0xD2511F53)
        high2, low2 = multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return ((c1 << 21) | (c0 >> 11)).double() * 2.0**-53


def reference(call: SampleTokens) -> Drawn:
    """A row that cannot be sampled gets token -1 and log-probability NaN."""
    logits, sampling, _ = call
    temperature, _, _, _, banned, seed, offset = sampling
    rows, vocab = logits.shape
    scores = logits.double()
    if banned is not None:
        scores = scores.index_fill(1, banned, -math.inf)
    largest = scores.amax(1, keepdim=True)
    bad = ~torch.isfinite(largest.squeeze(1)) | scores.isnan().any(1)
    ids = torch.arange(vocab, device=logits.device)

    if temperature == 0:
        tokens = torch.where(scores == largest, ids, vocab).amin(1)
        logprobs = torch.zeros(rows, dtype=torch.float64, device=logits.device)
    else:
        floor = _smallest_kept(scores, largest, sampling)
        scores = torch.where(scores < floor, -math.inf, scores)
        weights = ((scores - largest) / temperature).exp()
        edges = weights.cumsum(1)
        counter = offset + torch.arange(rows, device=logits.device)
        target = philox_uniform(seed, counter)[:, None] * edges[:, -1:]
        last = torch.where(weights > 0, ids, 0).amax(1)  # where rounding puts the target at the end
        tokens = torch.searchsorted(edges, target, right=True).squeeze(1).minimum(last)
        chosen = weights.gather(1, tokens[:, None])
        logprobs = (chosen / edges[:, -1:]).log().squeeze(1)
    return Drawn(torch.where(bad, -1, tokens), torch.where(bad, math.nan, logprobs).float())


def _smallest_kept(scores: torch.Tensor, largest: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The smallest score [rows, 1] that top_k, then top_p, then min_p keep."""
    temperature, top_k, top_p, min_p, *_ = sampling
    floor = torch.full_like(largest, -math.inf)
    if 0 < top_k < scores.shape[1]:
        floor = scores.topk(top_k, dim=1).values[:, -1:]
    if top_p < 1:
        ordered = torch.where(scores < floor, -math.inf, scores).sort(1, descending=True).values
        mass = ((ordered - largest) / temperature).exp().cumsum(1)
        reached = (mass >= top_p * mass[:, -1:]).int().argmax(1, keepdim=True)
        floor = ordered.gather(1, reached)
    if min_p > 0:
        floor = floor.maximum(largest + temperature * math.log(min_p))
    return floor
