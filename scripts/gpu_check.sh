#!/usr/bin/env bash
# Everything that only a GPU can show, in under ten minutes, on a bare machine with CUDA, torch and no network: builds in
# place, runs the tests that need a GPU, compute-sanitizer on short programs, and the benchmarks of the GPU.
#
#     scripts/gpu_check.sh [FOLDER]        # logs, results and figures; build/gpu_check without
#
# PYTHON (python3) the interpreter with torch; KINML_CUDA_ARCHS otherwise the architecture of the first GPU alone; MAX_JOBS.
# Each part has a time limit, and the next one runs whatever came of it; exit status 1 if any failed. The last lines are a
# summary. It needs nvcc, g++, cmake and setuptools; ninja and pybind11 may be missing, and so may what only some tests import.
# Package and C++ programs share their objects, in build/gpu_check_cmake.
set -uo pipefail
exec </dev/null

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
out=${1:-$root/build/gpu_check}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
python=${PYTHON:-python3}
jobs=${MAX_JOBS:-$(nproc)}
deadline=570 # seconds for everything
export MAX_JOBS=$jobs PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 KINML_CUDA=1
export KINML_NEED_GPU=1 # a test that finds no GPU fails
export KINML_BUILD_DIR=$root/build/gpu_check_cmake
log=$out/log.txt
: >"$log"
summary=()
failed=0

say() { printf '%s\n' "$@" | tee -a "$log"; }

note() { # result, seconds, name, rest
  summary+=("$(printf '%-8s %4d s  %s' "$1" "$2" "$3")${4:+: $4}")
}

# run NAME LIMIT COMMAND...: the end of its output on a failure, all of it in the log.
run() {
  local name=$1 limit=$2 started=$SECONDS status rest part=$out/part.txt
  shift 2
  rest=$((deadline - SECONDS))
  if ((rest < 5)); then
    note skipped 0 "$name" "no time left"
    failed=1
    return 1
  fi
  ((limit <= rest)) || limit=$rest
  say "" "=== $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >"$part" 2>&1
  status=$?
  cat "$part" >>"$log"
  # The line that counts: pytest's, ctest's, the programs' own, compute-sanitizer's.
  local last
  last=$(grep -aE '[0-9]+ (passed|failed)|tests passed|ERROR SUMMARY|RACECHECK SUMMARY|^skipped' "$part" | tail -n 2 | tr '\n' ' ')
  case $status in
    0) tail -n "${show:-3}" "$part" && note passed $((SECONDS - started)) "$name" "$last" ;;
    77) note skipped $((SECONDS - started)) "$name" "$last" && failed=1 ;; # no GPU
    124 | 137) tail -n 30 "$part" && note TIMEOUT $((SECONDS - started)) "$name" "$last" && failed=1 ;;
    *) tail -n 60 "$part" && note FAILED $((SECONDS - started)) "$name" "$last" && failed=1 ;;
  esac
  rm -f "$part"
  return "$status"
}

skip() { # name, why
  say "" "=== $1: skipped, $2"
  note skipped 0 "$1" "$2"
}

find_tool() { # of the CUDA toolkit
  command -v "$1" && return
  local home folder
  home=${CUDA_HOME:-${CUDA_PATH:-/usr/local/cuda}}
  for folder in "$home/bin" "$home/compute-sanitizer"; do
    [[ -x $folder/$1 ]] && printf '%s\n' "$folder/$1" && return
  done
  return 1
}

finish() {
  say "" "=== Summary ($SECONDS s, $(date -u +%Y-%m-%dT%H:%MZ), $(git log -1 --format=%h 2>/dev/null || echo 'no git'))"
  printf '%s\n' "${summary[@]}" | tee -a "$log" | tee "$out/summary.txt"
  exit "$failed"
}

# ---- the machine --------------------------------------------------------------------------------

say "=== machine"
nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total --format=csv,noheader 2>&1 | tee -a "$log"
gpu=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
if [[ ! $gpu =~ ^[0-9]+$ ]]; then
  note FAILED 0 machine "nvidia-smi finds no GPU"
  failed=1
fi
export KINML_CUDA_ARCHS=${KINML_CUDA_ARCHS:-${gpu:-90}}
if ! "$python" - <<'END' 2>&1 | tee -a "$log"; then
import importlib.util
import sys

import torch

print(f"python {sys.version.split()[0]}, torch {torch.__version__}, CUDA of torch {torch.version.cuda}", end=", ")
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "torch sees no GPU")
names = "setuptools numpy scipy h5py yaml rich pytest pytest_benchmark hypothesis ninja pybind11 ase pydantic aevmod"
missing = [name for name in names.split() if importlib.util.find_spec(name) is None]
print("missing:", " ".join(missing) or "nothing")
END
  note FAILED 0 machine "no torch"
  failed=1
fi

# ---- build --------------------------------------------------------------------------------------

run "build of the package for sm_${KINML_CUDA_ARCHS//[;,]/, sm_}" 240 "$python" setup.py build_ext --inplace
show=20 run "kinml-fast info" 60 "$python" -m kinml_fast.cli info

programs=()
targets=() # only what runs on the GPU, and what that needs
for file in tests/cpp/test_cuda_*.cpp; do targets+=("$(basename "$file" .cpp)_gpu"); done
if command -v cmake >/dev/null; then
  run "C++ programs: build" 240 cmake --build "$KINML_BUILD_DIR" --parallel "$jobs" --target "${targets[@]}" &&
    for target in "${targets[@]}"; do programs+=("$KINML_BUILD_DIR/tests/cpp/$target"); done
else
  skip "C++ programs" "there is no cmake in PATH"
fi

# ---- tests --------------------------------------------------------------------------------------

export OMP_NUM_THREADS=2
for program in ${programs[@]+"${programs[@]}"}; do
  # As a program of the host sees its results when a launcher returns.
  run "${program##*/}" 60 env CUDA_LAUNCH_BLOCKING=1 "$program"
done
unset OMP_NUM_THREADS

has() { "$python" -c "import $1" 2>/dev/null; }

files=()
if has pytest; then
  # Files with tests on a GPU; without those that import what is not here.
  while IFS= read -r file; do files+=("$file"); done < <("$python" - 2>>"$log" <<'END'
import importlib
import pathlib
import re
import sys

sys.path[:0] = ["tests", "benchmarks", "scripts"]
for path in sorted(pathlib.Path("tests").glob("test_*.py")):
    if not re.search(r"\bdevice\b|mark\.cuda\b", path.read_text(encoding="utf-8")):
        continue
    try:
        importlib.import_module(path.stem)
    except BaseException as error:  # pytest's skip of a module is one
        print(f"left out: {path} ({error})", file=sys.stderr)
    else:
        print(path)
END
  )
  grep -a '^left out' "$log"
  if ((${#files[@]})); then
    run "pytest -m cuda" 200 "$python" -m pytest -m cuda -p no:cacheprovider -q -rs --durations=5 "${files[@]}"
  else
    skip "pytest -m cuda" "no file with tests on a GPU can be imported"
  fi
else
  skip "pytest -m cuda" "there is no pytest"
fi

# ---- compute-sanitizer --------------------------------------------------------------------------

if sanitizer=$(find_tool compute-sanitizer); then
  check=("$sanitizer" --error-exitcode 9 --print-limit 5)
  for tool in memcheck racecheck synccheck; do
    for program in ${programs[@]+"${programs[@]}"}; do
      run "$tool: ${program##*/}" 60 env CUDA_LAUNCH_BLOCKING=1 KINML_SHORT_TESTS=1 "${check[@]}" --tool "$tool" "$program"
    done
  done
  # initcheck knows only what cudaMalloc gives, so it looks at the ops of torch, each tensor an allocation of its own.
  if ((${#files[@]})); then
    run "initcheck: test_ops_adam" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${check[@]}" --tool initcheck \
      "$python" -m pytest -m cuda -p no:cacheprovider -q -x tests/test_ops_adam.py tests/test_cuda.py -k "numbers_of_the_processor or same_bits"
  fi
else
  skip "compute-sanitizer" "the toolkit has none"
fi

# ---- benchmarks ---------------------------------------------------------------------------------

if has pytest_benchmark; then
  json=$out/gpu-$(date -u +%Y%m%d%H%M).json
  run "benchmarks" 180 "$python" -m pytest -p no:cacheprovider -q benchmarks/bench_gpu.py --benchmark-json="$json"
else
  skip "benchmarks" "there is no pytest-benchmark"
fi

finish
