"""The table of the operators: for each, inputs, calls, and what must be rejected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attention_cases
import linear_cross_entropy_cases
import mixing_head_cases
import torch
from contract import Call, Operator
from torch import Tensor

import quietstar_ext as ext

# ---- linear_cross_entropy, and its sum


def cross_entropy_call(dtype: torch.dtype, rows: int = 11, **options: Any) -> Call:
    hidden, weight, targets = linear_cross_entropy_cases.make(rows, dtype=dtype)
    return {"hidden": hidden, "weight": weight, "targets": targets, **options}


def cross_entropy_calls(dtype: torch.dtype) -> list[Call]:
    options = linear_cross_entropy_cases.OPTIONS
    kept = options["everything"] | {"accumulate": "parameter"}
    return [cross_entropy_call(dtype, **each) for each in (options["plain"], kept)]


def cross_entropy_budget(dtype: torch.dtype) -> Call:
    hidden, weight, targets = linear_cross_entropy_cases.make(90, 32, 301, dtype)
    return {"hidden": hidden, "weight": weight, "targets": targets}


def cross_entropy_by_torch(
    hidden: Tensor, weight: Tensor, targets: Tensor, accumulate: str = "auto"
) -> tuple[Tensor, ...]:
    return (torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none"),)


def with_row_weights(call: Call) -> Call:
    rows = len(call["targets"])
    return {"row_weights": torch.rand(rows, dtype=torch.float32) / max(1, rows), **call}


def cross_entropy_sum_by_torch(row_weights: Tensor, **call: Tensor) -> tuple[Tensor, ...]:
    (nll,) = cross_entropy_by_torch(**call)
    return (nll * row_weights).sum(), nll.detach()


def cross_entropy_registered(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    made = linear_cross_entropy_cases.make(dtype=dtype)
    hidden, weight, targets = (t.detach().to(device) for t in made)
    grad = torch.rand(len(targets), device=device)
    operators = torch.ops.quietstar
    for banned in (None, torch.tensor([1, 4], device=device)):
        call = (hidden, weight, targets, banned, 0.7, -100, 3.0, 1.5)
        yield operators.linear_cross_entropy_forward, call
        for wanted, accumulate in (((True, True), "auto"), ((False, True), "parameter")):
            units = [torch.rand_like(t if w else t[:0, 0]) for t, w in zip(call, wanted, strict=False)]
            more = (grad, *units, *wanted, accumulate)
            yield operators.linear_cross_entropy_backward, (*call, *more)
        more = (grad, True, True, True, "float32")
        yield operators.linear_cross_entropy_forward_and_backward, (*call, *more)


CROSS_ENTROPY_ERRORS: list[tuple[Call, str]] = [
    ({"hidden": torch.zeros(2, 11, 6)}, r"hidden has shape .*; expected \[rows, d\]"),
    ({"hidden": torch.zeros(11, 6).long()}, "hidden has dtype int64"),
    ({"weight": torch.zeros(13, 7)}, r"weight has shape \[13, 7\]; expected \[V, 6\]"),
    ({"weight": torch.zeros(13, 6).half()}, "weight has dtype float16; expected float32"),
    ({"weight": torch.zeros(0, 6)}, "weight has no rows"),
    ({"weight": torch.zeros(13, 6, device="meta")}, "weight is on meta; expected cpu"),
    ({"targets": torch.zeros(10).long()}, r"targets has shape \[10\]; expected \[11\]"),
    ({"targets": torch.zeros(11).int()}, "targets has dtype int32; expected int64"),
    ({"targets": torch.full((11,), 13)}, "targets contains 13; expected values from 0 to 12"),
    ({"targets": torch.full((11,), -1)}, "targets contains -1; .* or -100"),
    ({"targets": Tensor.tolist}, r"targets is a list; expected a torch\.Tensor"),
    ({"temperature": 0.0}, "temperature is 0.0; expected a number greater than 0"),
    ({"softcap": -3.0}, "softcap is -3.0"),
    ({"banned": [13]}, "banned contains 13; expected values from 0 to 12"),
    ({"banned": torch.zeros(2, 2).long()}, "banned has shape"),
    ({"banned": torch.zeros(2)}, "banned has dtype float32; expected int64"),
    ({"accumulate": "float16"}, "accumulate is 'float16'; expected one of auto, float32"),
    ({"impl": "kernel"}, "impl is 'kernel'"),
]
ROW_WEIGHTS_ERRORS: list[tuple[Call, str]] = [
    ({"row_weights": torch.ones(12)}, r"row_weights has shape \[12\]; expected \[11\]"),
    ({"row_weights": torch.ones(11).long()}, "row_weights has dtype int64"),
]


# ---- mixing_head


def mixing_call(dtype: torch.dtype, *shape: Any, activation: str = "identity") -> Call:
    tensors, index = mixing_head_cases.make_with_large_biases(*shape, dtype=dtype)
    call = dict(zip(mixing_head_cases.NAMES, tensors, strict=True))
    return call | {"activation": activation, "base_index": index}


def mixing_by_torch(activation: str, base_index: Tensor | None, **tensors: Tensor) -> tuple[Tensor, ...]:
    return mixing_head_cases.concatenated(list(tensors.values()), activation, base_index)


def mixing_registered(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    tensors, index = mixing_head_cases.make(5, 9, 8, True, dtype=dtype)
    base, *rest = (t.detach().to(device) for t in tensors)
    index = index.to(device)
    operators = torch.ops.quietstar
    for sigmoid in (False, True):
        for call in ((base, *rest, index, sigmoid), (rest[0].flip(0), *rest, None, sigmoid)):
            yield operators.mixing_head_forward, call
            mixed, w, *kept = operators.mixing_head_forward(*call)
            grads = torch.randn_like(mixed), torch.randn_like(w)
            for wanted in ([True] * 7, [False, True] * 3 + [False]):
                yield operators.mixing_head_backward, (*call, *kept, *grads, wanted)


MIXING_ERRORS: list[tuple[Call, str]] = [
    ({"base": lambda t: t[0]}, r"base has shape \[4\]; expected \[P, d\]"),
    ({"base": lambda t: t.int()}, "base has dtype int32"),
    ({"thought": lambda t: t[:, 1:]}, r"thought has shape \[5, 3\]; expected \[rows, 4\]"),
    ({"thought": lambda t: t.double()}, "thought has dtype float64; expected float32"),
    ({"w1": lambda t: t[:, 1:]}, r"w1 has shape \[4, 7\]; expected \[4, 8\]"),
    ({"b1": lambda t: t[1:]}, "b1 has shape"),
    ({"b1": None}, r"b1 is a NoneType; expected a torch\.Tensor"),
    ({"w2": lambda t: t[1:]}, "w2 has shape"),
    ({"b2": lambda t: t[:, None]}, "b2 has shape"),
    ({"w3": lambda t: t[0]}, r"w3 has shape \[4\]; expected \[1, 4\]"),
    ({"w3": lambda t: t.to("meta")}, "w3 is on meta; expected cpu"),
    ({"activation": "relu"}, "activation is 'relu'; expected one of identity, sigmoid"),
    ({"base_index": None}, "base has 3 rows and thought 5"),
    ({"base_index": torch.zeros(4).long()}, r"base_index has shape \[4\]; expected \[5\]"),
    ({"base_index": torch.zeros(5).int()}, "base_index has dtype int32; expected int64"),
    ({"base_index": torch.full((5,), 3)}, "base_index contains 3; expected values from 0 to 2"),
    ({"base_index": torch.full((5,), -1)}, "base_index contains -1"),
    ({"impl": "best"}, "impl is 'best'"),
]


# ---- thought_attention


def attention_call(dtype: torch.dtype, *shape: Any, **options: Any) -> Call:
    tensors, start, stop, more = attention_cases.make(*shape, dtype=dtype)
    call = dict(zip(attention_cases.TENSORS, tensors, strict=True))
    if "sinks" in more:
        more["sinks"] = more["sinks"].detach().to(torch.promote_types(dtype, torch.float32))
        more["sinks"].requires_grad_()
    return call | {"text_start": start, "text_stop": stop} | more | options


def attention_calls(dtype: torch.dtype) -> list[Call]:
    names = ("packed", "rollout step", "text rows", "everything")
    return [attention_call(dtype, *attention_cases.SHAPES[name], return_lse=True) for name in names]


def attention_by_torch(text_start: Tensor, text_stop: Tensor, **tensors: Tensor) -> tuple[Tensor, ...]:
    there = tensors["q"].device
    on_cpu = [t.cpu() for t in tensors.values()]
    return (attention_cases.dense(on_cpu, text_start.cpu(), text_stop.cpu()).to(there),)


def attention_registered(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    operators = torch.ops.quietstar
    for call in attention_calls(dtype):
        call = {k: v.detach().to(device) if isinstance(v, Tensor) else v for k, v in call.items()}
        q, *inputs = (call[name] for name in (*attention_cases.TENSORS, "text_start", "text_stop"))
        rest = (call.get("sinks"), 0.3, call.get("sliding_window", 0), call.get("softcap", 0.0))
        yield operators.thought_attention.default, (q, *inputs, *rest)
        out, lse = operators.thought_attention(q, *inputs, *rest)
        grads = (out, lse, torch.randn_like(out), torch.randn_like(lse))
        yield operators.thought_attention_backward.default, (q, *inputs, *rest, *grads)
        # Rows that do not lie side by side.
        yield operators.thought_attention.default, (q.mT.contiguous().mT, *inputs, *rest)


ATTENTION_ERRORS: list[tuple[Call, str]] = [
    ({"q": lambda t: t[0]}, r"q has shape .*; expected \[B, Hq, Sq, M, D\]"),
    ({"q": lambda t: t.long()}, "q has dtype int64; expected float32"),
    ({"k_text": lambda t: t[..., :3]}, "k_text has shape"),
    ({"k_text": lambda t: t.double()}, "k_text has dtype float64; expected float32"),
    ({"k_text": []}, r"k_text is a list; expected a torch\.Tensor"),
    ({"v_text": lambda t: t[:, :, 1:]}, "v_text has shape"),
    ({"k_thought": lambda t: t[:, :, :, 1:]}, "k_thought has shape"),
    ({"k_thought": lambda t: t.to("meta")}, "k_thought is on meta; expected cpu"),
    ({"v_thought": lambda t: t[:, :, 1:]}, "v_thought has shape"),
    ({"text_start": lambda t: t.long()}, "text_start has dtype int64; expected int32"),
    ({"text_stop": lambda t: t[:, 1:]}, "text_stop has shape"),
    ({"q": lambda t: t[:, :3]}, "q has 3 heads and k_text 2; expected .* multiple"),
    ({"q": lambda t: t.repeat(1, 1, 2, 1, 1)}, "k_thought has 2 slots and q has 4"),
    ({"sliding_window": 0}, "sliding_window is 0"),
    ({"rationale_major": True}, "rationale_major is True and every_position False; expected every_pos"),
    (
        {"rationale_major": True, "every_position": True},
        "rationale_major is True, q has 3 columns and k_text 5 tokens; expected the columns",
    ),
    ({"softcap": -1.0}, "softcap is -1.0"),
    ({"sinks": torch.zeros(3)}, r"sinks has shape \[3\]; expected \[4\]"),
    ({"impl": "fast"}, "impl is 'fast'; expected one of auto"),
]


# ---- sample_tokens and linear_sample


def sampling_calls(dtype: torch.dtype) -> list[Call]:
    logits = (torch.randn(6, 50) * 3).to(dtype)
    options = {"top_k": 8, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8, "banned": [1]}
    return [{"logits": logits, "seed": 3}, {"logits": logits, "seed": torch.tensor([7]), **options}]


def sampling_registered(device: str, dtype: torch.dtype) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    seed, logits = torch.tensor([3], device=device), torch.randn(6, 40).to(device, dtype)
    hidden, weight = torch.randn(6, 8).to(device, dtype), torch.randn(40, 8).to(device, dtype)
    for fused in (True, False) if device == "cpu" else (True,):
        for banned in (None, torch.tensor([1], device=device)):
            rest = (banned, seed, 0)
            call = (logits, 1.0, 5, 0.9, 0.01, *rest, fused)
            yield torch.ops.quietstar.sample_tokens.default, call
            call = (hidden, weight, 1.0, 5, 0.9, 0.0, *rest, 3.0, 1.0, fused)
            yield torch.ops.quietstar.linear_sample.default, call


def linear_sampling_calls(dtype: torch.dtype) -> list[Call]:
    hidden, weight = torch.randn(6, 16).to(dtype), (torch.randn(50, 16) / 2).to(dtype)
    plain = {"hidden": hidden, "weight": weight, "seed": 3}
    options = {"top_p": 0.9, "softcap": 3.0, "logit_scale": 0.7, "banned": [1]}
    return [plain, plain | {"seed": torch.tensor([7])} | options]


SAMPLING_ERRORS: list[tuple[Call, str]] = [
    ({"temperature": -1.0}, "temperature is -1.0; expected 0 or"),
    ({"temperature": torch.nan}, "temperature is nan"),
    ({"top_k": -1}, "top_k is -1; expected 0 or more"),
    ({"top_p": 0.0}, "top_p is 0.0; expected a number above 0"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"min_p": -0.1}, "min_p is -0.1; expected a number from 0 to 1"),
    ({"banned": [50]}, "banned contains 50; expected values from 0 to 49"),
    ({"banned": [-1]}, "banned contains -1"),
    ({"banned": list(range(50))[::-1]}, "no token is left|banned has all 50 ids"),
    ({"banned": torch.zeros(1)}, "banned has dtype float32; expected int64"),
    ({"seed": 2**63}, "seed is 9223372036854775808; expected a number that fits"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed is a int64 tensor of 2 elements"),
    ({"seed": torch.zeros(1)}, "seed is a float32 tensor of 1 elements"),
]
LOGITS_ERRORS: list[tuple[Call, str]] = [
    ({"logits": [[0.0]]}, "logits is a list; expected a torch.Tensor"),
    ({"logits": torch.zeros(3)}, r"logits has shape \[3\]; expected \[rows, vocab\]"),
    ({"logits": torch.zeros(1, 3, dtype=torch.int64)}, "logits has dtype int64"),
    ({"logits": torch.zeros(3, 0)}, "logits has no columns"),
]
LINEAR_SAMPLE_ERRORS: list[tuple[Call, str]] = [
    ({"hidden": lambda t: t[:, :7]}, r"weight has shape \[50, 16\]; expected \[vocab, 7\]"),
    ({"weight": lambda t: t.bfloat16()}, "weight has dtype bfloat16; expected float32"),
    ({"weight": lambda t: t[:0]}, "weight has no rows"),
    ({"softcap": -1.0}, "softcap is -1.0; expected a number greater than 0"),
]


OPERATORS = [
    Operator(
        ext.linear_cross_entropy,
        cross_entropy_calls,
        CROSS_ENTROPY_ERRORS,
        empty=lambda dtype: [cross_entropy_call(dtype, rows=0)],
        registered=cross_entropy_registered,
        launches=2,
        plain=cross_entropy_by_torch,
        budget=cross_entropy_budget,
        places=linear_cross_entropy_cases.PLACES,
    ),
    Operator(
        ext.linear_cross_entropy_sum,
        lambda dtype: [with_row_weights(call) for call in cross_entropy_calls(dtype)],
        CROSS_ENTROPY_ERRORS + ROW_WEIGHTS_ERRORS,
        empty=lambda dtype: [with_row_weights(cross_entropy_call(dtype, rows=0))],
        registered=lambda device, dtype: iter(()),  # those of linear_cross_entropy
        launches=3,
        plain=cross_entropy_sum_by_torch,
        budget=lambda dtype: with_row_weights(cross_entropy_budget(dtype)),
        places=linear_cross_entropy_cases.PLACES,
    ),
    Operator(
        ext.mixing_head,
        lambda dtype: [
            mixing_call(dtype, 5, 23, 16, True),
            mixing_call(dtype, 5, 23, 16, True, activation="sigmoid"),
            mixing_call(dtype, 9, 9, 8, False, activation="sigmoid"),
        ],
        MIXING_ERRORS,
        empty=lambda dtype: [
            mixing_call(dtype, positions, 0, 8, False) | {"base_index": torch.empty(0).long()}
            for positions in (0, 3)
        ],
        registered=mixing_registered,
        sound=lambda: mixing_call(torch.float32, 3, 5, 4, True),
        launches=6,
        plain=mixing_by_torch,
        budget=lambda dtype: mixing_call(dtype, 30, 90, 64, True),
        draws=10,
        max_errors=False,
    ),
    Operator(
        ext.thought_attention,
        attention_calls,
        ATTENTION_ERRORS,
        empty=lambda dtype: [
            attention_call(dtype, *shape, return_lse=True)
            for shape in ((0, 2, 1, 2, 2, 3, 4, 8), (1, 2, 1, 2, 2, 0, 4, 8), (1, 2, 1, 1, 0, 3, 0, 8))
        ],
        registered=attention_registered,
        sound=lambda: attention_call(torch.float32, 2, 4, 2, 2, 2, 3, 5, 4),
        derived=lambda: (
            attention_call(torch.float32, 1, 4, 2, 3, 3, 5, 5, 4)
            | {"text_start": torch.zeros(1, 5).int(), "text_stop": torch.arange(1, 6).int()[None]}
        ),
        launches=5,
        same_bits=True,
        plain=attention_by_torch,
        budget=lambda dtype: attention_call(dtype, 2, 4, 2, 4, 4, 20, 33, 32),
    ),
    Operator(
        ext.sample_tokens,
        sampling_calls,
        SAMPLING_ERRORS + LOGITS_ERRORS,
        same_bits=True,
        empty=lambda dtype: [{"logits": torch.empty(0, 10, dtype=dtype), "seed": 0}],
        registered=sampling_registered,
    ),
    Operator(
        ext.linear_sample,
        linear_sampling_calls,
        SAMPLING_ERRORS + LINEAR_SAMPLE_ERRORS,
        empty=lambda dtype: [
            {"hidden": torch.randn(0, 8).to(dtype), "weight": torch.randn(50, 8).to(dtype), "seed": 0}
        ],
        registered=lambda device, dtype: iter(()),  # as those of sample_tokens
    ),
]
