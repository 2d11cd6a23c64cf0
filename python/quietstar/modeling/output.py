"""What one call of the model returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache
from transformers.utils import ModelOutput

from quietstar.modeling.text_cache import CACHE_NAME
from quietstar.thinking.batch_share import ThoughtOver


@dataclass
class QuietStarOutput(ModelOutput):
    """What one call returns; only ``loss``, its two parts and ``logits`` have gradients.

    Sizes: B rows, N tokens, A anchors per row, R rationales, K talk steps, T thought tokens.

    Attributes:
        loss: language_loss + thinking_loss (None without labels).
        logits: [B, kept, V], mixed; only without labels.
        language_loss: nll_weight * nll_loss; None without thoughts.
        thinking_loss: policy_weight * policy_loss - entropy_bonus * entropy; None without thoughts, and
            where neither has a weight.
        nll_loss: weighted cross entropy of the base and the mixed predictions.
        base_losses: [B, N-1].
        base_loss: their mean over tokens that count.
        talk_losses: [K, B, R, A], 0 where there is no target.
        talk_loss: [K], their means.
        reward: [B, R, A], 0 where no thought counts.
        advantage: [B, R, A], the same.
        policy_loss: mean over thought tokens of -(advantage · log-probability), unweighted.
        mixing_weight: [K, B, R, A].
        anchors: [B, A], the positions that thought.
        has_target: [K, B, A] bool, whether a talk step has a token that counts.
        thought_ids: [B, R, A, T].
        thought_logprobs: [B, R, A, T], if sampled in this call.
        is_target: [B, N-1] bool, which tokens count.
        rewarded: [B, A] bool, whether the thoughts there count
            (:class:`quietstar.thinking.text_batch.TextBatch`).
        thought_over: of a call that only thinks (``batch_part``), for the packed passes to come.
        past_key_values: the text's cache, if one is kept; ``cache`` is another name of it.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    language_loss: Tensor | None = None
    thinking_loss: Tensor | None = None
    nll_loss: Tensor | None = None
    base_losses: Tensor | None = None
    base_loss: Tensor | None = None
    talk_losses: Tensor | None = None
    talk_loss: Tensor | None = None
    reward: Tensor | None = None
    advantage: Tensor | None = None
    policy_loss: Tensor | None = None
    mixing_weight: Tensor | None = None
    anchors: Tensor | None = None
    has_target: Tensor | None = None
    thought_ids: Tensor | None = None
    thought_logprobs: Tensor | None = None
    is_target: Tensor | None = None
    rewarded: Tensor | None = None
    thought_over: ThoughtOver | None = None
    # The field that the installed transformers reads is the one that is stored.
    if CACHE_NAME == "cache":
        cache: Cache | None = None
    else:
        past_key_values: Cache | None = None

        @property
        def cache(self) -> Cache | None:
            return self.past_key_values
