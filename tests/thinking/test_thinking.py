"""What has to hold whatever the weights: rollout = packed pass, columns are independent, and so on."""

import pytest
import torch
from families import VOCABULARY, gradients, packed_pass, thinking_model

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.thinking.batch_share import BatchShard
from quietstar.thinking.layout import text_positions, text_ranges
from quietstar.thinking.text_batch import TextBatch
from quietstar.thinking.text_pass import run_decoder_plain

ROWS, LENGTH = 2, 12


def build(family: str = "llama", **fields) -> QuietStarForCausalLM:
    fields = {"thought_length": 3, "talk_length": 2, "num_rationales": 2, **fields}
    return thinking_model(family, seed=11, mixing=0.3, embeddings=0.003, **fields)


def text(padding: str = "none") -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(3, VOCABULARY - 2, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :3] = 0
    if padding == "right":
        mask[1, -2:] = 0
    return ids, mask


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_rollout_equals_packed_pass(family: str, padding: str):
    model = build(family)
    ids, mask = text(padding)
    ranges = text_ranges(mask, ids)
    batch = TextBatch(model.config, ids, ranges, rationales=2, shard=BatchShard(seed=5))
    found = model.thought_decoder.rollout(batch, model.config.num_slots)
    columns = found.anchors.repeat_interleave(2, 1)
    with torch.no_grad():
        base, slots = packed_pass(model, ids, ranges, columns, found.ids)
    real = mask.bool()
    keep = real.gather(1, columns)
    assert torch.allclose(base[real], found.text_hidden[real], atol=2e-5)
    for slot in range(model.config.num_slots):
        assert torch.allclose(slots[:, slot][keep], found.slot_hidden[:, slot][keep], atol=5e-5)


def test_sampled_logprobs_are_those_of_the_packed_pass():
    model = build(reinforce_temperature=1.0).train()
    ids, _ = text()
    torch.manual_seed(1)
    output = model(ids, labels=ids)
    assert output.thought_ids.shape == (ROWS, 2, LENGTH, 3)
    assert not torch.isin(output.thought_ids, torch.tensor([94, 95])).any()
    from quietstar.losses.policy import thought_logprobs

    columns = output.anchors.repeat_interleave(2, 1)
    chosen = output.thought_ids.transpose(1, 2).flatten(1, 2)
    with torch.no_grad():
        _, slots = packed_pass(model, ids, text_ranges(None, ids), columns, chosen)
        logp = thought_logprobs(model.thought_decoder, slots, chosen)
    sampled = output.thought_logprobs.transpose(1, 2).flatten(1, 2)
    assert torch.allclose(logp, sampled, atol=1e-4)


def test_same_torch_seed_same_thoughts():
    model = build().train()
    ids, _ = text()
    runs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        runs.append(model(ids, labels=ids).thought_ids)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_every_slot_and_place_draws_numbers_of_its_own():
    """Where all tokens are as likely, two that are drawn with the same numbers would be the same."""
    model = build().train()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    drawn = model(text()[0], labels=text()[0]).thought_ids
    for other in (drawn.roll(1, -1), drawn.roll(1, -2), drawn.roll(1, 1), drawn.roll(1, 0)):
        assert (drawn == other).float().mean() < 0.2


def forced(model: QuietStarForCausalLM, ids, mask, thoughts, **more):
    return model(ids, attention_mask=mask, labels=ids, thought_ids=thoughts, **more)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_rationales_equal_separate_runs(padding: str):
    model = build().train()
    ids, mask = text(padding)
    thoughts = torch.randint(3, 90, (ROWS, 3, LENGTH, 3))
    together = forced(model, ids, mask, thoughts)
    losses = []
    for r in range(3):
        alone = forced(model, ids, mask, thoughts[:, r : r + 1])
        losses.append(alone.nll_loss)
        assert torch.allclose(alone.talk_losses, together.talk_losses[:, :, r : r + 1], atol=1e-5)
        assert torch.allclose(alone.reward, together.reward[:, r : r + 1], atol=2e-5)
    assert torch.allclose(torch.stack(losses).mean(), together.nll_loss, atol=1e-5)


@pytest.mark.parametrize("rule", ["stride:3", "random:0.4", "entropy:0.4"])
def test_thinking_at_some_positions_equals_the_same_rows_of_all(rule: str):
    model = build().train()
    ids, mask = text("right")
    thoughts = torch.randint(3, 90, (ROWS, 2, LENGTH, 3))
    everywhere = forced(model, ids, mask, thoughts)
    model.config.think_at = rule
    some = forced(model, ids, mask, thoughts)
    count = some.anchors.shape[1]
    assert count == {"stride:3": 4, "random:0.4": 5, "entropy:0.4": 5}[rule]
    index = some.anchors[None, :, None].expand(2, -1, 2, -1)
    assert torch.allclose(some.talk_losses, everywhere.talk_losses.gather(3, index), atol=1e-5)
    assert torch.allclose(some.reward, everywhere.reward.gather(2, index[0]), atol=2e-5)
    again = forced(model, ids, mask, thoughts, anchors=some.anchors)
    assert torch.equal(again.talk_losses, some.talk_losses)


def test_entropy_rule_takes_the_most_uncertain_positions():
    model = build(think_at="entropy:0.25").eval()
    ids, _ = text()
    output = model(ids, labels=ids)
    with torch.no_grad():
        logp = model.base(ids).logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    for row in range(ROWS):
        expected = entropy[row].topk(3).indices.sort().values
        assert torch.equal(output.anchors[row], expected)


def test_a_changed_thought_changes_no_other_column():
    model = build().train()
    ids, mask = text()
    thoughts = torch.randint(3, 90, (ROWS, 2, LENGTH, 3))
    before = forced(model, ids, mask, thoughts)
    thoughts[1, 0, 4] = (thoughts[1, 0, 4] - 3 + 17) % 87 + 3
    after = forced(model, ids, mask, thoughts)
    changed = (before.talk_losses - after.talk_losses).abs().amax(0) > 1e-6
    assert changed.nonzero().tolist() == [[1, 0, 4]]
    assert torch.allclose(before.base_losses, after.base_losses, atol=1e-6)


def test_text_rows_do_not_notice_the_thoughts():
    model = build().train()
    ids, mask = text("left")
    ranges = text_ranges(mask, ids)
    with torch.no_grad():
        plain = run_decoder_plain(model.base, ids, mask, text_positions(*ranges[:2]))
        anchors = torch.arange(LENGTH).expand(ROWS, -1)
        thoughts = torch.randint(3, 90, (ROWS, LENGTH, 3))
        packed, _ = packed_pass(model, ids, ranges, anchors, thoughts)
    real = mask.bool()
    assert torch.allclose(plain[real], packed[real], atol=2e-5)


def test_gradient_checkpointing_changes_nothing():
    found = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids, mask = text()
        torch.manual_seed(2)
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_evaluation_is_deterministic_and_equals_the_packed_pass():
    model = build().eval()
    ids, mask = text("right")
    with torch.no_grad():
        first = model(ids, attention_mask=mask, labels=ids)
        second = model(ids, attention_mask=mask, labels=ids)
        packed = forced(model, ids, mask, first.thought_ids)
    assert first.thought_ids.shape[1] == 1
    assert torch.equal(first.thought_ids, second.thought_ids)
    assert torch.equal(first.talk_losses, second.talk_losses)
    assert torch.allclose(first.talk_losses, packed.talk_losses, atol=2e-5)


def test_logits_are_those_of_the_first_talk_step():
    model = build(talk_length=1).eval()
    ids, mask = text("left")
    with torch.no_grad():
        losses = model(ids, attention_mask=mask, labels=ids).talk_losses[0, :, 0]
        logits = model(ids, attention_mask=mask).logits
        last = model(ids, attention_mask=mask, logits_to_keep=2).logits
    logp = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    real = mask[:, :-1].bool() & mask[:, 1:].bool()
    assert torch.allclose(-logp[real], losses[:, :-1][real], atol=2e-5)
    assert torch.allclose(last, logits[:, -2:], atol=2e-5)


def test_logits_with_given_thoughts():
    model = build(talk_length=2).eval()
    ids, mask = text("left")
    with torch.no_grad():
        own = model(ids, attention_mask=mask)
        again = model(ids, attention_mask=mask, thought_ids=own.thought_ids)
        other = model(ids, attention_mask=mask, thought_ids=own.thought_ids.roll(1, 2))
    real = mask.bool()
    assert torch.allclose(own.logits[real], again.logits[real], atol=2e-5)
    assert (own.logits - other.logits)[real].abs().max() > 1e-3


def test_pause_and_none_are_controls():
    ids, mask = text()
    plain = build(thought_kind="none").train()
    output = plain(ids, attention_mask=mask, labels=ids)
    own = plain.base(ids, attention_mask=mask, labels=ids).loss
    assert torch.allclose(output.loss, own, atol=1e-5)
    output.loss.backward()
    assert plain.thought_embedding.start.grad is None
    pause = build(thought_kind="pause").train()
    output = pause(ids, attention_mask=mask, labels=ids)
    assert output.thought_ids is None and output.policy_loss is None
    output.loss.backward()
    assert pause.thought_embedding.start.grad.abs().max() > 0


def test_loss_moves_as_the_policy_asks():
    """A step along the gradient makes rewarded thoughts more likely."""
    model = build(policy_weight=100.0, base_loss_weight=1.0, talk_length=1).train()
    ids, mask = text()
    thoughts = torch.randint(3, 90, (ROWS, 2, LENGTH, 3))
    before = forced(model, ids, mask, thoughts)
    assert (before.advantage > 0).any()
    before.loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-6 * parameter.grad
    after = forced(model, ids, mask, thoughts)
    assert after.loss < before.loss


def test_fields_can_change_between_steps():
    model = build().train()
    ids, mask = text()
    model.config.thought_length, model.config.talk_length = 2, 3
    model.config.num_rationales, model.config.think_at = 3, "stride:2"
    output = model(ids, attention_mask=mask, labels=ids)
    assert output.thought_ids.shape == (ROWS, 3, 6, 2)
    assert output.talk_losses.shape == (3, ROWS, 3, 6)
    assert model.config.num_slots == 2 + 2 + 2


def test_reference_counting():
    config = QuietStarConfig.from_reference(n_ahead=12, n_ahead_talk=4, n_passes=2)
    assert (config.thought_length, config.talk_length, config.num_rationales) == (9, 4, 2)
    assert (config.policy_weight, config.reinforce_temperature) == (1e6, 3.0)
    assert config.num_slots == 12 + 4 - 2  # depths 1 .. n_ahead + n_ahead_talk - 2


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_low_precision(how: str):
    """bf16, as a whole model or by autocast, trains and stays near fp32."""
    ids, mask = text("right")
    thoughts = torch.randint(3, 90, (ROWS, 2, LENGTH, 3))
    exact = forced(build().train(), ids, mask, thoughts)
    model = build().train()
    if how == "bfloat16":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        output = forced(model, ids, mask, thoughts)
        sampled = model(ids, attention_mask=mask, labels=ids)
    assert abs(output.nll_loss - exact.nll_loss) / exact.nll_loss < 0.03
    (output.loss + sampled.loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.dtype == parameter.dtype


def test_left_padding_is_like_no_padding():
    """The same text with pads before it: same losses, and no loss for what only pads precede."""
    model = build(talk_length=2).train()
    ids, mask = text("left")
    thoughts = torch.randint(3, 90, (ROWS, 2, LENGTH, 3))
    padded = forced(model, ids, mask, thoughts)
    alone = model(ids[:1, 3:], labels=ids[:1, 3:], thought_ids=thoughts[:1, :, 3:])
    assert padded.base_losses[0, :3].abs().max() == 0
    assert torch.allclose(padded.base_losses[:1, 3:], alone.base_losses, atol=1e-5)
    assert torch.allclose(padded.talk_losses[:, :1, :, 3:], alone.talk_losses, atol=1e-5)
    assert torch.allclose(padded.reward[:1, :, 3:], alone.reward, atol=2e-5)
    assert padded.talk_losses[:, 0, :, :3].abs().max() == 0 == padded.reward[0, :, :3].abs().max()
