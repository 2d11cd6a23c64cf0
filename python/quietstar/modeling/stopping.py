"""Where generation ends beside the end-of-text token: at texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens that are looked at in any case.
MIN_TAIL = 8


class StopAtText(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Rows whose new text holds one of some texts are done.

    Transformers' own ``stop_strings`` reads a text out of the tokenizer's pieces and fails on tokenizers
    of whole words; this one decodes the last tokens.

    Args:
        texts: none of them empty; prompt_length: tokens of a row before what is new.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompt_length: int):
        self.tokenizer, self.texts, self.start = tokenizer, tuple(texts), prompt_length
        # No token has less than a byte; before that a token more, as some lose a space at the start.
        self.tail = max(MIN_TAIL, *(len(text.encode()) + 1 for text in self.texts))

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        # What came before was looked at in earlier steps.
        tail = input_ids[:, max(self.start, input_ids.shape[1] - self.tail) :]
        decoded = self.tokenizer.batch_decode(tail)
        done = [any(text in row for text in self.texts) for row in decoded]
        return torch.tensor(done, device=input_ids.device)
