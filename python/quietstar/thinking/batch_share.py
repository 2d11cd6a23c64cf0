"""One batch over several processes: what each must know of the others to compute what one alone would.

The loss is a sum of means: over the tokens that count, over those of each talk step, over the thoughts
that can be rewarded. A mean over processes of such means is another number where their counts differ,
so every process divides by the *mean count of all parts* instead of its own; the average of gradients
that DDP and FSDP take is then exactly the whole batch's gradient. Random numbers are numbered over the
whole batch, so that the parts draw the thoughts that one process would draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quietstar.thinking.rollout import Thoughts

MeanCount = Callable[[str, Tensor], Tensor]


class BatchShard:
    """Which part of a batch a call sees. The parts have the same number of rows.

    Not a dataclass on purpose: FSDP rebuilds dataclass arguments when it casts inputs.

    Args:
        index: of this part; count: how many parts there are.
        mean_count: takes a name (``"targets"`` or ``"thoughts"``) and this part's counts (any shape) and
            returns the mean over the parts, in the shape and on the device of the counts. Asked once for
            each name in a training pass, in the same order on every process. Default: the counts
            themselves.
        seed: of what is drawn, the same for all parts. Default: drawn from torch's generator, so that
            torch.manual_seed repeats it.
        thoughts: of these rows, sampled before; None: the pass samples them.
        only_thinks: stop after the rollout and return its thoughts.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        mean_count: MeanCount | None = None,
        seed: int | None = None,
        thoughts: Thoughts | None = None,
        only_thinks: bool = False,
    ):
        if not 0 <= index < count:
            raise ValueError(f"index is {index}; expected a part from 0 to {count - 1} (count - 1)")
        self.index = index
        self.count = count
        self.thoughts, self.only_thinks = thoughts, only_thinks
        self._seed = seed
        self._mean_count = mean_count

    def mean_count(self, name: str, own: Tensor) -> Tensor:
        """What to divide a sum over this part by, fp32: the mean count of the parts, but never zero
        (where nothing counts the sum is zero as well)."""
        mean = own if self._mean_count is None else self._mean_count(name, own)
        return mean.float().clamp(min=1e-6)

    def seed(self) -> int:
        """Of the thoughts of one pass; to be asked once for each."""
        return int(torch.randint(2**62, ())) if self._seed is None else self._seed

    def thinking(self) -> BatchShard:
        """The same share, of which only the rollout is made."""
        return BatchShard(self.index, self.count, self._mean_count, self._seed, only_thinks=True)

    def uniform(self, rows: int, columns: int) -> Tensor:
        """This part's rows [rows, columns] of uniform numbers that are drawn for every part, fp32.

        Drawn column by column: more columns (padding) leave the numbers of the first as they were.
        """
        generator = None if self._seed is None else torch.Generator().manual_seed(self._seed)
        drawn = torch.rand(columns, rows * self.count, generator=generator)
        return drawn.T.chunk(self.count)[self.index]


class ThoughtOver:
    """What a batch's rollout leaves for the parts that are learnt from one after the other.

    Not a dataclass either: FSDP would round the divisors to the dtype of its outputs.

    Args:
        thoughts: of all rows; None where the model has none.
        divisors: by the names that ``mean_count`` is asked for, of the whole batch.
    """

    def __init__(self, thoughts: Thoughts | None, divisors: Mapping[str, Tensor]):
        self._thoughts, self._divisors = thoughts, divisors

    def part(self, rows: slice) -> BatchShard:
        """What the model is told about some of the rows."""
        thoughts = None if self._thoughts is None else self._thoughts.of_rows(rows)
        return BatchShard(mean_count=lambda name, own: self._divisors[name], thoughts=thoughts)


WHOLE_BATCH = BatchShard()
