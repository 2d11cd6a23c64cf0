"""Talk: mix each prediction with the one made after a thought, and compare both with the true text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quietstar.config import QuietStarConfig
from quietstar.thinking.batch_share import WHOLE, BatchPart
from quietstar.thinking.layout import TextRanges
from quietstar.thinking.linear_layers import call_linear, input_dtype, is_plain_linear
from quietstar.thinking.output_layer import IGNORE, Head
from quietstar.thinking.think import depth_of_end
from quietstar_ext import mixing_head


class MixingHead(nn.Module):
    """The network that decides how much a prediction listens to its thought.

    An MLP 2d -> d -> ReLU -> d -> ReLU -> 1 on [base ; thought]; the last layer has no bias and starts
    at zero, so that an untrained head leaves the base prediction as it is (with the identity
    activation).
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(2 * hidden_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.fc3 = nn.Linear(hidden_size, 1, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Torch's own initialisation, with the last layer at zero."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()
        nn.init.zeros_(self.fc3.weight)

    def forward(
        self,
        base: Tensor,
        thought: Tensor,
        activation: str,
        base_index: Tensor | None = None,
        floor: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """base [P, d], thought [rows, d], base_index [rows] -> mixed [rows, d], weight [rows, 1].

        With a floor f the head's weight w becomes f + (1 - f) w.
        """
        dtype = input_dtype(self.fc1)
        if dtype is not None and not torch.is_autocast_enabled(base.device.type):
            # An adapter's head is in fp32 on a decoder in bf16.
            base, thought = base.to(dtype), thought.to(dtype)
        if self._is_its_weights():
            mixed, weight = mixing_head(
                base,
                thought,
                self.fc1.weight,
                self.fc1.bias,
                self.fc2.weight,
                self.fc2.bias,
                self.fc3.weight,
                activation,
                base_index=base_index,
            )
        else:
            mixed, weight = self._called(base, thought, activation, base_index)
        if floor:
            # (1 - w') b + w' z, w' = f + (1 - f) w, is the mixture moved towards z by the share f.
            mixed, weight = mixed.lerp(thought.to(mixed.dtype), floor), floor + (1 - floor) * weight
        return mixed, weight

    def _is_its_weights(self) -> bool:
        if not all(map(is_plain_linear, self.children())):
            return False
        biases = [layer.bias is not None for layer in (self.fc1, self.fc2, self.fc3)]
        return biases == [True, True, False]

    def _called(
        self, base: Tensor, thought: Tensor, activation: str, base_index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same from the layers' own forwards, where one is more than its weight and bias."""
        if base_index is not None:
            base = base[base_index]
        hidden = call_linear(self.fc1, torch.cat([base, thought], dim=-1)).relu()
        weight = call_linear(self.fc3, call_linear(self.fc2, hidden).relu()).to(base.dtype)
        if activation == "sigmoid":
            weight = weight.sigmoid()
        return base.lerp(thought, weight), weight


@dataclass
class Talk:
    """Losses per token; entries without a target are zero.

    Attributes:
        nll: scalar, w·base + (1-w)/K · sum of the talk steps' means, with its gradient.
        base_losses: [B, N-1] fp32, no gradient (as all below).
        talk_losses: [K, B, A, R] fp32.
        base_loss: scalar mean; talk_loss: [K] means.
        mixing_weight: [K, B, A, R] fp32.
        targets: [K, B, A*R] int64, the true tokens, -100 where there is none.
        has_target: [K, B, A] bool.
    """

    nll: Tensor
    base_losses: Tensor
    talk_losses: Tensor
    base_loss: Tensor
    talk_loss: Tensor
    mixing_weight: Tensor
    targets: Tensor
    has_target: Tensor


def base_nll(
    head: Head, text_hidden: Tensor, labels: Tensor, weight: float, part: BatchPart = WHOLE
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the base prediction of every token.

    Args:
        text_hidden: [B, N, d]; labels: [B, N], -100 where a token does not count.
        weight: of the mean in the returned loss.

    Returns:
        weight times the mean over tokens that count, and the losses per token [B, N-1].
    """
    targets = labels[:, 1:]
    share = (targets != IGNORE).float()
    share = weight * share / part.mean_count("targets", share.sum()[None])
    loss, losses = head.cross_entropy_sum(
        text_hidden[:, :-1].flatten(0, 1),
        targets.flatten(),
        share.flatten(),
        skip_zero_weight=False,
    )
    return loss, losses.view_as(targets)


def target_labels(labels: Tensor, ranges: TextRanges) -> Tensor:
    """Labels [B, N] without those of which nothing can be predicted: padding, and every document's
    first token, which has no context."""
    return labels.masked_fill(ranges.stop - ranges.start <= 1, IGNORE)


def check_labels(labels: Tensor, ranges: TextRanges) -> Tensor:
    """:func:`target_labels`, of which there has to be one.

    Raises:
        ValueError: if nothing is left.
    """
    labels = target_labels(labels, ranges)
    if not bool((labels[:, 1:] != IGNORE).any()):
        raise ValueError("labels are all ignored (-100 or padding); expected at least one target")
    return labels


def talk_targets(labels: Tensor, anchors: Tensor, talk_length: int, ranges: TextRanges) -> Tensor:
    """The true token that talk step k of an anchor predicts: labels[anchor + 1 + k], [K, B, A].

    A thought that hangs from padding has nothing to say, and none speaks of the next document.
    """
    length = labels.shape[1]
    ahead = anchors[None] + 1 + torch.arange(talk_length, device=labels.device)[:, None, None]
    picked = labels.expand(talk_length, -1, -1).gather(2, ahead.clamp(max=length - 1))
    is_text = (ranges.start < ranges.stop).gather(1, anchors)
    return torch.where((ahead < length) & is_text & ~ranges.crosses(anchors, ahead), picked, IGNORE)


def count_targets(labels: Tensor, targets: Tensor) -> Tensor:
    """How many tokens each mean of the NLL is over, [1 + K]: the base prediction's, each talk step's.

    Args:
        labels: [B, N]; targets: [K, B, M] of :func:`talk_targets`.
    """
    return torch.cat([(labels[:, 1:] != IGNORE).sum()[None], (targets != IGNORE).sum((1, 2))])


def mix_talk_steps(
    config: QuietStarConfig,
    mixing: MixingHead,
    text_hidden: Tensor,
    slot_hidden: Tensor,
    anchors: Tensor,
    steps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mixed hidden states of the talk steps (all K of them, or the first ``steps``).

    Args:
        text_hidden: [B, N, d]; slot_hidden: [B, S, M, d]; anchors: [B, M] (with repeats).

    Returns:
        mixed [K, B, M, d] and weight [K, B, M].
    """
    batch, length, width = text_hidden.shape
    k = config.talk_length if steps is None else steps
    # Slot s has depth s + 1; talk step j reads the hidden state at depth T + 2 + j.
    first = depth_of_end(config) - 1
    thought = slot_hidden[:, first : first + k].transpose(0, 1)
    # A talk step speaks for the position that many tokens after its anchor.
    step = torch.arange(k, device=anchors.device)[:, None, None]
    speaks_for = (anchors[None] + step).clamp(max=length - 1)
    row = torch.arange(batch, device=anchors.device)[None, :, None] * length
    mixed, weight = mixing(
        text_hidden.flatten(0, 1),
        thought.flatten(0, 2),
        config.mixing_activation,
        (row + speaks_for).flatten(),
        config.mixing_floor,
    )
    shape = (k, batch, anchors.shape[1])
    return mixed.view(*shape, width), weight.view(shape)


def talk(
    config: QuietStarConfig,
    head: Head,
    mixing: MixingHead,
    text_hidden: Tensor,
    slot_hidden: Tensor,
    labels: Tensor,
    ranges: TextRanges,
    anchors: Tensor,
    rationales: int,
    part: BatchPart = WHOLE,
) -> Talk:
    """Mixed predictions of every talk step, their losses, and the base prediction's.

    Args:
        text_hidden: [B, N, d]; slot_hidden: [B, S, A*R, d].
        labels: [B, N], -100 where a token does not count.
        ranges: what each text token sees.
        anchors: [B, A], without the repeats for rationales.
        part: which part of a larger batch this is; the means in ``nll`` are over the larger one.
    """
    k = config.talk_length
    columns = anchors.repeat_interleave(rationales, dim=1)
    mixed, weight = mix_talk_steps(config, mixing, text_hidden, slot_hidden, columns)
    base_targets, targets = labels[:, 1:], talk_targets(labels, columns, k, ranges)
    counts = count_targets(labels, targets)
    divide_by = part.mean_count("targets", counts)
    base_share = (config.base_loss_weight / divide_by[0]).expand_as(base_targets)
    share = ((1 - config.base_loss_weight) / k / divide_by[1:])[:, None, None].expand_as(targets)
    counts = counts.clamp(min=1)
    # One call for both predictions: the gradient of the vocabulary matrix is held once.
    hidden = torch.cat([text_hidden[:, :-1].flatten(0, 1), mixed.flatten(0, 2)])
    every = torch.cat([base_targets.flatten(), targets.flatten()])
    row_weights = torch.cat([base_share.flatten(), share.flatten()])
    nll, losses = head.cross_entropy_sum(
        hidden,
        every,
        torch.where(every != IGNORE, row_weights, 0.0),
        # A weight of zero (base_loss_weight 0 or 1) must not hide the losses from the reward.
        skip_zero_weight=False,
    )
    base_losses = losses[: base_targets.numel()].view_as(base_targets)
    shape = (k, *anchors.shape, rationales)
    losses = losses[base_targets.numel() :].view(shape)
    return Talk(
        nll=nll,
        base_losses=base_losses,
        talk_losses=losses,
        base_loss=base_losses.sum() / counts[0],
        talk_loss=losses.sum((1, 2, 3)) / counts[1:],
        mixing_weight=weight.detach().float().view(shape),
        targets=targets,
        has_target=(targets != IGNORE).view(shape)[..., 0],
    )
