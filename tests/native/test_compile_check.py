"""scripts/compile_check.py: what it reads of the compiler's report, and the kernels themselves."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import quietstar_ext

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compile_check.py"

# A report as ptxas 13.0 writes it, of two kernels and two architectures.
REPORT = """
ptxas info    : 818 bytes gmem, 72 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN9quietstar4cuda3rowILi32EEEvPfi' for 'sm_80'
ptxas info    : Function properties for _ZN9quietstar4cuda6helperEv
    64 bytes stack frame, 12 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for _ZN9quietstar4cuda3rowILi32EEEvPfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 1024 bytes smem, 600 bytes cmem[0]
ptxas info    : Compile time = 28.256 ms
ptxas info    : Compiling entry function '_ZN9quietstar4cuda3rowILi32EEEvPfi' for 'sm_90'
ptxas info    : Function properties for _ZN9quietstar4cuda3rowILi32EEEvPfi
    136 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 136 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z5plainPf' for 'sm_90'
ptxas info    : Function properties for _Z5plainPf
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""

# 64 sums of products that are all wanted at the end, in 64 registers a thread.
SPILLING = """
__global__ void __launch_bounds__(1024) many_sums(float* out, const float* in, int count) {
  float sums[64] = {};
  for (int n = 0; n < count; ++n) {
    float x[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i] = in[n * 64 + i] * in[n + i];
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[i] += x[i] * x[63 - i];
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) out[threadIdx.x * 64 + i] = sums[i];
}
"""


# Two kernels as PTX: a pack that was taken apart, in shared and in global memory, and one that was not,
# beside elements that lie apart.
PTX = """
.visible .entry _Z6narrowPt(
.param .u64 .ptr _Z6narrowPt_param_0
)
{
	ld.shared.u16 	%rs1, [%r1];
	ld.shared.u16 	%rs2, [%r1+2];
	st.global.u16 	[%rd4], %rs1;
	st.global.u16 	[%rd4+2], %rs2;
	@%p1 st.global.v2.f32 	[%rd5+-8], {%f1, %f2};
	st.global.f32 	[%rd5], %f1;
	ret;
}
.visible .entry _Z4widePt(
)
{
	ld.shared.f32 	%f1, [_Z4scratch];
	ld.shared.f32 	%f2, [_Z4scratch+4];
	ld.shared.v4.u32 	{%r1, %r2, %r3, %r4}, [%r9];
	st.global.v4.u32 [%rd1], {%r1, %r2, %r3, %r4};
	st.global.v4.u32 [%rd1+16], {%r1, %r2, %r3, %r4};
	st.global.u16 	[%rd1+32], %rs1;
	st.global.u16 	[%rd1+544], %rs1;
	st.global.u16 	[%rd2+34], %rs1;
}
"""


# A loop as cuobjdump prints it, whose usual round leaves out the four instructions behind a branch, and
# another one with less of the same operation.
SASS = """
		Function : _Z4loopPf
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED"
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x00000a00ff017b82 */
                                                                     /* 0x000fe20000000800 */
        /*0010*/                   MUFU.EX2 R2, R1 ;                 /* 0x00000a00ff017b82 */
        /*0020*/              @!P1 BRA 0x10 ;                        /* 0x00000a00ff017b82 */
        /*0030*/               @P0 BRA 0x80 ;                        /* 0x00000a00ff017b82 */
        /*0040*/                   LDG.E R3, desc[UR4][R2.64] ;      /* 0x00000a00ff017b82 */
        /*0050*/                   LDG.E R3, desc[UR4][R2.64] ;      /* 0x00000a00ff017b82 */
        /*0060*/                   LDG.E R3, desc[UR4][R2.64] ;      /* 0x00000a00ff017b82 */
        /*0070*/                   LDG.E R3, desc[UR4][R2.64] ;      /* 0x00000a00ff017b82 */
        /*0080*/                   MUFU.EX2 R3, R3 ;                 /* 0x00000a00ff017b82 */
        /*0090*/              @!P0 MUFU.EX2 R3, R3 ;                 /* 0x00000a00ff017b82 */
        /*00a0*/                   BRA.DIV UR8, 0xc0 ;               /* 0x00000a00ff017b82 */
        /*00b0*/               @P0 BRA 0x30 ;                        /* 0x00000a00ff017b82 */
        /*00c0*/                   EXIT ;                            /* 0x00000a00ff017b82 */
        /*00d0*/                   BRA 0xd0;                         /* 0x00000a00ff017b82 */
		Function : _Z5plainPf
        /*0000*/                   MUFU.EX2 R2, R1 ;                 /* 0x00000a00ff017b82 */
        /*0010*/                   EXIT ;                            /* 0x00000a00ff017b82 */
"""


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compile_check"] = module  # dataclasses look it up there
    sys.path.insert(0, str(SCRIPT.parent))  # for the scripts that it imports
    spec.loader.exec_module(module)
    return module


def need_nvcc(check: ModuleType) -> None:
    if check.find_nvcc() is None:
        pytest.skip("compile check of the CUDA kernels skipped: nvcc was not found")


def test_reads_registers_spills_and_shared_memory(check) -> None:
    row80, row90, plain = check.parse(REPORT)
    assert vars(row80) == {
        "name": "_ZN9quietstar4cuda3rowILi32EEEvPfi",
        "arch": "sm_80",
        "registers": 48,
        "spills": 0,  # the helper's are reported apart
        "stack": 0,
        "shared": 1024,
    }
    assert (row90.registers, row90.spills, row90.stack, row90.shared) == (255, 24, 136, 0)
    assert (plain.name, plain.registers, plain.stack) == ("_Z5plainPf", 8, 16)
    shown = check.table([row80, row90, plain], ["sm_80", "sm_90"]).splitlines()
    assert shown[2].split()[1:] == ["1024", "48", "255", "spills", "24"]
    assert shown[1].split()[1:] == ["0", "8", "stack", "16"]


def test_a_report_that_it_cannot_read_is_an_error(check) -> None:
    with pytest.raises(RuntimeError, match="cannot read what ptxas says of _Z5plainPf"):
        check.parse(REPORT.replace("Used 8 registers", "Used up"))


def test_names_are_short(check) -> None:
    names = ["_ZN9quietstar4cuda3rowILi32EEEvPfi", "_Z5plainPf"]
    assert check.readable(names) == {names[0]: "row<32>", names[1]: "plain"}
    full = "void ns::(anonymous namespace)::row<ns::Half, (int)64, (ns::Kind)1, false>(float*, (int)2)"
    assert sys.modules["kernel_reports"].short_name(full) == "row<Half, 64, 1, false>"


def test_finds_spills_and_patterns_without_a_kernel(check) -> None:
    kernels = check.parse(REPORT)
    assert check.faults(kernels, ["*row*", "_Z5plain*"]) == [
        "_ZN9quietstar4cuda3rowILi32EEEvPfi spills 24 bytes on sm_90 (255 registers)"
    ]
    assert check.faults(kernels, ["_Z5plain*", "gone_*"]) == [
        "no kernel is called gone_*; NO_SPILLS should follow its new name"
    ]


def test_known_spills_are_of_one_architecture(check) -> None:
    kernel = check.Kernel("softmax_cross_entropy_rows_plain<Float16, true>", "sm_120", 64, 24, 0, 768)
    pattern = ("softmax_cross_entropy_rows*",)
    assert check.faults([kernel], pattern) == []
    for change in ({"spills": 28}, {"arch": "sm_90"}, {"name": "softmax_cross_entropy_rows<float>"}):
        assert len(check.faults([dataclasses.replace(kernel, **change)], pattern)) == 1


def test_finds_packs_that_are_taken_apart(check) -> None:
    found = check.accesses(PTX)
    assert [len(found[name]) for name in ("_Z6narrowPt", "_Z4widePt")] == [6, 8]
    apart = check.taken_apart(found["_Z6narrowPt"])
    assert [(a.what, a.width, a.base, a.offset) for a in apart] == [
        ("ld.shared", 2, "%r1", 0),
        ("st.global", 2, "%rd4", 0),
        ("st.global", 8, "%rd5", -8),
    ]
    assert check.taken_apart(found["_Z4widePt"]) == []


# Eight neighbours, stored two bytes at a time.
NARROW = """
__global__ void narrow(unsigned short* out) {
#pragma unroll
  for (int i = 0; i < 8; ++i) out[threadIdx.x * 8 + i] = i;
}
"""


def test_a_kernel_whose_packs_are_taken_apart_fails(check, tmp_path, monkeypatch, capsys) -> None:
    need_nvcc(check)
    source = tmp_path / "narrow.cu"
    source.write_text(NARROW)
    monkeypatch.setattr(check, "WIDE", {"narrow.cu": ("narrow", "gone")})
    assert check.main([str(source), "--archs", "sm_80"]) == 1
    shown = capsys.readouterr().out
    assert "narrow takes packs apart: 7 accesses like st.global of 2 bytes" in shown
    assert "no kernel of narrow.cu is called gone; WIDE should follow its name" in shown
    monkeypatch.setattr(check, "WIDE", {"other.cu": ("narrow",)})
    assert check.main([str(source), "--archs", "sm_80"]) == 0
    assert "no packs taken apart where none may be" in capsys.readouterr().out


def test_finds_a_disassembler_in_a_package(check, monkeypatch, tmp_path) -> None:
    """Which needs the other program beside it."""
    machine_code, empty = sys.modules["machine_code"], tmp_path / "empty"
    tools = tmp_path / "nvidia" / "cu13" / "bin"
    for folder in (empty, tools):
        folder.mkdir(parents=True)
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.setattr(
        machine_code,
        "find_spec",
        lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path / name)]),
    )
    for name in ("cuobjdump", "nvdisasm"):
        assert check.find_cuobjdump(str(empty / "nvcc")) is None
        (tools / name).write_text("#!/bin/sh\n")
        (tools / name).chmod(0o755)
    assert check.find_cuobjdump(str(empty / "nvcc")) == str(tools / "cuobjdump")


def test_counts_the_usual_round_of_a_loop(check) -> None:
    code = check.instructions(SASS)
    assert {name: len(lines) for name, lines in code.items()} == {"_Z4loopPf": 14, "_Z5plainPf": 2}
    # 80 90 a0 b0 30, and not the shorter loop at 10
    assert check.round_of_loop(code["_Z4loopPf"], "MUFU.EX2") == 5
    assert check.round_of_loop(code["_Z4loopPf"], "LDG.E") == 9
    assert check.round_of_loop(code["_Z4loopPf"], "HMMA") is None
    assert check.round_of_loop(code["_Z5plainPf"], "MUFU.EX2") is None


# A round of six instructions that loads twice, for soon and for at once.
AHEAD = """
		Function : _Z5aheadPf
        /*0000*/                   LDG.E.128 R8, desc[UR4][R2.64] ;  /* 0x00000a00ff017b82 */
        /*0010*/                   MUFU.EX2 R3, R4 ;                 /* 0x00000a00ff017b82 */
        /*0020*/                   MUFU.EX2 R3, R5 ;                 /* 0x00000a00ff017b82 */
        /*0030*/                   LDG.E R7, desc[UR4][R2.64] ;      /* 0x00000a00ff017b82 */
        /*0040*/                   FADD R4, R7, R11 ;                /* 0x00000a00ff017b82 */
        /*0050*/               @P0 BRA 0x0 ;                         /* 0x00000a00ff017b82 */
        /*0060*/                   EXIT ;                            /* 0x00000a00ff017b82 */
"""


def test_counts_how_far_ahead_a_loop_loads(check, monkeypatch, tmp_path) -> None:
    (code,) = check.instructions(AHEAD).values()
    assert check.loads_ahead(code, "MUFU.EX2", "LDG.E.128") == 3  # instructions between
    assert check.loads_ahead(code, "MUFU.EX2", "LDG.E") == 0
    assert check.loads_ahead(code, "MUFU.EX2", "LDS") is None
    monkeypatch.setattr(check, "sass_of", lambda *arguments: AHEAD)
    monkeypatch.setattr(check, "LOOPS", {"loop.cu": {"*ahead*": ("MUFU.EX2", 6)}})
    for least, faults in ((3, 0), (4, 1)):
        limit = {"loop.cu": {"*ahead*": ("MUFU.EX2", "LDG.E.128", least)}}
        monkeypatch.setattr(check, "AHEAD", limit)
        found = check.loop_faults("nvcc", "cuobjdump", [tmp_path / "loop.cu"])
        assert len(found) == faults
    assert "waits for a LDG.E.128 3 instructions after it; expected 4 or more" in found[0]


def test_a_loop_that_is_too_long_fails(check, tmp_path, monkeypatch, capsys) -> None:
    source = tmp_path / "loop.cu"
    monkeypatch.setattr(check, "sass_of", lambda *arguments: SASS)
    limits = {"*loop*": ("MUFU.EX2", 4), "*plain*": ("MUFU.EX2", 4), "gone": ("HMMA", 4)}
    monkeypatch.setattr(check, "LOOPS", {"loop.cu": limits})
    found = check.loop_faults("nvcc", "cuobjdump", [source, tmp_path / "other.cu"])
    assert [sentence.partition(";")[0].split(" ", 1)[1] for sentence in found] == [
        "has a MUFU.EX2 loop of 5 instructions",
        "has a MUFU.EX2 loop of None instructions",
        "kernel of loop.cu is called gone",
    ]
    limits["*loop*"] = ("MUFU.EX2", 5)
    assert len(check.loop_faults("nvcc", "cuobjdump", [source])) == 2
    assert "a round of the MUFU.EX2 loop is 5 instructions, at most 5" in capsys.readouterr().out


def test_reads_the_log_of_a_build(check, monkeypatch, tmp_path) -> None:
    sources, headers = tmp_path / "csrc" / "cuda", tmp_path / "csrc" / "include"
    log = tmp_path / "build" / "temp.linux" / "build.log"
    for folder in (sources, headers, log.parent):
        folder.mkdir(parents=True)
    (sources / "row.cu").write_text("")
    monkeypatch.setattr(check, "REPOSITORY", tmp_path)
    monkeypatch.setattr(check, "SOURCES", sources)
    assert check.reports_of_build(["sm_80"]) == {}
    log.write_text(
        "-- quietstar\n[1/3] Building CXX object CMakeFiles/x.dir/csrc/cpu/row.cpp.o\nwarning: ...\n"
        f"[2/3] Building CUDA object CMakeFiles/kernels_cuda.dir/csrc/cuda/row.cu.o\n{REPORT}"
        "[3/3] Linking CXX shared module _native.so\n"
    )
    (report,) = check.reports_of_build(["sm_80", "sm_90"]).values()
    assert check.parse(report) == check.parse(REPORT)
    assert check.reports_of_build(["sm_80", "sm_100"]) == {}
    built = log.parent / "CMakeFiles" / "kernels_cuda.dir" / "csrc" / "cuda" / "row.cu.o"
    assert check.built_objects(["sm_90"]) == {}
    built.parent.mkdir(parents=True)
    built.write_bytes(b"an object")
    assert check.built_objects(["sm_90"]) == {"row.cu": built}
    assert check.built_objects(["sm_100"]) == {}
    # What was built is read, not compiled again.
    monkeypatch.setattr(check, "run_nvcc", lambda *given: pytest.fail("compiled again"))
    lists = tmp_path / "cuobjdump"
    lists.write_text('#!/bin/sh\necho "$1 $2 $3"; cat "$4"\n')
    lists.chmod(0o755)
    assert check.sass_of("nvcc", str(lists), sources / "row.cu") == "-sass -arch sm_90\nan object"
    later = log.stat().st_mtime + 5
    os.utime(sources / "row.cu", (later, later))
    assert check.reports_of_build(["sm_80"]) == {}


def test_without_nvcc_it_says_so(check, monkeypatch, capsys) -> None:
    monkeypatch.setattr(check, "find_nvcc", lambda: None)
    assert check.main([]) == 0
    assert capsys.readouterr().out == "compile check skipped: nvcc was not found\n"


def test_a_kernel_that_spills_fails(check, tmp_path, capsys) -> None:
    need_nvcc(check)
    source = tmp_path / "many_sums.cu"
    source.write_text(SPILLING)
    assert check.main([str(source), "--archs", "sm_90"]) == 1
    assert "many_sums spills" in capsys.readouterr().out
    source.write_text("__global__ void fine(float* out) { *out = 1; }")
    assert check.main([str(source), "--archs", "sm_90"]) == 0
    source.write_text("__global__ void broken(float* out) { *out = }")
    with pytest.raises(RuntimeError, match=r"(?s)many_sums\.cu does not compile:.*error"):
        check.main([str(source), "--archs", "sm_90"])


@pytest.mark.slow
@pytest.mark.timeout(1500)  # where nothing was built, everything is compiled here
def test_no_kernel_spills_that_must_not(check, capsys) -> None:
    need_nvcc(check)
    # For what this package was built, if it was: the build's log has the reports.
    built = quietstar_ext.build_info()["cuda_archs"].split(", ")
    archs = [name for name in built if name.startswith("sm_")]
    status = check.main(["--archs", ",".join(archs)] if archs else [])
    shown = capsys.readouterr().out
    with capsys.disabled():
        print(f"\n{shown}")
    assert status == 0, shown
