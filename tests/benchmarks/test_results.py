"""benchmarks: what is written into a machine's file, and what the machine is called."""

import json
import sys

import pytest
from benchmark_files import benchmark

benchmarks = sys.modules[str(benchmark("device").__package__)]

ROW = {"ms": 2.0, "best_ms": 1.0, "times_ours": 1.0}


def test_a_file_keeps_what_a_person_wrote_about_the_machine(tmp_path, monkeypatch):
    """A run measures the machine again; what it did not measure it cannot know."""
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmarks, "machine", lambda: {"gpu": "A GPU", "driver": "2"})
    monkeypatch.setattr(benchmarks, "machine_name", lambda: "a-gpu")
    before = {"gpu": "A GPU", "driver": "1", "commit": "abc", "not_measured": ["x"], "notes": "y"}
    other = {"date": "2026-01-01", "tables": {"work": {"ours": ROW}}}
    path = tmp_path / "a-gpu.json"
    path.write_text(json.dumps({"machine": before, "benchmarks": {"other": other}}))
    for title in ("first", "second"):
        benchmarks.record("a stem of this test", title, {"ours": dict(ROW)})
        written = json.loads(path.read_text())  # at once
        assert list(written["benchmarks"]["a stem of this test"]["tables"])[-1] == title
    assert written["machine"] == {"gpu": "A GPU", "driver": "2", "not_measured": ["x"], "notes": "y"}
    assert written["benchmarks"]["other"] == other
    assert list(written["benchmarks"]["a stem of this test"]["tables"]) == ["first", "second"]


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"model name": "AMD EPYC", "cpu family": "26"}, "AMD EPYC (Zen 5)"),
        ({"model name": "AMD EPYC", "cpu family": "25", "flags": "x avx512_bf16"}, "AMD EPYC (Zen 4)"),
        ({"model name": "AMD EPYC", "cpu family": "25"}, "AMD EPYC (Zen 3)"),
        (
            {"model name": "AMD EPYC", "cpu family": "23", "model": "49"},
            "AMD EPYC (family 23, model 49)",
        ),
        ({"model name": "AMD EPYC 9V74", "cpu family": "25"}, "AMD EPYC 9V74"),
        ({"model name": "Intel(R) Xeon(R) Processor"}, "Intel(R) Xeon(R) Processor"),
    ],
)
def test_processors_that_call_themselves_the_same(facts, name, tmp_path, monkeypatch):
    text = "".join(f"{key}\t: {value}\n" for key, value in facts.items())
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{text}\nprocessor\t: 1\nmodel name\t: another\n\n")
    real = benchmarks.Path
    monkeypatch.setattr(
        benchmarks, "Path", lambda path: cpuinfo if path == "/proc/cpuinfo" else real(path)
    )
    assert benchmarks.processor() == name


def test_what_programs_say():
    assert benchmarks._said("printf", "one\\ntwo") == "one"
    assert benchmarks._said("false") is None and benchmarks._said("no-such-program") is None
