"""The operations that a training step needs, for model-FLOP utilisation: time is held against these.

A multiply-add counts two. Counted is what any implementation of the algorithm has to do:

- the body over text and slots, forward and backward (a backward takes two products per product);
- attention of each row over the keys that it sees: a causal half, not the square;
- the output layer: for each token drawn, one product; for the base and talk losses, and for the drawn
  tokens of thoughts that were rewarded, forward and backward;
- the mixing head.

Not counted, though this package does it: the rollout before the packed pass, which runs the text and the
thought's slots without gradients (an implementation that keeps their graphs would not run them again;
the field ``rollout`` says how much it is), activations computed again for checkpointing, attention
weights computed again in the backward pass, and masked keys. So utilisation reads low.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from quietstar.config import QuietStarConfig
from quietstar.plan.costs import Rows, Sizes, Step, step_flops


@dataclass(frozen=True)
class StepFlops:
    """Operations of one step by part; ``needed`` is the sum without ``rollout``."""

    body: float
    attention: float
    vocabulary: float
    mixing: float
    rollout: float

    @property
    def needed(self) -> float:
        """What the algorithm cannot do without."""
        return self.body + self.attention + self.vocabulary + self.mixing


def training_step_flops(
    config: QuietStarConfig, sizes: Sizes, batch: int, length: int, rewarded: float = 0.5
) -> StepFlops:
    """Operations of one step in which every parameter is trained.

    With B texts of N tokens, A positions per text that think, M = A R columns for R rationales (which
    share the start slot), S slots, T drawn and K talk tokens, width d, vocabulary V, P weights in the
    body's matrices, q = heads x head size and L layers::

        body        6 P B (N + A + (S-1) M)
        attention   12 q L B (N (N+1)/2 + M S ((N+1)/2 + (S+1)/2))
        vocabulary  2 d V (B M T + 3 (B (N-1) + B M K + rewarded B M T))
        mixing      6 d² (B N + 2 B M K)     the base half once per position, the rest per talk token

    Args:
        sizes: of the decoder (:func:`quietstar.plan.costs.decoder_sizes`).
        rewarded: the share of thoughts with a positive advantage; the others need no gradient.
    """
    rows = Rows.of(config, Step(batch, length))
    per_row, slots = (length + 1) / 2, config.num_slots
    pairs = rows.text * per_row + rows.columns * slots * (per_row + (slots + 1) / 2)
    drawn = rows.scored
    learned = rows.base + rows.talk + rewarded * drawn
    # The same rows without gradients, which plan counts.
    rollout = step_flops(config, sizes, replace(Step(batch, length), checkpointing=False))["rollout"]
    return StepFlops(
        body=6 * sizes.linear * rows.packed,
        attention=12 * sizes.query * sizes.layers * pairs,
        vocabulary=2 * sizes.width * sizes.vocabulary * (drawn + 3 * learned),
        mixing=6 * sizes.width**2 * (rows.text + 2 * rows.talk),
        rollout=rollout,
    )
