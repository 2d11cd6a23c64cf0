"""The compiled kernels (csrc/bindings.cpp). Addresses are of CPU memory unless a name says otherwise."""

from typing import Any

def build_info() -> dict[str, Any]: ...
def set_simd(name: str) -> None: ...
def philox_uniform(key: int, counter: int) -> float: ...
def sample_tokens_workspace(vocab: int, threads: int) -> int: ...
def sample_tokens(
    logits: int,
    dtype: int,
    rows: int,
    vocab: int,
    row_stride: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    banned: int,
    banned_count: int,
    seed: int,
    offset: int,
    tokens: int,
    logprobs: int,
    workspace: int,
    threads: int,
    /,
) -> int: ...
