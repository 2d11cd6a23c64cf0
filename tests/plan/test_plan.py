"""The memory and FLOP model of a step against measured peaks and counted operations."""

import contextlib
import dataclasses
import gc
import random
from typing import Any

import pytest
import torch
from families import HYBRIDS, thinking_model
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from quietstar.cli import app as cli
from quietstar.cli.plan import parse_bytes
from quietstar.errors import UserError
from quietstar.plan import costs as plan
from quietstar.plan.table import least_work, training_changes
from quietstar.plan.vocabulary import vocabulary_bytes

RANK = 4
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


def build(mode: str, checkpointing: bool | str, decoder: dict[str, Any], **thoughts: Any) -> Any:
    config = LlamaConfig(**{"max_position_embeddings": 512, **decoder})
    return around(LlamaForCausalLM(config), mode, checkpointing, **thoughts)


def around(decoder: Any, mode: str, checkpointing: bool | str, **thoughts: Any) -> Any:
    size = decoder.config.vocab_size
    tokens = {"start_token_id": size - 2, "end_token_id": size - 1}
    # An untrained head gives no reward, and rows without one would be skipped.
    model: Any = thinking_model(decoder, mixing=0.2, **tokens, **thoughts)
    if mode == "bfloat16":
        model = model.bfloat16()
    if mode == "adapters":
        from quietstar.checkpoints.adapters import add_adapters

        pytest.importorskip("peft")
        model = add_adapters(model, "nowhere", rank=RANK, alpha=32)
    if checkpointing:
        kept = {"keep": "products"} if checkpointing == "products" else None
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kept)
    return model.train()


def measured_peak(model: Any, ids: torch.Tensor, autocast: bool) -> int:
    """Bytes at the peak of a step over what was there before: every allocation is recorded."""

    def step() -> None:
        context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
        with context:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    step()
    model.zero_grad(set_to_none=True)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    found = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
    level = peak = 0
    for _, change in changes:
        level += change
        peak = max(peak, level)
    return peak


def drawn_case() -> tuple[dict[str, Any], dict[str, Any], int, int]:
    heads = random.choice([2, 4, 8])
    width = random.choice([96, 128, 256])
    decoder = {
        "vocab_size": random.choice([1024, 2048, 4096]),
        "hidden_size": width,
        "intermediate_size": random.choice([2, 3, 4]) * width,
        "num_hidden_layers": random.randint(2, 6),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // random.choice([1, 2]),
        "tie_word_embeddings": random.random() < 0.5,
    }
    thoughts = {
        "thought_length": random.randint(3, 8),
        "talk_length": random.randint(1, 4),
        "num_rationales": random.randint(2, 3),
        "think_at": random.choice(["all", "all", "stride:2"]),
    }
    return decoder, thoughts, random.randint(1, 2), random.choice([96, 128])


def step_of(batch: int, length: int, mode: str, checkpointing: bool | str) -> plan.Step:
    """What the plan is asked for a model that :func:`around` made."""
    return plan.Step(
        batch,
        length,
        precision="float32" if mode == "adapters" else mode,
        checkpointing=bool(checkpointing),
        keep_products=checkpointing == "products",
        rank=RANK if mode == "adapters" else None,
        device="cpu",
    )


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, "products", True])
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast", "adapters"])
def test_peaks_are_within_ten_per_cent(mode: str, checkpointing: bool | str):
    decoder, thoughts, batch, length = drawn_case()
    model = build(mode, checkpointing, decoder, **thoughts)
    ids = torch.randint(0, 1000, (batch, length))
    measured = measured_peak(model, ids, mode == "autocast")
    sizes = plan.decoder_sizes(LlamaConfig(**decoder))
    step = step_of(batch, length, mode, checkpointing)
    counted = plan.activation_bytes(model.config, sizes, step)
    assert counted / measured == pytest.approx(1, abs=0.1), (decoder, thoughts, batch, length)


# Of every kind of layer one, large enough for the layers to be most of what is kept.
LARGER = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}
MIXERS = {
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "qwen3_5_text": {"linear_key_head_dim": 32, "linear_value_head_dim": 32},
    "olmo_hybrid": {"linear_key_head_dim": 24, "linear_value_head_dim": 32},
    "bamba": {"mamba_d_head": 24, "mamba_d_state": 32},
    "falcon_h1": {"mamba_d_head": 24, "mamba_d_state": 32, "mamba_d_ssm": 192},
    "kimi_linear": {"first_k_dense_replace": 3, "linear_head_dim": 32},  # without experts
}
NOT_SLOW = [(family, "float32", False) for family in ("lfm2", "qwen3_5_text")]
# Most of what is there is what the backward pass of a chunk works in.
NOT_SLOW += [("kimi_linear", "autocast", True)]


@pytest.mark.parametrize(
    ("family", "mode", "checkpointing"),
    [
        *NOT_SLOW,
        *(
            pytest.param(family, mode, way, marks=pytest.mark.slow)
            for family in MIXERS
            for mode in ("float32", "bfloat16", "autocast", "adapters")
            for way in (False, "products", True)
            if (family, mode, way) not in NOT_SLOW
        ),
    ],
)
def test_peaks_of_hybrids(family: str, mode: str, checkpointing: bool | str):
    sizes = {**HYBRIDS[family], **LARGER, **MIXERS[family]}
    config = AutoConfig.for_model(family, **sizes)
    _, thoughts, batch, length = drawn_case()
    model = around(AutoModelForCausalLM.from_config(config), mode, checkpointing, **thoughts)
    ids = torch.randint(3, 1000, (batch, length))
    measured = measured_peak(model, ids, mode == "autocast")
    step = step_of(batch, length, mode, checkpointing)
    counted = plan.activation_bytes(model.config, plan.decoder_sizes(config), step)
    # A step of a convolution has so few rows that weights' gradients and casts are much of the peak.
    allowed = 0.15 if checkpointing and family == "lfm2" else 0.1
    assert counted / measured == pytest.approx(1, abs=allowed), thoughts


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "adapters"])
def test_weights_and_states(mode: str):
    decoder, thoughts, *_ = drawn_case()
    model = build(mode, False, decoder, **thoughts)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    held += sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    if mode == "adapters":  # peft keeps the untrained originals of what it saves whole
        held -= sum(p.numel() * 4 for n, p in model.named_parameters() if "original_module" in n)
    sizes = plan.decoder_sizes(LlamaConfig(**decoder))
    precision = "float32" if mode == "adapters" else mode
    step = plan.Step(1, 8, precision=precision, rank=RANK if mode == "adapters" else None)
    assert plan.static_bytes(sizes, step) == pytest.approx(held, rel=0.01)


class Products(TorchDispatchMode):
    """Operations of the matrix products that are not inside an operator of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.total += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("checkpointing", "reuse"),
    [(False, False), (True, False), ("products", False), (False, True)],
    ids=str,
)
def test_operations_of_the_decoder(checkpointing: bool | str, reuse: bool):
    """Exactly the products of the linear layers; attention and vocabulary are operators of their own."""
    decoder, thoughts, batch, length = drawn_case()
    thoughts["think_at"] = "all"
    model = build("float32", checkpointing, decoder, **thoughts)
    model.reuse_rollout(reuse)
    ids = torch.randint(0, 1000, (batch, length))
    model(input_ids=ids, labels=ids)  # looks at the output layer once
    with Products() as products:
        model(input_ids=ids, labels=ids).loss.backward()
    sizes = plan.decoder_sizes(LlamaConfig(**decoder))
    again, kept = checkpointing is True, checkpointing == "products"
    step = plan.Step(batch, length, checkpointing=again or kept, keep_products=kept, reuse_rollout=reuse)
    rows = plan.Rows.of(model.config, step)
    body = 2 * sizes.linear * (rows.rollout + (3 + again) * rows.packed)
    if again:  # which stops short of the last product, as nothing needs its result
        body -= 2 * rows.packed * sizes.layers * sizes.width * sizes.inner
    if reuse:
        body -= 2 * sizes.linear * rows.rollout
    assert products.total == body
    flops = plan.step_flops(model.config, sizes, step)
    assert body < flops["rollout"] + flops["packed"] < 1.5 * body
    double = plan.step_flops(model.config, sizes, plan.Step(2 * batch, length))
    assert double["vocabulary"] == pytest.approx(2 * flops["vocabulary"], rel=0.01)


def test_the_least_work_that_fits():
    """Rows at a time before products kept, products kept before everything again."""
    config, sizes = build("float32", False, TINY).config, plan.decoder_sizes(LlamaConfig())
    own = plan.Step(8, 256, precision="bfloat16", checkpointing=True, optimizer_bytes=2.0)
    memories = (2e12, 200e9, 90e9, 60e9, 50e9, 40e9)
    found = [least_work(config, sizes, own, memory) for memory in memories]
    # The recipe says that it checkpoints: with enough memory that is taken back.
    recipe = {"gradient_checkpointing": True}
    assert training_changes(own, found[0], recipe) == {"gradient_checkpointing": False}
    # What the rollout computed is taken from it, as long as there is room for it.
    assert found[0].reuse_rollout and found[0].rows_per_backward is None
    assert not any(best.reuse_rollout for best in found if best is not None and best.checkpointing)
    # But not at the cost of many rows at a time.
    for gigabytes in range(20, 400, 10):
        best = least_work(config, sizes, own, gigabytes * 1e9)
        plain = least_work(config, sizes, own, gigabytes * 1e9, takes=False)
        if best is not None and best.reuse_rollout:
            assert 2 * best.part.batch >= plain.part.batch
    for other in ("pause", "none"):  # which have no rollout to take it from
        assert not least_work(
            build("float32", False, TINY, thought_kind=other).config, sizes, own, 2e12
        ).reuse_rollout
    quantized = dataclasses.replace(own, quantized=True, rank=16, precision="autocast")
    assert not least_work(config, sizes, quantized, 2e12).reuse_rollout
    work = []
    for best, memory in zip(found, memories, strict=True):
        if best is not None:
            assert plan.fits(config, sizes, best, memory)
            work.append(sum(plan.step_flops(config, sizes, best).values()))
    assert work == sorted(work)
    cut = next(best for best in found if best is not None and best.rows_per_backward)
    assert not cut.checkpointing
    assert training_changes(own, cut, recipe)["rows_per_backward"] == cut.rows_per_backward
    kept = dataclasses.replace(own, keep_products=True)
    assert training_changes(own, kept, {}) == {"activation_checkpointing_kwargs": {"keep": "products"}}
    assert training_changes(kept, own, {}) == {"activation_checkpointing_kwargs": None}
    assert least_work(config, sizes, own, 1e9) is None
    # What the trainer would refuse is not advised.
    whole = [least_work(config, sizes, own, m, keeps=False, cuts=False) for m in memories]
    assert all(w is None or (w.rows_per_backward is None and not w.keep_products) for w in whole)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_holds_larger_chunks_of_logits(precision: str):
    config, sizes = build("float32", False, TINY).config, plan.decoder_sizes(LlamaConfig())
    gpu = plan.Step(8, 256, precision=precision)
    cpu = dataclasses.replace(gpu, device="cpu")
    item = 4 if precision == "float32" else 2
    rows = 8192
    logits, gradient = rows * sizes.vocabulary * item, sizes.vocabulary * sizes.width * item
    assert logits > 256 * 2**20
    assert vocabulary_bytes(sizes, gpu, rows) == 256 * 2**20 + gradient
    assert vocabulary_bytes(sizes, gpu, 8) == 8 * sizes.vocabulary * item + gradient
    assert vocabulary_bytes(sizes, dataclasses.replace(gpu, rank=8), rows) == 256 * 2**20
    difference = plan.rollout_bytes(config, sizes, gpu) - plan.rollout_bytes(config, sizes, cpu)
    drawn = plan.Rows.of(config, gpu).columns * sizes.vocabulary * item
    assert difference == min(drawn, 512 * 2**20) - 64 * 2**20


def test_rows_at_a_time():
    """What is held is one part's, and the gradients of those before; the operations are the same."""
    config, sizes = build("float32", False, TINY).config, plan.decoder_sizes(LlamaConfig())
    whole, one = plan.Step(8, 256), plan.Step(8, 256, rows_per_backward=2)
    part = plan.Step(2, 256)
    held = [plan.activation_bytes(config, sizes, step) for step in (whole, one, part)]
    assert held[2] < held[1] < held[0]
    assert held[1] <= held[2] + 4 * sizes.all
    assert plan.step_flops(config, sizes, whole) == plan.step_flops(config, sizes, one)
    assert plan.rollout_bytes(config, sizes, whole) == plan.rollout_bytes(config, sizes, one)


def test_what_is_shared_and_what_is_saved():
    sizes = plan.decoder_sizes(LlamaConfig(num_hidden_layers=4))
    config = build("float32", False, TINY).config
    plain = plan.Step(2, 256, precision="autocast")
    sharded = plan.Step(2, 256, precision="autocast", processes=8, sharded=True)
    assert plan.static_bytes(sizes, sharded) == plan.static_bytes(sizes, plain) / 8
    assert plan.peak_bytes(config, sizes, sharded) < plan.peak_bytes(config, sizes, plain)
    ddp = plan.Step(2, 256, precision="autocast", processes=8)
    assert plan.peak_bytes(config, sizes, ddp) > plan.peak_bytes(config, sizes, plain)
    kept = plan.Step(2, 256, precision="autocast", reuse_rollout=True)
    outputs = 2 * 4096 + 2 * sizes.key + 2 * 11008 + 4096
    rows = plan.Rows.of(config, kept).rollout
    assert plan.kept_bytes(config, sizes, kept) == 2 * rows * outputs * sizes.layers
    assert plan.peak_bytes(config, sizes, kept) > plan.peak_bytes(config, sizes, plain)
    batches = [
        plan.largest_batch(config, sizes, step, 24e9)
        for step in (plain, plan.Step(2, 256, precision="autocast", checkpointing=True))
    ]
    assert 0 < batches[0] < batches[1]


@pytest.mark.parametrize(
    ("text", "size"), [("24G", 24e9), ("24GB", 24e9), ("24", 24e9), ("80gib", 80 * 2**30), ("1e9", 1e9)]
)
def test_sizes_are_read(text: str, size: float):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("setting", "advised"),
    [
        ("model.fused_layers=compile", True),
        ("model.fused_layers=liger", False),
        ("training.use_liger_kernel=true", False),
    ],
)
def test_with_liger_kernel_no_outputs_are_advised_to_be_reused(capsys, setting: str, advised: bool):
    assert cli.main(["plan", "tiny", setting, "--gpu-memory", "24G"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("least")]
    assert ("reuse_rollout: true" in line) == advised


def test_the_names_of_an_older_version():
    import quietstar.plan as package

    assert (package.CHUNK_ROWS, package.CHUNK_BYTES) == (512, 64 * 2**20)


def test_the_command(capsys):
    assert cli.main(["plan", "tiny", "--gpu-memory", "2G"]) == 0
    said = capsys.readouterr().out
    assert "1.1 M parameters" in said and "as the recipe says" in said and "FSDP2" in said
    assert cli.main(["plan", "tiny", "--gpu-memory", "24"]) == 0
    assert "24G" in capsys.readouterr().out
    with pytest.raises(UserError, match="--gpu-memory is 'much'; expected a size"):
        parse_bytes("much")
