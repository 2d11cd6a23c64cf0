"""How well a model predicts held-out text, with its thoughts and without.

Per token, in nats: the base prediction (no thought) and the mixed one (talk step 0, after a thought
at the position before the token). Means are over tokens; standard errors are over blocks, because
the tokens of a block are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quietstar.data.collator import PaddingCollator
from quietstar.errors import UserError
from quietstar.thinking.batch_share import BatchShard

if TYPE_CHECKING:
    import numpy.typing as npt

    from quietstar.modeling.model import QuietStarForCausalLM

    Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TokenLosses:
    """Losses of every predicted token, nats.

    base, mixed: [blocks, N-1] float64; entry i predicts token i + 1. counted: [blocks, N-1] bool,
    whether that token is text with a label, and a token of its document stands before it. Without
    thoughts ``mixed`` equals ``base``.
    """

    base: Array
    mixed: Array
    counted: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error (None where there are fewer than two blocks)."""

    mean: float
    error: float | None

    def to_dict(self) -> dict[str, float | None]:
        """As plain data."""
        return {"mean": self.mean, "standard_error": self.error}

    def __str__(self) -> str:
        return spread(self.to_dict(), ".4f")


def spread(plain: Mapping[str, Any], digits: str = ".3f") -> str:
    """The plain data of an :class:`Estimate` as ``mean ± standard error``."""
    mean, error = plain["mean"], plain["standard_error"]
    return f"{mean:{digits}}" + ("" if error is None else f" ± {error:{digits.lstrip('+')}}")


@contextmanager
def undisturbed(model: Any, seed: int | None = None, **fields: Any) -> Iterator[None]:
    """Evaluation mode, no gradients, torch's generator seeded and other configuration ``fields`` (those
    that the model has); everything is restored afterwards."""
    config, training = model.config, getattr(model, "training", False)
    before = {name: getattr(config, name) for name in fields if hasattr(config, name)}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        if seed is not None:
            torch.manual_seed(seed)
        if hasattr(model, "eval"):  # always: a part of it may be in training mode
            model.eval()
        try:
            for name in before:
                setattr(config, name, fields[name])
            yield
        finally:
            for name, value in before.items():
                setattr(config, name, value)
            if training:
                model.train()


def token_losses(
    model: QuietStarForCausalLM,
    blocks: Iterable[dict[str, torch.Tensor]],
    *,
    batch_size: int = 8,
    padding_side: str = "right",
    seed: int = 0,
    progress: bool = True,
    description: str = "evaluating",
) -> TokenLosses:
    """Losses of every token of ``blocks`` (items as :class:`~quietstar.data.blocks.TokenBlocks` gives).

    The model thinks at every position, whatever its ``think_at``; thoughts are the most likely
    ones, so the result does not depend on ``seed`` but for models that draw at random in
    evaluation. The model's mode and torch's generator are left as they were.

    Raises:
        UserError: if no token counts.
    """
    from transformers.utils.logging import tqdm

    rows = list(blocks)
    if not rows:
        raise UserError("there is no text to evaluate on")
    length = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), length - 1)
    base, mixed = np.zeros(shape), np.zeros(shape)
    counted = np.zeros(shape, dtype=bool)
    collate = PaddingCollator(0, padding_side)
    device = next(model.parameters()).device
    bar = tqdm(total=len(rows), desc=description, unit=" blocks", disable=not progress)
    with undisturbed(model, seed), bar:
        for first in range(0, len(rows), batch_size):
            batch = collate(rows[first : first + batch_size])
            n = batch["input_ids"].shape[1]
            place = (slice(first, first + batch_size), slice(0, n - 1))
            base[place], mixed[place], counted[place] = _batch_losses(
                model, {key: value.to(device) for key, value in batch.items()}
            )
            bar.update(len(batch["input_ids"]))
    if not counted.any():
        raise UserError(
            "the text to evaluate on has no token to predict (labels are all -100 or padding, or rows"
            " have one token)"
        )
    return TokenLosses(base, mixed, counted)


def _batch_losses(
    model: QuietStarForCausalLM, batch: dict[str, torch.Tensor]
) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    """Base and mixed losses of one batch, and which of them count, [B, n-1]."""
    rows, n = batch["input_ids"].shape
    # One part of the text, which may have nothing to predict.
    options: dict[str, Any] = {"batch_part": BatchShard()}
    if model.config.thought_kind != "none":
        options["anchors"] = torch.arange(n, device=batch["input_ids"].device).expand(rows, n)
    output = model(**{**batch, **options})
    base = output.base_losses.double().cpu().numpy()
    counted = output.is_target.cpu().numpy()
    if output.talk_losses is None:
        return base, base, counted
    # Talk step 0 at anchor i predicts token i + 1; the last anchor has nothing to predict.
    return base, output.talk_losses[0, :, 0, : n - 1].double().cpu().numpy(), counted


def estimate(values: Array, counted: npt.NDArray[np.bool_]) -> Estimate:
    """Mean of ``values`` [blocks, n] over the counted tokens, standard error over blocks.

    The error is that of a ratio of sums (blocks may count different numbers of tokens):
    ``sqrt(Σ_b (Σ_i v - mean · n_b)² · B / (B - 1)) / Σ n_b``.
    """
    sums = np.where(counted, values, 0.0).sum(axis=1)
    sizes = counted.sum(axis=1)
    sums, sizes = sums[sizes > 0], sizes[sizes > 0]
    total = sizes.sum()
    if total == 0:
        return Estimate(math.nan, None)
    mean = float(sums.sum() / total)
    blocks = len(sizes)
    if blocks < 2:
        return Estimate(mean, None)
    spread = ((sums - mean * sizes) ** 2).sum() * blocks / (blocks - 1)
    return Estimate(mean, float(math.sqrt(spread) / total))


def deciles(difficulty: Array, counted: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The decile (0 easiest to 9 hardest) of every token by ``difficulty``; -1 where not counted.

    Both [blocks, n]. Equally many tokens fall in each decile, ties in the order of the text.
    """
    result = np.full(difficulty.shape, -1, dtype=np.int64)
    order = np.argsort(difficulty[counted], kind="stable")
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order))
    result[counted] = ranks * 10 // max(len(order), 1)
    return result


def means(values: Mapping[str, Array], counted: npt.NDArray[np.bool_]) -> dict[str, dict[str, Any]]:
    """:func:`estimate` of each, by its name, as plain data."""
    return {name: estimate(value, counted).to_dict() for name, value in values.items()}


def by_decile(
    values: Mapping[str, Array], difficulty: Array, counted: npt.NDArray[np.bool_]
) -> list[dict[str, dict[str, Any]]]:
    """:func:`means` within each decile of difficulty, easiest first."""
    decile = deciles(difficulty, counted)
    return [means(values, decile == number) for number in range(10)]


def summarize(losses: TokenLosses) -> dict[str, Any]:
    """Means with standard errors, and means by decile of the base loss, as plain data."""
    base, mixed, counted = losses.base, losses.mixed, losses.counted
    values = {"base_nll": base, "mixed_nll": mixed, "gain": base - mixed}
    return {
        "tokens": int(counted.sum()),
        "blocks": len(base),
        **means(values, counted),
        "by_decile_of_base_nll": by_decile(values, base, counted),
    }
