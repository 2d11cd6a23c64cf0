"""Rewards, advantages, entropy bonus and mixing floor, against values computed by hand."""

import itertools
import math

import pytest
import seeds
import torch
import torch.nn.functional as F
from families import VOCABULARY, packed_pass, thinking_model, tiny_decoder
from watch import Watch

from quietstar import QuietStarConfig, QuietStarForCausalLM
from quietstar.losses.policy import total_loss
from quietstar.losses.rewards import advantage_of
from quietstar.thinking.layout import text_ranges
from quietstar_ext.linear_entropy import linear_entropy_sum

ROWS, LENGTH, THOUGHT, TALK, RATIONALES = 2, 11, 3, 2, 3
BANNED = (94, 95)


def build(**fields) -> QuietStarForCausalLM:
    settings = {"thought_length": THOUGHT, "talk_length": TALK, "num_rationales": RATIONALES, **fields}
    return thinking_model(mixing=0.3, embeddings=0.003, **settings).train()


def batch() -> dict[str, torch.Tensor]:
    seeds.reseed()  # building the model has set it
    ids = torch.randint(3, 90, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    mask[1, -1:] = 0
    thoughts = torch.randint(3, 90, (ROWS, RATIONALES, LENGTH, THOUGHT))
    return {"input_ids": ids, "attention_mask": mask, "labels": ids, "thought_ids": thoughts}


def hidden_states(model, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Text [B, N, d] and slots [B, S, N, R, d] of the packed pass, with gradients."""
    ids = inputs["input_ids"]
    anchors = torch.arange(LENGTH).repeat_interleave(RATIONALES).expand(ROWS, -1)
    ranges = text_ranges(inputs["attention_mask"], ids)
    thoughts = inputs["thought_ids"].transpose(1, 2).flatten(1, 2)
    text, slots = packed_pass(model, ids, ranges, anchors, thoughts)
    return text, slots.unflatten(2, (LENGTH, RATIONALES))


def rewards_by_hand(model, inputs, without: torch.Tensor | None) -> torch.Tensor:
    """Σ_k (loss without a thought - loss of the thought's own prediction), [B, R, N], in loops.

    ``without`` [B, N-1]: the losses without a thought; None: of the model's base prediction.
    """
    ids, mask, weight = inputs["input_ids"], inputs["attention_mask"], model.base.lm_head.weight
    with torch.no_grad():
        text, slots = hidden_states(model, inputs)
    expected = torch.zeros(ROWS, RATIONALES, LENGTH)
    for row in range(ROWS):
        for anchor in range(LENGTH - 1):
            for k in range(TALK):
                spoken = anchor + k
                if spoken + 1 == LENGTH or not mask[row, anchor] or not mask[row, spoken + 1]:
                    continue
                target = ids[row, spoken + 1]
                base = F.cross_entropy(text[row, spoken] @ weight.T, target)
                if without is not None:
                    base = without[row, spoken]
                for r in range(RATIONALES):
                    own = slots[row, THOUGHT + 1 + k, anchor, r]
                    expected[row, r, anchor] += base - F.cross_entropy(own @ weight.T, target)
    return expected


@pytest.mark.parametrize("reward", ["base-gain", "information-gain"])
def test_rewards_of_the_thoughts_own_prediction(reward: str):
    model, inputs = build(reward=reward), batch()
    without = None
    if reward == "information-gain":
        without = torch.rand(ROWS, LENGTH - 1) * 4
        inputs["baseline_losses"] = without
    output = model(**inputs)
    expected = rewards_by_hand(model, inputs, without)
    assert expected.abs().max() > 1
    assert torch.allclose(output.reward, expected, atol=1e-4)
    centred = expected - expected.mean(1, keepdim=True)
    assert torch.allclose(output.advantage, centred.clamp(min=0), atol=1e-4)


def test_probability_gain():
    """The probability of all the talk steps' tokens that count, with the thought less without."""
    model, inputs = build(reward="probability-gain"), batch()
    output = model(**inputs)
    expected = torch.zeros(ROWS, RATIONALES, LENGTH)
    rewarded = 0
    for row, r, anchor in itertools.product(range(ROWS), range(RATIONALES), range(LENGTH)):
        steps = [k for k in range(TALK) if anchor + k < LENGTH - 1 and output.has_target[k, row, anchor]]
        if not steps:
            continue
        rewarded += 1
        without = math.prod(math.exp(-output.base_losses[row, anchor + k]) for k in steps)
        with_thought = math.prod(math.exp(-output.talk_losses[k, row, r, anchor]) for k in steps)
        expected[row, r, anchor] = with_thought - without
    assert rewarded > ROWS * RATIONALES
    assert expected.abs().max() > 1e-3
    assert torch.allclose(output.reward, expected, atol=1e-6)


def test_mixture_gain_is_the_default_and_another_number():
    model, inputs = build(), batch()
    assert model.config.reward == "mixture-gain"
    output = model(**inputs)
    expected = torch.zeros(ROWS, RATIONALES, LENGTH)
    for k in range(TALK):
        predicted = LENGTH - 1 - k
        talk = output.talk_losses[k, :, :, :predicted]
        counts = output.has_target[k, :, :predicted, None].transpose(1, 2)
        expected[..., :predicted] += (output.base_losses[:, None, k:] - talk) * counts
    assert torch.allclose(output.reward, expected, atol=1e-5)
    assert (output.reward - rewards_by_hand(model, inputs, None)).abs().max() > 0.1


def test_information_gain_needs_its_baseline_while_it_learns():
    model, inputs = build(reward="information-gain"), batch()
    with pytest.raises(ValueError, match="baseline_losses is missing; the reward 'information-gain'"):
        model(**inputs)
    with pytest.raises(ValueError, match=r"baseline_losses has shape \[2, 11\]; expected \[2, 10\]"):
        model(**inputs, baseline_losses=torch.zeros(ROWS, LENGTH))
    with torch.no_grad():
        own = model.eval()(**inputs)
    assert torch.allclose(own.reward, rewards_by_hand(model, inputs, None), atol=1e-4)
    model.config.reward = "base-gain"
    with pytest.raises(ValueError, match="baseline_losses cannot be combined with reward 'base-gain'"):
        model(**inputs, baseline_losses=torch.zeros(ROWS, LENGTH - 1))


# Three thoughts with rewards 1, 2, 6: mean 3, standard deviation sqrt((4 + 1 + 9) / 3) = sqrt(14 / 3).
SPREAD = math.sqrt(14 / 3) + 1e-4


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ("mean", [-2.0, -1.0, 3.0]),
        ("leave-one-out", [-3.0, -1.5, 4.5]),
        ("normalized", [-2 / SPREAD, -1 / SPREAD, 3 / SPREAD]),
    ],
)
def test_advantages(advantage: str, expected: list[float]):
    rewards = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    for clamp in (False, True):
        config = QuietStarConfig(advantage=advantage, clamp_advantage=clamp, num_rationales=3)
        found = advantage_of(config, rewards)
        wanted = torch.tensor([expected, [0.0, 0.0, 0.0]])
        assert torch.allclose(found, wanted.clamp(min=0) if clamp else wanted)
        alone = advantage_of(config, torch.tensor([[-2.0], [3.0]]))
        assert alone.tolist() == [[0.0 if clamp else -2.0], [3.0]]


def test_without_the_clamp_bad_thoughts_become_less_likely():
    """The policy term by hand: mean over thoughts and tokens of -(A · log p), negative A included."""
    model, inputs = build(clamp_advantage=False, reinforce_temperature=2.0), batch()
    output = model(**inputs)
    assert (output.advantage < 0).any()
    with torch.no_grad():
        _, slots = hidden_states(model, inputs)
        logits = slots[:, :THOUGHT] @ model.base.lm_head.weight.T / 2.0
        logits[..., BANNED] = -torch.inf
        chosen = inputs["thought_ids"].permute(0, 3, 2, 1)
        logp = logits.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]
    advantage = output.advantage.transpose(1, 2)[:, None]
    # The texts of 9 and 10 tokens have 8 and 9 positions with a token to predict.
    count = (8 + 9) * RATIONALES * THOUGHT
    expected = -(advantage * logp).sum() / count
    assert torch.allclose(output.policy_loss, expected, rtol=1e-4)


def test_entropy_bonus():
    """loss = NLL + β·policy - c·H, H the mean entropy of the thought tokens of real positions."""
    model, inputs = build(entropy_bonus=0.7, policy_weight=2.0, thought_temperature=1.5), batch()
    output = model(**inputs)
    text, slots = hidden_states(model, inputs)
    logits = slots[:, :THOUGHT] @ model.base.lm_head.weight.T / 1.5
    logp = logits.index_fill(-1, torch.tensor(BANNED), -1e30).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)  # [B, T, N, R]
    mask = inputs["attention_mask"].bool()
    counts = mask & F.pad(mask, (0, 1))[:, 1:]  # all text but the last token, which predicts nothing
    mean = (entropy * counts[:, None, :, None]).sum() / (counts.sum() * RATIONALES * THOUGHT)
    thinking = 2.0 * output.policy_loss - 0.7 * mean
    assert torch.allclose(output.thinking_loss, thinking, rtol=1e-5)
    assert torch.allclose(output.loss, output.nll_loss + thinking, rtol=1e-5)
    own = torch.autograd.grad(output.thinking_loss, model.base.lm_head.weight, retain_graph=True)[0]
    bonus = torch.autograd.grad(-0.7 * mean, model.base.lm_head.weight)[0]
    model.config.entropy_bonus = 0.0
    rest = model(**inputs).thinking_loss
    rest = torch.autograd.grad(rest, model.base.lm_head.weight)[0]
    assert (own - rest - bonus).abs().max() < 1e-4 * own.abs().max() + 1e-6


def entropy_by_hand(hidden, weight, row_weights, temperature, banned, softcap, scale):
    logits = hidden @ weight.T * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    keep = torch.ones(weight.shape[0], dtype=torch.bool).index_fill(0, banned, False)
    logp = logits[:, keep].log_softmax(-1)
    return (row_weights * -(logp.exp() * logp).sum(-1)).sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(1, 5, 3), (300, 97, 17), (7, 1000, 8)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_linear_entropy(dtype, rows: int, vocabulary: int, width: int, softcap):
    exact = torch.float64
    hidden = torch.randn(rows, width, dtype=exact).to(dtype)
    weight = torch.randn(vocabulary, width, dtype=exact).to(dtype)
    row_weights = torch.rand(rows) * (torch.rand(rows) > 0.3) + (torch.arange(rows) == 0)
    banned = torch.tensor([1, vocabulary - 1])
    options = (1.7, banned, softcap, 0.8)
    results = {}
    for name, run, kind in (
        ("ours", None, dtype),
        ("theirs", entropy_by_hand, dtype),
        ("truth", entropy_by_hand, exact),
    ):
        h = hidden.detach().to(kind, copy=True).requires_grad_()
        w = weight.detach().to(kind, copy=True).requires_grad_()
        if run is None:
            total = linear_entropy_sum(
                h, w, row_weights, temperature=1.7, banned=banned, softcap=softcap, logit_scale=0.8
            )
        else:
            total = run(h, w, row_weights.to(kind), *options)
        (2.5 * total).backward()
        results[name] = [total.detach(), h.grad, w.grad]
    for ours, theirs, truth in zip(*results.values(), strict=True):
        size = truth.abs().max()
        allowed = 2 * (theirs - truth).abs().max() + (1e-10 if dtype == exact else 1e-5) * size
        assert (ours - truth).abs().max() <= allowed + 4 * torch.finfo(dtype).eps * size
    assert results["ours"][1][row_weights == 0].abs().sum() == 0


def test_linear_entropy_skips_what_has_no_weight():
    hidden = torch.full((4, 3), torch.nan)
    hidden[2] = 1.0
    weight = torch.randn(9, 3, requires_grad=True)
    weights = torch.tensor([0.0, 0.0, 1.0, 0.0])
    total = linear_entropy_sum(hidden.requires_grad_(), weight, weights)
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(weight.grad).all()
    assert torch.isfinite(hidden.grad).all()
    empty = linear_entropy_sum(hidden[:0], weight, weights[:0])
    assert empty == 0
    assert linear_entropy_sum(hidden.detach(), weight.detach(), weights).requires_grad is False


def test_the_entropy_never_holds_rows_x_vocabulary(monkeypatch):
    monkeypatch.setattr("quietstar_ext.linear_entropy.WORKSPACE_BYTES", 1 << 20)
    rows, vocabulary = 1024, 4096
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    with Watch() as watch:
        linear_entropy_sum(hidden, weight, torch.ones(rows)).backward()
    size, where = watch.largest
    assert size <= max(vocabulary * 8, (1 << 20) / 4), where
    assert size < rows * vocabulary / 50


def test_a_step_with_everything_holds_nothing_of_size_rows_x_vocabulary(monkeypatch):
    monkeypatch.setattr("quietstar_ext.linear_entropy.WORKSPACE_BYTES", 1 << 20)
    vocabulary, length = 4096, 64
    fields = {"reward": "information-gain", "advantage": "normalized", "clamp_advantage": False}
    fields |= {"start_token_id": 4094, "end_token_id": 4095, "thought_length": 4, "talk_length": 2}
    decoder = tiny_decoder("llama", vocab_size=vocabulary)
    model = thinking_model(decoder, entropy_bonus=0.1, **fields).train()
    ids = torch.randint(0, 4000, (2, length))
    with Watch() as watch:
        output = model(ids, labels=ids, baseline_losses=torch.rand(2, length - 1))
        output.loss.backward()
    size, where = watch.largest
    talk_rows = 2 * (length - 1 + 2 * 2 * length)
    assert size < talk_rows * vocabulary / 8, where
    assert "quietstar.linear_cross_entropy_forward" in watch.called
    assert output.advantage.min() < 0


@pytest.mark.parametrize("floor", [0.25, 1.0])
def test_mixing_floor(floor: float):
    """w = f + (1 - f) sigmoid(x), and the mixed state is (1 - w) b + w z."""
    model = build(mixing_activation="sigmoid", mixing_floor=floor)
    head = model.mixing_head
    width = model.config.text_config.hidden_size
    base, thought = torch.randn(2, 5, width, requires_grad=True)
    mixed, weight = head(base, thought, "sigmoid", floor=floor)
    x = F.relu(head.fc1(torch.cat([base, thought], 1)))
    x = head.fc3(F.relu(head.fc2(x)))
    expected = floor + (1 - floor) * torch.sigmoid(x)
    assert torch.allclose(weight, expected, atol=1e-6)
    assert torch.allclose(mixed, (1 - expected) * base + expected * thought, atol=1e-5)
    inputs = batch()
    output = model(**inputs)
    assert output.mixing_weight.min() >= floor
    if floor == 1:
        # The thought's prediction stands alone, and the mixture's gain is the base gain.
        assert torch.allclose(output.reward, rewards_by_hand(model, inputs, None), atol=1e-4)
        model.eval()
        ids = inputs["input_ids"]
        output = model(ids)
        first, thoughts = output.logits[:, -1], output.thought_ids
        anchors = torch.arange(LENGTH).expand(ROWS, -1)
        with torch.no_grad():
            _, slots = packed_pass(model, ids, text_ranges(None, ids), anchors, thoughts[:, 0])
        own = slots[:, THOUGHT + 1, -1] @ model.base.lm_head.weight.T
        assert torch.allclose(first, own, atol=1e-4)


def test_the_floor_holds_in_generation():
    model = build(mixing_activation="sigmoid", mixing_floor=0.4).eval()
    model.generate(torch.randint(3, 90, (1, 6)), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert len(model.thoughts) == 3
    assert all(spoken.mixing_weight >= 0.4 for spoken in model.thoughts)


def test_weights_of_the_terms():
    config = QuietStarConfig(nll_weight=0.0, policy_weight=3.0, entropy_bonus=0.5)
    nll, policy, entropy = torch.tensor(7.0), torch.tensor(2.0), torch.tensor(4.0)
    total = total_loss(config, nll, policy, entropy)
    assert (total.loss, total.language_loss, total.thinking_loss) == (4.0, 0.0, 4.0)
    config.nll_weight, config.policy_weight, config.entropy_bonus = 1.0, 0.0, 0.0
    total = total_loss(config, nll, policy, None)
    assert total.loss is nll and total.thinking_loss is None


def test_nothing_but_reinforce():
    """RLP's loss has no language-model term: the gradient is the policy's alone."""
    lines = {"advantage": "leave-one-out", "clamp_advantage": False, "mixing_activation": "sigmoid"}
    model, inputs = build(nll_weight=0.0, policy_weight=1.0, mixing_floor=1.0, **lines), batch()
    output = model(**inputs)
    assert torch.allclose(output.loss, output.policy_loss)
    (policy,) = torch.autograd.grad(output.thinking_loss, model.base.lm_head.weight, retain_graph=True)
    output.loss.backward()
    assert torch.equal(model.base.lm_head.weight.grad, policy)
    assert model.mixing_head.fc1.weight.grad.abs().max() == 0


def test_the_settings_are_saved_with_the_model(tmp_path):
    fields = {"reward": "base-gain", "advantage": "normalized", "clamp_advantage": False}
    fields |= {"entropy_bonus": 0.01, "mixing_activation": "sigmoid", "mixing_floor": 0.1}
    build(**fields).save_pretrained(tmp_path)
    again = QuietStarForCausalLM.from_pretrained(tmp_path).config
    assert {key: getattr(again, key) for key in fields} == fields
    assert again.text_config.vocab_size == VOCABULARY
