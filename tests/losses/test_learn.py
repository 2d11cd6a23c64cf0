"""Which thoughts count: the same rows give the same numbers wherever pads and other documents stand."""

from typing import Any

import pytest
import torch
from learn_cases import FIELDS, TALK, Row, build, lay, rows
from torch import Tensor

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.thinking.batch_share import BatchShard
from quietstar.thinking.layout import text_ranges
from quietstar.thinking.text_batch import TextBatch, target_labels
from quietstar.training.metrics import Average, describe

LAYOUTS: dict[str, Any] = {
    "alone": lambda made: [lay([[row]]) for row in made],
    "pads right": lambda made: [lay([[row]], after=3) for row in made],
    "pads left": lambda made: [lay([[row]], before=3) for row in made],
    "pads at both sides": lambda made: [lay([[row]], before=2, after=4) for row in made],
    "a batch, right": lambda made: [lay([[row] for row in made])],
    "a batch, left": lambda made: [lay([[row] for row in made], right=False)],
    "packed": lambda made: [lay([made])],
    "packed, two rows and pads": lambda made: [lay([made[:1], made[1:]], before=1, after=1)],
}


def run(model: QuietStarForCausalLM, batches: list[Row], counts: dict[str, Tensor]) -> dict[str, Any]:
    """Everything that must not depend on the layout; divides by the counts, or notes its own."""
    known = dict(counts)
    found: dict[str, Any] = {"losses": [], "rewards": [], "advantages": []}
    metrics = Average()
    parts = {"loss": 0.0, "policy": 0.0}

    def mean_count(name: str, own: Tensor) -> Tensor:
        counts.setdefault(name, torch.zeros_like(own))
        if not known:
            counts[name] = counts[name] + own
        return known.get(name, own)

    model.zero_grad()
    for batch in batches:
        output = model(**batch, batch_part=BatchShard(mean_count=mean_count))
        output.loss.backward()
        parts["loss"] += float(output.loss.detach())
        parts["policy"] += float(output.policy_loss.detach())
        found["losses"].append(output.base_losses[output.is_target])
        for name in ("reward", "advantage"):
            values = getattr(output, name).transpose(1, 2)
            assert values[~output.rewarded].abs().sum() == 0
            found[f"{name}s"].append(values[output.rewarded])
        metrics.add(describe(output))
    found = {name: torch.cat(values) for name, values in found.items()}
    means = metrics.pop(lambda tensor: tensor)
    del means["policy_loss"]
    if len(batches) > 1:
        # The hardest tokens are those of a batch.
        means = {n: m for n, m in means.items() if not n.endswith(("_hard", "_easy", "_top"))}
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {**found, "parts": parts, "metrics": means, "gradients": gradients}


@pytest.fixture(scope="module", params=FIELDS)
def expected(request) -> tuple[QuietStarForCausalLM, list[Row], dict[str, Tensor], dict[str, Any]]:
    fields = FIELDS[request.param]
    model, made = build(**fields), rows(fields.get("reward") == "information-gain")
    counts: dict[str, Tensor] = {}
    run(model, LAYOUTS["a batch, right"](made), counts)
    return model, made, counts, run(model, LAYOUTS["a batch, right"](made), counts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_is_worth_the_same_wherever_it_stands(expected: Any, layout: str):
    model, made, counts, truth = expected
    batches = LAYOUTS[layout](made)
    found = run(model, batches, dict(counts))
    for name in ("losses", "rewards", "advantages"):
        assert torch.allclose(found[name], truth[name], atol=2e-5), name
    assert len(found["losses"]) == int(counts["targets"][0])
    assert found["rewards"].numel() == int(counts["thoughts"])
    assert found["parts"] == pytest.approx(truth["parts"], rel=1e-5)
    for name, value in found["metrics"].items():
        assert value == pytest.approx(truth["metrics"][name], rel=1e-5, abs=1e-6), name
    for name, value in truth["gradients"].items():
        error = (found["gradients"][name] - value).abs().max() / value.abs().max().clamp(min=1e-9)
        assert error < 1e-5, name


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_padded_row_has_the_loss_of_the_bare_row(side: str):
    """Without being told of a larger batch: its own means."""
    model, made = build(entropy_bonus=0.2), rows(False)
    pads = {"left": (4, 0), "right": (0, 5), "both": (2, 3)}[side]
    for row in made[:2] + made[3:]:
        bare = model(
            row["input_ids"][None], labels=row["labels"][None], thought_ids=row["thought_ids"][None]
        )
        batch = lay([[row]], *pads)
        del batch["document_ids"]
        padded = model(**batch)
        for name in ("loss", "nll_loss", "policy_loss", "thinking_loss", "base_loss", "talk_loss"):
            assert torch.allclose(getattr(padded, name), getattr(bare, name), rtol=1e-5), name


def test_a_thought_counts_from_its_first_token_to_the_last_that_has_another():
    """Three labels are hidden: with three talk steps one anchor has none left."""
    ids = torch.arange(10, 20)[None]
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 0]])
    labels = ids.clone()
    labels[0, 3:6] = -100
    ranges = text_ranges(mask, ids)
    anchors = torch.arange(10)[None]
    labels = target_labels(labels, ranges)

    def counts(policy_mean: str) -> tuple[Tensor, Tensor]:
        config = QuietStarConfig(policy_mean=policy_mean, talk_length=TALK)
        batch = TextBatch(config, ids, ranges, labels=labels, anchors=anchors)
        return batch.rewarded, batch.averaged

    rewarded, averaged = counts("rewarded")
    # Anchor 2 speaks of the hidden tokens 3, 4 and 5; anchor 8 is the last token.
    assert rewarded[0].nonzero()[:, 0].tolist() == [1, 3, 4, 5, 6, 7]
    assert torch.equal(rewarded, averaged)
    rewarded, averaged = counts("paper")
    assert rewarded[0].nonzero()[:, 0].tolist() == [1, 3, 4, 5]
    assert averaged[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_papers_mean_counts_padding():
    model, made = build(), rows(False)
    ours, bare = (model(**lay([[made[1]]], after=pads)).policy_loss for pads in (5, 0))
    assert torch.allclose(ours, bare, rtol=1e-5)
    model.config.policy_mean = "paper"
    padded, bare = (model(**lay([[made[1]]], after=pads)) for pads in (5, 0))
    places = (13 + 5 - 1 - TALK, 13 - 1 - TALK)
    # Over more places, and of the same thoughts: those that pads follow earn something as well.
    earned = [float((o.advantage * o.rewarded[:, None]).sum()) for o in (padded, bare)]
    assert earned[0] > earned[1]
    assert padded.rewarded.sum() > bare.rewarded.sum()
    kept = slice(0, places[1])
    assert torch.allclose(padded.reward[..., kept], bare.reward[..., kept], atol=2e-5)
    assert bare.reward[..., places[1] :].abs().sum() == 0


def test_the_preset_and_the_default():
    assert QuietStarConfig().policy_mean == "rewarded"
    reference = QuietStarConfig.from_reference(n_ahead=4, n_ahead_talk=1, n_passes=2)
    assert reference.policy_mean == "paper"
    before = QuietStarConfig().to_dict()
    del before["policy_mean"]  # as version 0.1.0 saved it, which counted every thought
    assert QuietStarConfig.from_dict(before).policy_mean == "paper"
