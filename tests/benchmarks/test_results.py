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


def test_a_call_that_is_cut_off_loses_only_the_rest(tmp_path, monkeypatch):
    """On a GPU: what it did not come to stays, and every row says which sources it timed."""
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmarks, "ON_GPU", True)
    monkeypatch.setattr(benchmarks, "_show", lambda *args: None)
    monkeypatch.setattr(benchmarks, "machine", lambda: {"gpu": "A GPU", "commit": "def"})
    monkeypatch.setattr(benchmarks, "machine_name", lambda: "a-gpu")
    old = {"first": {"ours": {**ROW, "commit": "abc"}}, "second": {"ours": {**ROW, "commit": "abc"}}}
    before = {"machine": {"commit": "abc"}, "benchmarks": {"of one call": {"tables": old}}}
    path = tmp_path / "a-gpu.json"
    path.write_text(json.dumps(before))
    for _ in range(2):
        benchmarks.record("of one call", "first", {"ours": {**ROW, "ms": 1.0}})
    written = json.loads(path.read_text())
    assert written["machine"]["commit"] == "abc to def"
    tables = written["benchmarks"]["of one call"]["tables"]
    assert tables["first"] == {"ours": {**ROW, "ms": 1.0, "commit": "def"}}
    assert tables["second"] == old["second"]


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
    cpuinfo.write_text(
        f"processor\t: 0\n{text}power management:\n\nprocessor\t: 1\nmodel name\t: another\n\n"
    )
    real = benchmarks.Path
    monkeypatch.setattr(
        benchmarks, "Path", lambda path: cpuinfo if path == "/proc/cpuinfo" else real(path)
    )
    assert benchmarks.processor() == name


def test_what_programs_say():
    assert benchmarks._said("printf", "one\\ntwo") == "one"
    assert benchmarks._said("false") is None and benchmarks._said("no-such-program") is None
