"""``python -m benchmarks.report``: the tables of README, docs/results.md and docs/gpu_paths.md from what
was measured.

Reads ``benchmarks/results`` and rewrites the parts of these pages between their markers; ``--check``
says only whether they are up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
REAL = README.parent / "docs" / "results.md"
GPU_PATHS = README.parent / "docs" / "gpu_paths.md"

EVERYTHING = Path(__file__).parent / "RESULTS.md"
# What README shows; the rest is in RESULTS.md.
HIGHLIGHTS = (
    "thought_attention forward + backward, B1 Hq32 Hkv8 N256 R1 S15 D128",
    "linear_cross_entropy, forward and backward, 8192 x 4096 onto 128256",
    "sample_tokens, 2048 x 128256 bfloat16, plain",
    "training step",
    "thought_attention forward + backward, B1 Hq8 Hkv4",
    "linear_cross_entropy, forward and backward, 2048 x 1024 onto 32000 float32",
    "generation",
)
TEXT_ARMS = {
    "base": "base model",
    "control": "trained on without thoughts",
    "mixed": "trained on with thoughts",
    "silent": "the same, thoughts switched off",
    "shuffled": "the same, thoughts of another position",
}


def render(results: dict[str, Any], highlights: tuple[str, ...] | None = None) -> str:
    """One machine's tables as markdown, a row per piece of work.

    ``highlights``: only work whose title begins with one of these; None: all of it.
    """
    machine = results["machine"]
    missing = machine.get("not_measured", [])
    tables = [
        table for benchmark in results["benchmarks"].values() for table in benchmark["tables"].values()
    ]
    several = any("commit" in row for table in tables for row in table.values())
    runs = "Medians; a row in brackets is from another run" if several else "Medians within one run"
    others = [name for name, benchmark in results["benchmarks"].items() if "source" in benchmark]
    busy = [
        name
        for name, benchmark in results["benchmarks"].items()
        if benchmark.get("busy") and any(map(_is_shown(highlights), benchmark["tables"]))
    ]
    lines = [
        f"Measured on {', '.join(_facts(machine))}. {runs}; others as multiples of ours."
        + (
            f" Timed while the machine did other work, so that only ratios count: {', '.join(busy)}."
            if busy
            else ""
        )
        + (f" Timed by other scripts than these benchmarks: {', '.join(others)}." if others else "")
        + (f" Not measured: {'; '.join(missing)}." if missing else ""),
        "",
        "| work | ours | others |",
        "|---|--:|---|",
    ]
    for benchmark in results["benchmarks"].values():
        for work, table in benchmark["tables"].items():
            if not _is_shown(highlights)(work):
                continue
            (_, ours), *rest = table.items()
            cells = [f"{name} {_times(row, ours)}" for name, row in rest]
            memory = f", {ours['peak_mb']:.0f} MB" if "peak_mb" in ours else ""
            if "of_copy" in ours:
                memory += f", {ours['of_copy']:.0%} of a copy's bandwidth"
            if "utilisation" in ours:
                memory += f", {ours['utilisation']:.0%} of a matrix product's rate"
            digits = 1 if ours["ms"] >= 10 else 2
            most = f" to {ours['most_ms']:.{digits}f}" if "most_ms" in ours else ""
            lines.append(f"| {work} | {ours['ms']:.{digits}f}{most} ms{memory} | {'; '.join(cells)} |")
    return "\n".join(lines)


def _is_shown(highlights: tuple[str, ...] | None) -> Callable[[str], bool]:
    return lambda work: highlights is None or work.startswith(highlights)


def _facts(machine: dict[str, Any]) -> list[str]:
    """The machine, its software and its ceilings."""
    gpu = machine.get("gpu")
    threads = machine["threads"]
    facts = [gpu or f"{machine['processor']}, {threads} thread{'s' * (threads != 1)}"]
    facts += [machine["simd"]] if machine.get("simd") and not gpu else []
    facts += [f"torch {machine['torch']}"]
    facts += [
        f"{name} {machine[name]}"
        for name in ("transformers", "driver", "commit", "date")
        if name in machine
    ]
    if "copy_gb_per_s" not in machine:
        return facts
    if gpu:
        tera = machine["copy_gb_per_s"] / 1e3, machine["matmul_bfloat16_gflop_per_s"] / 1e3
        return [*facts, f"copy {tera[0]:.1f} TB/s", f"bf16 matmul {tera[1]:.0f} TFLOP/s"]
    facts += [f"copy {machine['copy_gb_per_s']:.0f} GB/s"]
    return [*facts, f"fp32 matmul {machine['matmul_float32_gflop_per_s']:.0f} GFLOP/s"]


def _times(row: dict[str, float], ours: dict[str, float]) -> str:
    memory = f" ({row['peak_mb'] / ours['peak_mb']:.2f}x memory)" if "peak_mb" in row else ""
    return f"**{row['times_ours']:.2f}x**{memory}"


def render_demo(results: dict[str, Any]) -> str:
    """The demo's arms, over seeds."""
    seeds = ", ".join(results["seeds"])
    lines = ["| arm | answers: NLL | accuracy | easy tokens: NLL |", "|---|--:|--:|--:|"]
    for label, arm in results["over_seeds"].items():
        cells = [_spread(arm[column]) for column in ("hard_nll", "accuracy", "easy_nll")]
        name = f"**{label}**" if label == "full Quiet-STaR" else label
        lines.append(f"| {name} | {' | '.join(cells)} |")
    each = ", ".join(
        f"{run['arms']['full Quiet-STaR']['accuracy']['mean']:.3f}" for run in results["seeds"].values()
    )
    lines += ["", f"Mean ± standard error over seeds {seeds} (full: {each}); chance is 0.167."]
    for seed, run in results["seeds"].items():
        if run["by_thought_length"]:
            swept = ", ".join(
                f"{length}: {arm['accuracy']['mean']:.2f}"
                for length, arm in run["by_thought_length"].items()
            )
            lines[-1] += f" Accuracy by thought length (seed {seed}): {swept}."
    return "\n".join(lines)


def render_text(results: dict[str, Any]) -> str:
    """The text demo's arms on all held-out tokens, and the gain over the control."""
    lines = ["| arm | nats per held-out token |", "|---|--:|"]
    for name, label in TEXT_ARMS.items():
        lines.append(f"| {label} | {_spread(results['nll'][name])} |")
    gain = results["gain_over_control"]
    lines += [
        "",
        f"{results['tokens']} tokens of files held out by name, one seed. Gain over the control:"
        f" {gain['mean']:+.4f} ± {gain['standard_error']:.4f} nats per token.",
    ]
    return "\n".join(lines)


def render_words(results: dict[str, Any]) -> str:
    """The experiment on word problems: every arm, what was compared, gains by difficulty."""
    machine, sizes = results["machine"], results["sizes"]
    seeds = "; ".join(f"{arm}: {', '.join(each)}" for arm, each in results["seeds"].items())
    lines = [
        f"{results['problems']} held-out problems; {sizes['prepare']} steps of preparation,"
        f" {sizes['steps']} of each arm. Seeds: {seeds}. {', '.join(_facts(machine))},"
        f" {results['date']}.",
        "",
        "| arm | probability of the answer | greedy accuracy | NLL |",
        "|---|--:|--:|--:|",
    ]
    for row in results["rows"]:
        cells = f"{row['probability']:.3f} | {row['correct']:.3f} | {row['nll']:.2f}"
        lines.append(f"| {row['what']} | {cells} |")
    lines += [
        "",
        "| difference, per problem | probability | greedy accuracy | NLL |",
        "|---|--:|--:|--:|",
    ]
    for what, found in results["differences"].items():
        cells = " | ".join(_signed(found[key]) for key in ("probability", "correct", "nll"))
        lines.append(f"| {what} | {cells} |")
    lines += ["", "Mean ± standard error over problems of the mean over seeds; in brackets each seed's."]
    parts = results["by_difficulty"]
    lines += ["", f"| {len(parts)} equal parts by the prepared NLL | control | with thoughts |"]
    lines += ["|--:|--:|--:|"]
    for part in parts:
        before, after = part["control_probability"], part["full_probability"]
        lines.append(f"| {part['prepared_nll']:.2f} | {before:.3f} | {after:.3f} |")
    return "\n".join(lines)


def render_first_words(results: dict[str, Any]) -> str:
    """The arms of a run that was not compared further."""
    facts = ", ".join([*_facts(results["machine"]), results["date"]])
    return "\n".join([f"{results['what']} {facts}.", "", *_arms(results["rows"])])


def _arms(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| arm | probability of the answer | greedy accuracy | NLL |", "|---|--:|--:|--:|"]
    for row in rows:
        cells = f"{row['probability']:.3f} | {row['correct']:.3f} | {row['nll']:.2f}"
        lines.append(f"| {row['what']} | {cells} |")
    return lines


def render_star(results: dict[str, Any]) -> str:
    """What every iteration of STaR kept, and held-out accuracy after it."""
    lines = ["| iteration | steps | solved | rationalized | kept | held-out accuracy |"]
    lines += ["|--:|--:|--:|--:|--:|--:|"]
    for row in results["rows"]:
        shares = [f"{row[name]:.1%}" if name in row else "" for name in ("solved", "rationalized")]
        cells = [str(row.get("steps", "")), *shares, str(row.get("kept", "")), f"{row['accuracy']:.1%}"]
        lines.append(f"| {row['iteration']} | {' | '.join(cells)} |")
    problems = results["rows"][-1]["problems"]
    facts = ", ".join([*_facts(results["machine"]), results["date"]])
    return "\n".join(
        [*lines, "", f"{problems} problems, {results['held_out']} held out, one seed. {facts}."]
    )


def render_trained(results: dict[str, Any]) -> str:
    """A model before and after training: perplexity by difficulty, and tasks."""
    models = results["models"]
    texts = {label: tasks["perplexity"] for label, tasks in models.items()}
    names = {"mixed": "with its thoughts", "shuffled": "thoughts of another position"}
    names |= {"pause": "pause tokens instead"}
    lines = ["| model | nats per held-out token | hardest tenth |", "|---|--:|--:|"]
    for label, text in texts.items():
        for way, nll in text["nll"].items():
            if way == "base" or way in names:
                hardest = text["nll_by_decile"][-1][way]["mean"]
                off = ", thoughts off" if len(text["nll"]) > 1 else ""
                what = label + (off if way == "base" else f", {names[way]}")
                lines.append(f"| {what} | {_spread(nll)} | {hardest:.3f} |")
    text = next(reversed(texts.values()))
    gains = [f"{each['base']['mean'] - each['mixed']['mean']:+.3f}" for each in text["nll_by_decile"]]
    facts = ", ".join([*_facts(results["machine"]), results["date"]])
    lines += [
        "",
        f"{text['tokens']} tokens in {text['blocks']} blocks, the same for all; ± standard error",
    ]
    lines[-1] += (
        f" over blocks. Gain by thinking, tenths of tokens from the easiest on: {', '.join(gains)}."
    )
    lines += ["", "| task | model | probability of the answer | right |", "|---|---|--:|--:|"]
    for label, tasks in models.items():
        for name, task in tasks.items():
            if name == "perplexity":
                continue
            right = task.get("accuracy") or task["exact_match"]
            for way in ("base", "mixed"):
                if way not in right:
                    continue
                off = ", thoughts off" if "mixed" in right else ""
                what = label + (off if way == "base" else ", with its thoughts")
                cells = [_interval(of[way]) for of in (task["probability"], right)]
                lines.append(f"| {name}, {task['items']} items | {what} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"95 % bootstrap intervals. {facts}."])


def _interval(value: dict[str, Any]) -> str:
    return f"{value['mean']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"


def render_zero_shot(results: dict[str, Any]) -> str:
    """A plain model's tasks: means with their intervals."""
    lines = ["| task | items | probability of the answer | right |", "|---|--:|--:|--:|"]
    for name, task in results["tasks"].items():
        right = task.get("accuracy") or task["exact_match"]
        cells = [_interval(of["base"]) for of in (task["probability"], right)]
        lines.append(f"| {name} | {task['items']} | {' | '.join(cells)} |")
    facts = ", ".join([*_facts(results["machine"]), results["date"]])
    return "\n".join([*lines, "", f"95 % bootstrap intervals. {facts}."])


def render_launches(results: dict[str, Any]) -> str:
    """Kernel launches of a step by part, in two ways; those of the second by kind."""
    (before, plain), (after, fused) = results["ways"].items()
    kinds = list(dict.fromkeys(kind for part in fused.values() for kind in part))
    lines = [f"| part | {before} | {after} | {' | '.join(kinds)} |", "|---|" + "--:|" * (2 + len(kinds))]

    def row(title: str, parts: list[str]) -> str:
        sums = [sum(sum(way[part].values()) for part in parts) for way in (plain, fused)]
        each = [sum(fused[part].get(kind, 0) for part in parts) for kind in kinds]
        return f"| {title} | {' | '.join(f'{count:,}' if count else '' for count in [*sums, *each])} |"

    lines += [row(part, [part]) for part in fused]
    lines.append(row("**all**", list(fused)))
    packed = [part for part in fused if part.startswith("packed pass")]
    counts = [sum(sum(way[part].values()) for part in packed) for way in (plain, fused)]
    check = results["check"]
    lines += [
        "",
        f"Of the packed pass {counts[1]:,} of {counts[0]:,} are left, {counts[1] / counts[0]:.0%}."
        f" {results['what']}; torch {results['torch']}, transformers {results['transformers']},"
        f" {results['date']}. Counted over {check['commit']}, which the H200 ran: {check['counted']:,},"
        f" {check['counted_products']:,} of them products; its profile lists {check['profiled']:,}"
        f" (the 60 kernels of most time), {check['profiled_products']:,} of them products, and"
        f" {check['profiled_library_extras']} that libraries launch around products, which are not"
        " counted here.",
    ]
    return "\n".join(lines)


def _signed(value: dict[str, Any]) -> str:
    each = ", ".join(f"{seed:+.3f}" for seed in value["by_seed"])
    error = value["standard_error"]
    return f"{value['mean']:+.3f}" + ("" if error is None else f" ± {error:.3f}") + f" ({each})"


def _spread(value: dict[str, Any]) -> str:
    error = value["standard_error"]
    return f"{value['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def replaced(page: str, marker: str, content: str) -> str:
    """A page with the part between ``<!-- marker -->`` and ``<!-- /marker -->`` replaced."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if begin not in page or end not in page:
        raise SystemExit(f"a page lacks the markers {begin} and {end}")
    head, _, rest = page.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{content}\n{end}{tail}"


def widest(machines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of CPUs and of GPUs the one on which most was measured; the others are in RESULTS.md."""

    def works(results: dict[str, Any]) -> int:
        return sum(len(benchmark["tables"]) for benchmark in results["benchmarks"].values())

    kinds = [[m for m in machines if ("gpu" in m["machine"]) == gpu] for gpu in (False, True)]
    return [max(kind, key=works) for kind in kinds if kind]


def main() -> int:
    """Rewrite, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    measured = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    machines = [each for each in measured if "benchmarks" in each]
    pages = {path: path.read_text() for path in (README, REAL, GPU_PATHS)}
    shown = "\n\n".join(render(m, HIGHLIGHTS) for m in widest(machines))
    pages[README] = replaced(pages[README], "benchmarks", shown)
    counted = RESULTS / "launches.json"
    pages[GPU_PATHS] = replaced(
        pages[GPU_PATHS], "launches", render_launches(json.loads(counted.read_text()))
    )
    for name, page, marker, show in (
        ("lookup", README, "demo", render_demo),
        ("text", README, "demo text", render_text),
        ("words", REAL, "words", render_words),
        ("words-first", REAL, "words first", render_first_words),
        ("words-tries", REAL, "words tries", render_first_words),
        ("words-thoughts", REAL, "words thoughts", render_first_words),
        ("star-svamp", REAL, "star svamp", render_star),
        ("zero-shot", REAL, "zero-shot", render_zero_shot),
        ("trained", REAL, "trained", render_trained),
    ):
        path = RESULTS / "demo" / f"{name}.json"
        if path.is_file():
            pages[page] = replaced(pages[page], marker, show(json.loads(path.read_text())))
    pages[EVERYTHING] = "# Every benchmark\n\n" + "\n\n".join(render(m) for m in machines) + "\n"
    if check:
        same = all(path.is_file() and path.read_text() == page for path, page in pages.items())
        print("The tables are up to date" if same else "The tables are not up to date")
        return int(not same)
    for path, page in pages.items():
        path.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
