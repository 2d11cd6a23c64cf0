"""The check before a model's first thoughts: what it rejects, what it lets pass, and what it leaves."""

import copy
import threading

import pytest
import torch
from families import FAMILIES, VOCABULARY, thinking_model, tiny_decoder
from torch import nn

from quietstar import QuietStarForCausalLM
from quietstar.thinking import self_check

IDS = torch.randint(3, VOCABULARY - 2, (2, 9), generator=torch.Generator().manual_seed(0))


def thinking(decoder, **fields) -> QuietStarForCausalLM:
    return thinking_model(decoder, **{"thought_length": 2, **fields})


class OwnPositions(nn.Module):
    """Rotary positions counted by the decoder, whatever ``position_ids`` say."""

    def __init__(self, rotary: nn.Module):
        super().__init__()
        self.rotary = rotary

    def forward(self, x, position_ids):
        return self.rotary(x, torch.arange(x.shape[1])[None])


def with_own_positions(**changes):
    decoder = tiny_decoder("llama", **changes)
    decoder.model.rotary_emb = OwnPositions(decoder.model.rotary_emb)
    return decoder


def with_input_ids_seen(**changes):
    decoder = tiny_decoder("llama", **changes)
    extra = torch.randn(VOCABULARY, 32)
    inner = decoder.model.forward

    def forward(input_ids=None, inputs_embeds=None, **kwargs):
        if input_ids is not None:
            inputs_embeds = decoder.get_input_embeddings()(input_ids)
            inputs_embeds = inputs_embeds + extra[input_ids].to(inputs_embeds.dtype)
        return inner(inputs_embeds=inputs_embeds, **kwargs)

    decoder.model.forward = forward
    return decoder


WRONG = {"own positions": with_own_positions, "per-token inputs": with_input_ids_seen}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_right_families_pass(family: str, dtype: torch.dtype):
    model = thinking(tiny_decoder(family).to(dtype)).eval()
    with torch.no_grad():
        model(IDS)
    assert model._checked == {"logits", "thoughts"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_decoder_is_refused_whatever_comes_first(wrong: str, dtype: torch.dtype):
    model = thinking(WRONG[wrong]().to(dtype))
    uses = {
        "forward": lambda: model.eval()(IDS),
        "loss": lambda: model.train()(IDS, labels=IDS),
        "generate": lambda: model.eval().generate(IDS, max_new_tokens=1),
    }
    for use in uses.values():
        with pytest.raises(ValueError, match=r"'llama' computes .* differently.*self_check=False"):
            use()


def test_it_can_be_turned_off_and_is_not_asked_for_without_thoughts(tmp_path):
    off = thinking(with_own_positions(), self_check=False).eval()
    assert off(IDS).logits.shape == (*IDS.shape, VOCABULARY)
    off.save_pretrained(tmp_path)
    assert QuietStarForCausalLM.from_pretrained(tmp_path).config.self_check is False
    plain = thinking(with_own_positions(), thought_kind="none").eval()
    plain(IDS)
    plain.config.thought_kind = "sampled"
    with pytest.raises(ValueError, match="differently"):
        plain(IDS)
    with pytest.raises(ValueError, match="self_check is 1; expected True or False"):
        thinking(tiny_decoder("llama"), self_check=1)


def test_it_runs_once(monkeypatch):
    calls = []
    check = self_check._check_columns
    monkeypatch.setattr(self_check, "_check_columns", lambda *given: calls.append(1) or check(*given))
    model = thinking(tiny_decoder("llama"))
    model(IDS, labels=IDS).loss.backward()
    model.eval().generate(IDS, max_new_tokens=2, do_sample=False)
    copy.deepcopy(model)(IDS)
    assert calls == [1]


def test_it_leaves_no_trace():
    decoder = tiny_decoder("llama", attention_dropout=0.0)
    decoder.model.layers[1].mlp.drop = nn.Dropout(0.5)
    model = thinking(decoder).train()
    decoder.model.layers[0].eval()  # a part that its owner keeps in this mode
    model.gradient_checkpointing_enable()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    self_check.check_decoder(decoder, torch.device("cpu"), logits=True, thoughts=True)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_works_under_autocast_and_with_few_tokens():
    with torch.autocast("cpu", torch.bfloat16):
        thinking(tiny_decoder("qwen3"))(IDS, labels=IDS)
        with pytest.raises(ValueError, match="differently"):
            thinking(with_own_positions())(IDS, labels=IDS)
    small = thinking(tiny_decoder("llama", vocab_size=5), start_token_id=3, end_token_id=4).eval()
    small(IDS % 3)


def test_tokens_with_a_meaning_are_avoided():
    decoder = tiny_decoder("llama")
    decoder.config.image_token_id = VOCABULARY // 3
    decoder.config.eos_token_id = [VOCABULARY // 3 + 1, 2]
    ids = self_check._ordinary_tokens(decoder, 6).tolist()
    assert len(set(ids)) == 6
    assert not {0, 1, 2, VOCABULARY // 3, VOCABULARY // 3 + 1} & set(ids)


def test_two_threads_may_be_the_first():
    model = thinking(tiny_decoder("llama")).eval()
    outputs = {}

    def run(name: int) -> None:
        with torch.no_grad():
            outputs[name] = model(IDS).logits

    threads = [threading.Thread(target=run, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(outputs[0], outputs[1])


def test_what_the_decoder_itself_raises_becomes_a_sentence():
    decoder = tiny_decoder("llama")
    inner = decoder.model.forward

    def forward(input_ids=None, **kwargs):
        return inner(input_ids=input_ids, **kwargs) if input_ids is not None else {}["patches"]

    decoder.model.forward = forward
    with pytest.raises(ValueError, match=r"'llama' cannot run with thoughts.*KeyError \('patches'\)"):
        thinking(decoder).eval()(IDS)
