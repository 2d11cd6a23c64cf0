"""benchmarks: what `quietstar eval` wrote of a model before and after training, as a table."""

import json

from benchmark_files import benchmark

of_trained = benchmark("demo_seeds").of_trained
render_trained = benchmark("report").render_trained

MACHINE = {"processor": "a CPU", "threads": 1, "torch": "2.13"}


def estimates(**means: float) -> dict:
    return {
        name: {"mean": mean, "standard_error": 0.125, "low": mean - 1, "high": mean + 1}
        for name, mean in means.items()
    }


def test_a_model_before_and_after(tmp_path):
    ways = {
        "before": {"base": 3.0},
        "none": {"base": 2.5},
        "thoughts": {"base": 2.75, "mixed": 2.25, "thought": 9.0, "shuffled": 2.875, "pause": 2.7},
    }
    for name, means in ways.items():
        deciles = [estimates(**{way: mean - 1 for way, mean in means.items()})] * 9
        text = {"tokens": 40, "blocks": 4, "nll": estimates(**means)}
        text["nll_by_decile"] = [*deciles, estimates(**{way: 2 * mean for way, mean in means.items()})]
        own = {"base": 0.25} | ({"mixed": 0.5} if name == "thoughts" else {})
        task = {"items": 7, "probability": estimates(**own), "accuracy": estimates(**own)}
        for kind, tasks in (("perplexity", {"perplexity": text}), ("tasks", {"csqa": task})):
            (tmp_path / f"{name}-{kind}.json").write_text(json.dumps({"tasks": tasks}))
    said = render_trained({"machine": MACHINE, "date": "today", **of_trained(tmp_path)})
    label = "trained with thoughts, weight 0.05 at first"
    with_thoughts = f"{label}, with its thoughts"
    assert "| before any training | 3.000 ± 0.125 | 6.000 |" in said
    assert f"| {label}, thoughts off | 2.750 ± 0.125 | 5.500 |" in said
    assert f"| {with_thoughts} | 2.250 ± 0.125 | 4.500 |" in said
    assert "9.000" not in said  # the thought alone is no row
    assert "from the easiest on: +0.500, " in said and said.count("+0.500") == 9 and "+1.000" in said

    row = f"| csqa, 7 items | {with_thoughts} | 0.5000 [-0.5000, 1.5000] |"
    assert row in said
