"""The GPU's training-step benchmark: its count of operations, and that it runs (tiny, on the CPU)."""

import json

import pytest
from benchmark_files import PATH, benchmark
from small_recipes import SIZES, run_python
from transformers import LlamaConfig

from quietstar import QuietStarConfig
from quietstar.plan.costs import decoder_sizes


def test_operations_by_hand():
    sizes = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2}
    decoder = LlamaConfig(**{**SIZES, **sizes}, vocab_size=10)
    fields = {"start_token_id": 8, "end_token_id": 9, "thought_length": 2, "talk_length": 2}
    config = QuietStarConfig(text_config=decoder, num_rationales=2, **fields)
    sizes = decoder_sizes(decoder)
    # q and o 4x4, k and v 4x2, gate, up and down 4x6; twice.
    assert sizes.linear == 2 * (2 * 16 + 2 * 8 + 3 * 24) == 240
    found = benchmark("flops").training_step_flops(config, sizes, batch=1, length=3, rewarded=0.25)
    # Start, two thought tokens, end and one talk token are 5 slots; 3 positions twice are 6 columns.
    # The start slot is the same for both columns of a position.
    assert found.body == 6 * 240 * (3 + 3 + 4 * 6) == 43200
    # Text rows see 1 + 2 + 3 keys. A column's five slots see its text and 1 + 2 + .. + 5 slots.
    text_of_columns = 2 * (1 + 2 + 3)
    pairs = (1 + 2 + 3) + 5 * text_of_columns + 6 * (1 + 2 + 3 + 4 + 5)
    assert found.attention == 3 * 2 * 2 * 4 * 2 * pairs == 96 * 156
    # 12 tokens drawn; losses of 2 base and 12 talk predictions, and of a quarter of the 12 drawn.
    assert found.vocabulary == 2 * 4 * 10 * (12 + 3 * (2 + 12 + 3)) == 5040
    # 4x4 for 3 base rows, and 4x4 and 4x4 for each of 12 talk rows, forward and twice backward.
    assert found.mixing == 3 * 2 * 16 * (3 + 2 * 12) == 2592
    assert found.needed == 43200 + 96 * 156 + 5040 + 2592
    # The rollout: the text, and start and first token of the 6 columns, without gradients.
    rollout_pairs = 6 + 2 * text_of_columns + 6 * (1 + 2)
    assert found.rollout == 2 * 240 * (3 + 3 + 6) + 4 * 4 * 2 * rollout_pairs


@pytest.mark.slow
def test_the_benchmarks_run():
    """With a tiny decoder: all rows are there, each is told when it is measured, nothing is written."""
    code = """
import json
from benchmarks import bench_gpu_generation as generation, bench_gpu_step as bench
told = []
step = bench.training_step("tiny", 2, 24, rounds=1, measured=lambda table: told.append(len(table)))
one = bench.training_step("tiny", 1, 24, rounds=1)
tokens = generation.generation("tiny", 2, 20, new=3, rounds=1)
print(json.dumps([told, step, list(one), tokens, generation.slot_step("tiny", 2, 20, rounds=1)]))
"""
    done = run_python("-c", code, PYTHONPATH=PATH)
    told, step, one, tokens, slots = json.loads(done.stdout.splitlines()[-1])
    ways = [
        "quietstar",
        "quietstar, outputs of the rollout reused",
        "quietstar, a text per backward pass",
        "quietstar, checkpointing, products kept",
        "quietstar, gradient checkpointing",
        "quietstar, layers as they are",
        "quietstar, layers as they are, no graph",
        "sequential, dense (as published)",
    ]
    assert list(step) == ways and told == [*range(1, 9)]
    assert one == [way for way in ways if "a text per" not in way]
    assert all(row["ms"] > 0 for row in step.values())
    ours = step["quietstar"]
    assert ours["needed_gflop"] > 0 and 0 < ours["utilisation"] < ours["utilisation_with_rollout"] < 1
    assert ours["utilisation"] == pytest.approx(
        ours["needed_gflop"] / ours["ms"] * 1e3 / ours["matmul_gflop_per_s"], rel=1e-6
    )
    assert list(tokens) == ["quietstar", "quietstar, no graph", "plain generation, no thoughts"]
    assert {"slot step", "decoding step, growing cache", "decoding step, static cache"} == set(slots)
    assert all(row["ms"] > 0 for row in (*tokens.values(), *slots.values()))
