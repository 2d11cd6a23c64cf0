"""Quiet-STaR's training step as published, written plainly: what the package is measured against.

One pass per depth over all positions at once, each with gradients and its own graph; the keys of all
depths are concatenated under a dense mask (causal blocks first, then one diagonal per depth); the batch
is repeated for each rationale; every depth computes the vocabulary product twice, for the thought's own
prediction and for the mixed one, and its cross entropy; thought tokens are drawn with a hard
Gumbel-softmax over the whole vocabulary. (Zelikman et al. 2024, arXiv 2403.09629, sections 4.2-4.4.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from quietstar import QuietStarForCausalLM
from quietstar.modeling.text_cache import cache_argument


def sequential_step(
    model: QuietStarForCausalLM, input_ids: Tensor, thought_ids: Tensor | None = None
) -> Tensor:
    """The loss of one training step, graph attached.

    Args:
        model: any model whose windows, if it has any, are longer than text and thought; its decoder runs
            in eager or sdpa attention, by depth.
        input_ids: [B, N] without padding; also the labels.
        thought_ids: [B, R, N, T] to use instead of sampling.
    """
    config, base = model.config, model.base
    rationales, length = config.num_rationales, input_ids.shape[1]
    t_thought, k_talk = config.thought_length, config.talk_length
    ids = input_ids.repeat_interleave(rationales, 0)
    embed, head = base.get_input_embeddings(), base.get_output_embeddings()
    start, end = model.thought_embedding(config.embedding_scale)
    positions = torch.arange(length, device=ids.device)[None]
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    diagonal = torch.eye(length, dtype=torch.bool, device=ids.device)
    cache = DynamicCache(config=base.config)
    blocked = torch.finfo(head.weight.dtype).min
    visible = causal
    banned = [config.start_token_id, config.end_token_id]

    embeds = embed(ids)
    base_hidden = base_loss = rows = None
    nll = torch.zeros((), device=ids.device)
    talk_losses: list[Tensor] = []
    actions: list[Tensor] = []
    for depth in range(config.num_slots + 1):
        mask = torch.zeros(visible.shape, dtype=head.weight.dtype, device=ids.device)
        mask = mask.masked_fill(~visible, blocked)[None, None]
        hidden = base.base_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions + depth,
            use_cache=True,
            **cache_argument(base.base_model, cache),
        ).last_hidden_state
        visible = torch.cat([visible, diagonal], 1)
        talk_step = depth - t_thought - 2
        if depth == 0:
            base_hidden = hidden
            logits = mixed_logits = head(hidden)
        else:
            assert base_hidden is not None
            shift = max(talk_step, 0)
            spoken = F.pad(base_hidden[:, shift:], (0, 0, 0, shift))
            weight = _mixing_weight(model, spoken, hidden)
            logits = head(hidden)
            mixed_logits = head((1 - weight) * spoken + weight * hidden)
        shift = max(talk_step, 0)
        targets = F.pad(ids[:, 1 + shift :], (0, 1 + shift), value=-100)
        losses = F.cross_entropy(
            mixed_logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
        ).view_as(targets)
        mean = losses.sum() / (targets != -100).sum()
        if depth == 0:
            base_loss = losses.detach()
            nll = nll + config.base_loss_weight * mean
        elif talk_step >= 0:
            nll = nll + (1 - config.base_loss_weight) / k_talk * mean
            talk_losses.append(losses.detach())
        if 1 <= depth <= t_thought:
            scores = logits.float().index_fill(2, torch.tensor(banned, device=ids.device), -1e10)
            if thought_ids is None:
                rows = F.gumbel_softmax(scores.detach(), hard=True, dim=-1)
                sampled = rows.argmax(-1)
            else:
                sampled = thought_ids.flatten(0, 1)[:, :, depth - 1]
                rows = F.one_hot(sampled, scores.shape[-1]).to(scores.dtype)
            logp = (scores / config.reinforce_temperature).log_softmax(-1)
            actions.append((logp * rows).sum(-1))
        # What is fed at the next depth.
        if depth == 0:
            embeds = start.expand_as(hidden)
        elif depth <= t_thought:
            assert rows is not None
            embeds = rows.to(embed.weight.dtype) @ embed.weight
        elif depth == t_thought + 1:
            embeds = end.expand_as(hidden)
        else:
            ahead = talk_step + 1
            embeds = embed(F.pad(ids[:, ahead:], (0, ahead)))
    assert base_loss is not None
    # As published, thoughts too near to the end for all their talk steps earn nothing and do not count.
    rewarded = length - 1 - (k_talk if config.policy_mean == "paper" else 0)
    base_loss = F.pad(base_loss, (0, k_talk))
    reward = sum(base_loss[:, k : k + rewarded] - talk_losses[k][:, :rewarded] for k in range(k_talk))
    assert isinstance(reward, Tensor)
    by_text = reward.view(-1, rationales, rewarded)
    if rationales > 1:
        by_text = by_text - by_text.mean(1, keepdim=True)
    advantage = by_text.clamp(min=0).flatten(0, 1)
    policy = torch.stack([-(advantage * logp[:, :rewarded]).mean() for logp in actions]).mean()
    return nll + config.policy_weight * policy


def _mixing_weight(model: QuietStarForCausalLM, base: Tensor, thought: Tensor) -> Tensor:
    head = model.mixing_head
    hidden = F.relu(head.fc1(torch.cat([base, thought], -1)))
    return head.fc3(F.relu(head.fc2(hidden)))
