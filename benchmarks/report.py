"""``python -m benchmarks.report``: README's tables from what the benchmarks wrote.

Reads ``benchmarks/results/*.json`` and rewrites the part of README.md between its two markers; with
``--check`` it only says whether README is up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def render(results: dict[str, Any]) -> str:
    """One machine's tables as markdown."""
    machine = results["machine"]
    facts = [machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"]
    facts += [f"{machine['simd']}"] if machine.get("simd") and not machine.get("gpu") else []
    facts += [f"torch {machine['torch']}", f"copy {machine['copy_gb_per_s']:.0f} GB/s"]
    facts += [f"fp32 matmul {machine['matmul_float32_gflop_per_s']:.0f} GFLOP/s"]
    lines = [f"Measured on {', '.join(facts)}; medians within one run.", ""]
    lines += ["| work | contestant | ms | times ours | peak memory |", "|---|---|--:|--:|--:|"]
    for benchmark in results["benchmarks"].values():
        for work, table in benchmark["tables"].items():
            for number, (name, row) in enumerate(table.items()):
                memory = f"{row['peak_mb']:.0f} MB" if "peak_mb" in row else ""
                times = "" if number == 0 else f"{row['times_ours']:.2f}"
                first = work if number == 0 else ""
                lines.append(f"| {first} | {name} | {row['ms']:.1f} | {times} | {memory} |")
    return "\n".join(lines)


def updated(readme: str, tables: list[str]) -> str:
    """README with the part between the markers replaced."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{chr(10).join(tables)}\n{END}{tail}"


def main() -> int:
    """Rewrite, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    tables = [render(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]
    before = README.read_text()
    if BEGIN not in before or END not in before:
        print(f"README.md lacks the markers {BEGIN} and {END}", file=sys.stderr)
        return 1
    after = updated(before, tables)
    if check:
        print("README.md is up to date" if after == before else "README.md is not up to date")
        return int(after != before)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
