"""The package against recorded runs of the reference implementation (github ezelikman/quiet-star).

Every folder under QUIETSTAR_GOLDEN (default: tests/data/golden) is one run on a tiny random model: its
weights, its input, the thoughts that it sampled, and everything that it computed from them.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import packed_pass
from safetensors.torch import load_file
from torch import Tensor

import quietstar
from quietstar.checkpoints.upstream import reference_names
from quietstar.losses.policy import thought_logprobs
from quietstar.thinking.layout import text_ranges

FOLDER = Path(os.environ.get("QUIETSTAR_GOLDEN", Path(__file__).parents[1] / "data" / "golden"))
CASES = sorted(path.parent.name for path in FOLDER.glob("*/meta.json"))
TOLERANCE = 1e-4


def assert_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Equal to 1e-4 of the tensor's largest entry."""
    assert ours.shape == theirs.shape, f"{what}: shape {list(ours.shape)}, not {list(theirs.shape)}"
    largest = theirs.abs().max().clamp(min=1e-30)
    error = ((ours - theirs).abs().max() / largest).item()
    assert error < TOLERANCE, f"{what}: differs by {error:.2e} of its largest entry"


@dataclass
class Case:
    meta: dict
    data: dict[str, Tensor]
    model: quietstar.QuietStarForCausalLM
    thought_ids: Tensor
    labels: Tensor
    rationales: int
    first_talk: int  # entry of the reference's lists with the first talk step

    def run(self, policy_weight: float) -> quietstar.QuietStarOutput:
        self.model.config.policy_weight = policy_weight
        self.model.zero_grad()
        output = self.model(
            self.data["input_ids"],
            attention_mask=self.data["attention_mask"],
            labels=self.labels,
            thought_ids=self.thought_ids,
        )
        output.loss.backward()
        return output

    def rows(self, tensor: Tensor) -> Tensor:
        """[B, R, ...] -> [B*R, ...], the reference's repeated batch."""
        return tensor.flatten(0, 1)


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    folder = FOLDER / request.param
    meta = json.loads((folder / "meta.json").read_text())
    data = load_file(folder / "golden.safetensors")
    state = {name[6:]: value for name, value in data.items() if name.startswith("param/")}
    names = ("n_ahead", "n_ahead_talk", "n_passes", "start_token_id", "end_token_id")
    fields = {name: meta[name] for name in names}
    model = quietstar.load_reference(state, meta["config"], **fields)
    model.train()
    length = model.config.thought_length
    rationales = meta["n_passes"]
    # tokens[t] is what is fed at depth t + 1: start, the T sampled tokens, end, ...
    sampled = data["tokens"][1 : 1 + length]
    ids = sampled.unflatten(1, (-1, rationales)).permute(1, 2, 3, 0).contiguous()
    labels = data["labels"].clone()
    labels[data["attention_mask"] == 0] = -100
    return Case(meta, data, model, ids, labels, rationales, length + 2)


def test_there_are_cases():
    assert CASES, f"no golden cases under {FOLDER}"


def test_losses_rewards_and_weights(case: Case):
    output = case.run(case.meta["policy_loss_beta"])
    base = output.base_losses.repeat_interleave(case.rationales, 0)
    assert_close(base, case.data["loss_list/0"], "base losses")
    n = base.shape[1] + 1
    k_steps = case.model.config.talk_length
    for k in range(k_steps):
        theirs = case.data[f"loss_list/{case.first_talk + k}"]
        ours = case.rows(output.talk_losses[k])[:, : n - 1 - k]
        assert_close(ours, theirs, f"talk losses of step {k}")
        weight = case.data[f"talk_weight/{case.first_talk + k}"]
        # What padding does in between is nobody's business: no loss sees it.
        text = case.data["attention_mask"].bool().repeat_interleave(case.rationales, 0)
        speaks = text[:, : n - k] & text[:, k:]
        ours = case.rows(output.mixing_weight[k])[:, : n - k]
        assert_close(ours[speaks], weight[:, : n - k][speaks], f"mixing weight {k}")
    rewarded = n - 1 - k_steps
    reward = case.rows(output.reward)
    assert_close(reward[:, :rewarded], reward_of(case), "reward")
    assert reward[:, rewarded:].abs().max() == 0
    advantage = case.rows(output.advantage)[:, :rewarded]
    assert_close(advantage, case.data["fixed_reward"].clamp(min=0), "advantage")
    assert_close(output.nll_loss, case.data["nll_loss"], "NLL")
    assert_close(output.loss.detach(), case.data["loss"], "loss")
    assert_close(output.policy_loss, case.data["dqn_loss_list"].mean(), "policy loss")


def reward_of(case: Case) -> Tensor:
    """The reward before the baseline, from the reference's own losses."""
    base = case.data["loss_list/0"]
    k_steps = case.model.config.talk_length
    n = base.shape[1] + 1
    total = torch.zeros(base.shape[0], n - 1 - k_steps)
    for k in range(k_steps):
        step = case.data[f"loss_list/{case.first_talk + k}"]
        total += base[:, k : k + total.shape[1]] - step[:, : total.shape[1]]
    assert_close(total, case.data["policy_reward"], "the reference's own reward")
    return total


def test_action_logprobs(case: Case):
    config, data = case.model.config, case.data
    ranges = text_ranges(data["attention_mask"], data["input_ids"])
    n = data["input_ids"].shape[1]
    anchors = torch.arange(n).repeat_interleave(case.rationales).expand(len(data["input_ids"]), -1)
    ids = case.thought_ids.transpose(1, 2).flatten(1, 2)
    with torch.no_grad():
        text, slots = packed_pass(case.model, data["input_ids"], ranges, anchors, ids)
        logp = thought_logprobs(case.model.thought_decoder, slots, ids)
    by_row = logp.unflatten(1, (n, case.rationales)).transpose(1, 2).flatten(0, 1)
    real = data["attention_mask"].bool().repeat_interleave(case.rationales, 0)
    for t in range(1, config.thought_length + 1):
        theirs = data[f"action_ll/{t}"]
        keep = real[:, : theirs.shape[1]]
        ours = by_row[:, : theirs.shape[1], t - 1]
        assert_close(ours[keep], theirs[keep], f"log-probability of token {t}")
    hidden = text.repeat_interleave(case.rationales, 0)
    assert_close(hidden[real], data["hidden/0"][real], "hidden states of the text")
    for depth in range(1, config.num_slots + 1):
        ours = slots[:, depth - 1].unflatten(1, (n, case.rationales)).transpose(1, 2).flatten(0, 1)
        theirs = data[f"hidden/{depth}"]
        keep = real.clone()
        # Past the end of the text the reference feeds something else; no loss sees it.
        ahead = max(0, depth - config.thought_length - 2)
        keep[:, n - ahead :] = False
        assert_close(ours[keep], theirs[keep], f"hidden states of depth {depth}")


@pytest.mark.parametrize("policy", [True, False], ids=["with-policy", "nll-only"])
def test_every_gradient(case: Case, policy: bool):
    case.run(case.meta["policy_loss_beta"] if policy else 0.0)
    prefix = "grad/" if policy else "grad_nll/"
    theirs = {n.removeprefix(prefix): g for n, g in case.data.items() if n.startswith(prefix)}
    ours = dict(case.model.named_parameters())
    renamed = reference_names(list(theirs))
    assert set(renamed.values()) | {"thought_embedding.start", "thought_embedding.end"} == set(ours)
    for name, gradient in theirs.items():
        if name in ("start_embedding", "end_embedding"):
            parameter = ours[f"thought_embedding.{name.removesuffix('_embedding')}"]
            assert gradient[1].abs().max() == 0
            gradient = gradient[0]
        else:
            parameter = ours[renamed[name]]
        assert parameter.grad is not None, f"{name} has no gradient"
        assert_close(parameter.grad, gradient, f"gradient of {name}")
