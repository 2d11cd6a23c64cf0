"""Counting the passes through a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from quietstar import QuietStarForCausalLM
from quietstar.thinking.text_part import text_body


@contextmanager
def counted(model: QuietStarForCausalLM) -> Iterator[list[int]]:
    """Tokens per row of every pass through the decoder's body inside the block."""
    passes: list[int] = []

    def note(module, args, output) -> None:
        passes.append(output.last_hidden_state.shape[1])

    hook = text_body(model.base).register_forward_hook(note)
    try:
        yield passes
    finally:
        hook.remove()
