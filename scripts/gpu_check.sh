#!/usr/bin/env bash
# Builds, tests, sanitizes and benchmarks on a machine with a GPU, in one call.
#
#   scripts/gpu_check.sh [STAGE ...]
#
# Stages: device build test memcheck racecheck initcheck synccheck bench; without any, all of them.
# Every stage has a time limit of its own, and what fails does not keep the others from running. A
# table of the stages comes last; the exit status is 1 where one failed. Two calls in less than twelve
# minutes together, with a wheel:
#
#   WHEEL=... scripts/gpu_check.sh device build test memcheck racecheck
#   WHEEL=... scripts/gpu_check.sh build bench
#
#   PYTHON                python3    with torch, pytest, pytest-benchmark, and for a build pybind11, cmake, ninja
#   WHEEL                 unset      a wheel built elsewhere, which is installed instead of a build:
#                                    QUIETSTAR_CUDA=on QUIETSTAR_CUDA_ARCHS=sm_90 python3.12 -m pip wheel --no-deps .
#   TEST_PROCESSES        8          of the tests, where pytest-xdist is installed
#   QUIETSTAR_CUDA_ARCHS  the GPU's own
#   TIME_LIMIT            570        seconds for everything; for stages that are named 270, with bench 430
#   OUT                   unset      a folder that gets logs, the table and the results, too
#
# Needs no network. Results: benchmarks/results/<gpu>.json.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"

python=${PYTHON:-python3}
if ((!$#)); then limit=570; elif [[ " $* " == *" bench "* ]]; then limit=430; else limit=270; fi
deadline=$((SECONDS + ${TIME_LIMIT:-$limit}))
logs=${OUT:-$root/build/gpu_check}
mkdir -p "$logs"
rm -f "$logs"/{device,build,test,sanitize,bench}.log "$logs"/stages.txt "$logs"/*.json
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# cmake and ninja of this Python, and compute-sanitizer where the CUDA toolkit keeps it.
scripts_folder=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
PATH="$scripts_folder:$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export PATH

all=(device build test memcheck racecheck initcheck synccheck bench)
stages=("$@")
((${#stages[@]})) || stages=("${all[@]}")
for stage in "${stages[@]}"; do
  if [[ " ${all[*]} " != *" $stage "* ]]; then
    echo "there is no stage $stage; expected some of: ${all[*]}" >&2
    exit 2
  fi
done
wants() { [[ " ${stages[*]} " == *" $1 "* ]]; }

table=()
failed=0
# stage NAME SECONDS LOG FUNCTION: runs a function in a shell of its own. What it writes to the file
# $note becomes the remark in the table.
stage() {
  local name=$1 limit=$2 log=$logs/$3.log run=$4 begin=$SECONDS status word
  local left=$((deadline - SECONDS))
  ((limit > left)) && limit=$left
  if ((limit < 5)); then
    table+=("$(printf '%-32s %-9s %5s' "$name" "no time" -)")
    failed=1
    return 1
  fi
  note=$(mktemp)
  export note
  printf '\n==== %s (at most %s s)\n' "$name" "$limit" | tee -a "$log"
  # An interrupt, so that pytest still says what has failed so far.
  timeout --signal=INT --kill-after=15 "$limit" bash -c "set -uo pipefail; $run" 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  case $status in
    0) word=ok ;;
    124 | 137) word="time out" ;;
    *) word="failed $status" ;;
  esac
  ((status == 0)) || failed=1
  table+=("$(printf '%-32s %-9s %4ss  %s' "$name" "$word" $((SECONDS - begin)) "$(tail -n 1 "$note")")")
  rm -f "$note"
  return "$status"
}

export root python
# pytest without the repository's root on sys.path, where the source folder would hide the package.
check_pytest() { "$python" -P -m pytest -p no:cacheprovider "$@"; }
export -f check_pytest

check_device() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader || return
  nvcc --version | tail -n 2
  "$python" -c 'import platform, torch; print("Python", platform.python_version(), "torch",
    torch.__version__, "CUDA", torch.version.cuda); assert torch.cuda.is_available()' || return
  nvidia-smi --query-gpu=name --format=csv,noheader >"$note"
}

architecture() {
  local found
  found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
  echo "sm_${found:-90}"
}
export QUIETSTAR_CUDA=${QUIETSTAR_CUDA:-on}
export QUIETSTAR_CUDA_ARCHS=${QUIETSTAR_CUDA_ARCHS:-$(architecture)}

# Where the package cannot be installed, its module is built in place, and the package used from here.
in_place=$root/build/gpu_check_in_place
mkdir -p "$root/build"
check_build() {
  rm -f "$in_place"
  if [[ -n ${WHEEL:-} ]]; then
    "$python" -m pip install --no-deps --no-index --force-reinstall "$WHEEL" || return
    check_kernels
    return
  fi
  "$python" -m pip install --no-build-isolation --no-deps --no-index . || {
    echo "pip failed; building in place"
    cmake -G Ninja -S . -B build/gpu -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(which "$python")" \
      -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
      -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$root/quietstar_ext" \
      -DQUIETSTAR_CUDA="$QUIETSTAR_CUDA" -DQUIETSTAR_CUDA_ARCHS="$QUIETSTAR_CUDA_ARCHS" &&
      cmake --build build/gpu --target _native && touch "$in_place"
  } || return
  use_in_place
  check_kernels
}
check_kernels() {
  cd / && "$python" -c 'import quietstar_ext; info = quietstar_ext.build_info(); print(info)
if not info.get("cuda_archs"): raise SystemExit("the package has no CUDA kernels")' || return
  echo "$QUIETSTAR_CUDA_ARCHS$([[ -e $in_place ]] && echo ', in place')${WHEEL:+, ${WHEEL##*/}}" >"$note"
}
use_in_place() {
  [[ ! -e $in_place ]] || export PYTHONPATH="$root:$root/python${PYTHONPATH:+:$PYTHONPATH}"
}

# Names of what has a mark in a folder, as pytest collects it: a test may have its mark from a fixture,
# which no search of the text would find. Fails where a file cannot be collected.
collected() {
  local found status
  found=$(check_pytest -q --collect-only -m "$1" "$2")
  status=$?
  grep '::' <<<"$found"
  ((status == 0)) || { tail -n 30 <<<"$found" >&2; return 1; }
}

# All tests with the mark, and no fewer: what could not be collected or did not end is a failure, too.
check_tests() {
  local expected ran status report=$note.xml side_by_side=()
  if "$python" -c 'import xdist' 2>/dev/null; then side_by_side=(-n "${TEST_PROCESSES:-8}"); fi
  expected=$(collected gpu tests)
  status=$?
  expected=$(wc -l <<<"$expected")
  check_pytest -q -m gpu "${side_by_side[@]}" --durations=5 --continue-on-collection-errors --junitxml="$report" tests |
    tee -i "$note"
  ((PIPESTATUS[0] == 0)) || status=1
  ran=$("$python" - "$report" <<'PYTHON'
import sys, xml.etree.ElementTree as tree
cases = [c for c in tree.parse(sys.argv[1]).iter("testcase") if c.find("skipped") is None]
print(len({(c.get("classname"), c.get("name")) for c in cases}))
PYTHON
  )
  rm -f "$report"
  echo "$(tail -n 1 "$note"); ${ran:-0} of $expected ran" | tee -a "$note"
  # A few need more than one GPU, or a dtype that the device lacks.
  ((${ran:-0} * 20 >= expected * 19)) && return "$status"
}

# Errors count where a report names a kernel of ours; the libraries' own are counted apart.
check_sanitizer() {
  local tool=$1 out all_errors status only=() calls=()
  # racecheck does not survive the kernels of some libraries, watched or not.
  [[ $tool == racecheck ]] && only=(--kernel-regex kns=quietstar) calls=(--without-libraries)
  out=$(mktemp)
  # Without PyTorch's pool every tensor has an allocation of its own, with its own bounds.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" "${only[@]}" --print-limit 30 \
    "$python" -P scripts/small_calls.py "${calls[@]}" 2>&1 | tee -i "$out"
  status=${PIPESTATUS[0]}
  all_errors=$(sed -nE 's/.*(ERROR|RACECHECK) SUMMARY: ([0-9]+) .*/\2/p' "$out" | tail -n 1)
  local ours
  ours=$(grep -cE '^=========.*quietstar::' "$out")
  echo "${all_errors:-no summary:} errors, $ours lines name our kernels" >"$note"
  rm -f "$out"
  ((status == 0)) && [[ -n $all_errors ]] && ((ours == 0))
}

check_bench() {
  check_pytest -q -s --benchmark-disable "benchmarks/bench_$1.py" | tee -i "$note.log"
  local status=${PIPESTATUS[0]}
  tail -n 1 "$note.log" >"$note"
  rm -f "$note.log"
  return "$status"
}
export -f check_device check_build check_kernels use_in_place collected check_tests check_sanitizer check_bench
export WHEEL=${WHEEL:-} in_place QUIETSTAR_CUDA QUIETSTAR_CUDA_ARCHS logs

touch "$logs/begin"
wants device && stage device 30 device check_device
wants build && stage build 240 build check_build
use_in_place
wants test && stage "test -m gpu" 150 test check_tests
for tool in memcheck racecheck initcheck synccheck; do
  wants "$tool" && stage "sanitizer $tool" 80 sanitize "check_sanitizer $tool"
done
if wants bench; then
  # What was not measured yet first, with its limit in seconds; then whatever else can run on a device. Every
  # row or table is written when it is measured, so that a limit costs only the rest.
  limits=(gpu_generation:80 gpu_step:150 attention_paths:80 linear_cross_entropy:40
    linear_sample:20 mixing_head:20 thought_attention:30 sample_tokens:30)
  for name in $(collected device benchmarks | sed 's/::.*//; s/.*bench_//; s/\.py//' | sort -u); do
    [[ " ${limits[*]} " == *" $name:"* ]] || limits+=("$name:30")
  done
  for entry in "${limits[@]}"; do
    name=${entry%:*}
    [[ -e benchmarks/bench_$name.py ]] || { echo "there is no benchmark $name" >&2; failed=1; continue; }
    stage "bench $name" "${entry#*:}" bench "check_bench $name"
  done
fi

printf '%s\n' "${table[@]}" >"$logs/stages.txt"
# The stages go into the results that the benchmarks wrote, beside their figures.
"$python" - "$logs" <<'PYTHON'
import json, shutil, sys
from datetime import datetime, timezone
from pathlib import Path

logs = Path(sys.argv[1])
begin = (logs / "begin").stat().st_mtime
for path in Path("benchmarks/results").glob("*.json"):
    if path.stat().st_mtime >= begin:
        content = json.loads(path.read_text())
        content["checks"] = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": (logs / "device.log").read_text().split("\n")[2:] if (logs / "device.log").exists() else [],
            "stages": (logs / "stages.txt").read_text().splitlines(),
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        shutil.copy(path, logs)
        print(f"results: {path}")
PYTHON
rm -f "$logs/begin"
printf '\n%s\n' "---- stages, $SECONDS s"
cat "$logs/stages.txt"
exit "$failed"
