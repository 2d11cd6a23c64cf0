"""The text as it is generated, each token with the thought before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quietstar.modeling.model import QuietStarForCausalLM

TOKEN_COLUMN = 18


class ThoughtStreamer(BaseStreamer):
    """A line per token: the token, and dimmed beside it the thought that it came after."""

    def __init__(
        self,
        model: QuietStarForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        console: Console | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._prompt = True
        self._ids: list[int] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then one token [1] at a time."""
        if self._prompt:
            self._prompt = False
            return
        step = len(self._ids)
        before = self._tokenizer.decode(self._ids)
        self._ids += value.flatten().tolist()
        whole = self._tokenizer.decode(self._ids)
        # A token may be a part of a character, or change how the ones before it are spelt.
        piece = whole.removeprefix(before) if whole.startswith(before) else ""
        piece = piece or self._tokenizer.convert_ids_to_tokens(self._ids[-1])
        line = Text(_visible(piece).ljust(TOKEN_COLUMN))
        thoughts = [t for t in self._model.thoughts[-1:] if t.step == step]
        if thoughts:
            words = _visible(self._tokenizer.decode(thoughts[0].ids))
            line.append(f"  {words}  ({thoughts[0].mixing_weight:+.2f})", style="dim")
        self._console.print(line)

    def end(self) -> None:
        """The text in one piece."""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        self._console.print("\n" + text, markup=False)


def _visible(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
