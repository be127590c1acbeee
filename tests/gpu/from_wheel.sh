#!/usr/bin/env bash
# The GPU tests of a wheel that was built elsewhere, with the torch, Triton and pytest of python3 (or of $PYTHON) and
# without a network:
#   tests/gpu/from_wheel.sh dist/lowrank_ops-*.whl [SECONDS]
# The CUDA kernels come first, then the Triton kernels, which have to be compiled: where pytest-xdist is there, in
# several processes, and where pytest-timeout is there, for 90 seconds a test at most. Memcheck and racecheck of a small
# set of the CUDA kernels come last, where the toolkit's compute-sanitizer is there.
#
# SECONDS, 470 unless given, is what all of it may take. A step that would reach into the time kept for those after it
# is cut; the last lines say of each step how it ended. The exit code is 0 if all were run to their end and passed.
set -uo pipefail
tests=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(realpath "$1")
python=$(command -v "${PYTHON:-python3}")
[[ $python == /* ]] || python=$PWD/$python  # without following links, which lead out of a virtual environment
budget=${2:-470}
SECONDS=0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

status=0
summary=()
# By which second it has to have ended, name, command: what fails or hangs does not keep the rest from being run.
step() {
  local until=$1 name=$2 begin=$SECONDS code=124 outcome all
  shift 2
  local grace=$((1 + budget / 100))  # pytest, interrupted, tells what it has; then it is killed
  local left=$((until - begin - grace))
  : > "$work/log"
  if ((left > 0)); then
    echo "=== $name, for at most $left s"
    timeout --signal=INT --kill-after="$grace" "$left" "$@" 2>&1 | tee "$work/log"
    code=${PIPESTATUS[0]}
  fi
  outcome=$(grep -aE '[0-9]+ (passed|failed|error|skipped|deselected)' "$work/log" | tail -1 | tr -d '=')
  case $code in
    0) [[ $outcome == *" passed"* ]] || { code=5 outcome="NOTHING PASSED: $outcome"; } ;;
    5) outcome="NOTHING RAN: $outcome" ;;
    124 | 137)
      # Of each test that ended -vv wrote a line, in one of two forms, for one process and for several.
      all=$(grep -aoE 'collected [0-9]+|\[[0-9]+ items\]' "$work/log" | grep -oE '[0-9]+' | tail -1)
      outcome="CUT: of ${all:-the} tests $(
        grep -acE '::.* (PASSED|FAILED|ERROR|SKIPPED)|^\[gw[0-9]+\] \[' "$work/log") ended, the rest did not run"
      ;;
    *) outcome="FAILED with exit code $code: $outcome" ;;
  esac
  ((code == 0)) || status=1
  summary+=("$(printf '%-17s %4d s  %s' "$name" $((SECONDS - begin)) "$outcome")")
}

set -e
# Into a folder rather than a virtual environment, which would not see the packages of the one that python may lie in.
"$python" -m pip install --quiet --no-index --no-deps --target "$work/site" "$wheel"
cp -r "$tests" "$work/tests"  # away from the sources, so that what is tested is what was installed
cp "$tests/../pyproject.toml" "$work"
cd "$work"
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
"$python" -c "import pytest, lowrank_ops; print('=== testing', lowrank_ops.__file__)"
set +e

# A test that hangs says where; -vv, over the -q of pyproject.toml, says which one, should the process be killed.
pytest=("$python" -m pytest -vv -o faulthandler_timeout=60 -m gpu)
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")

if "$python" -c "import pytest_timeout" 2> /dev/null; then
  pytest+=(--timeout 90 --timeout-method thread)  # kernels that hang cannot be interrupted, but their process can end
fi
several=("${pytest[@]}")
if "$python" -c "import xdist" 2> /dev/null; then
  several+=(-n $((($(nproc) + 1) / 2)) --maxprocesses 8)  # of which each has a CUDA context
fi

step $((budget * 40 / 100)) "CUDA kernels" "${several[@]}" tests/gpu -k "cuda and not sanitized"
step $((budget * 60 / 100)) "Triton covariance" "${several[@]}" tests/gpu/test_covariance_gpu.py -k "not cuda"
step $((budget * 80 / 100)) "Triton linear" "${several[@]}" tests/gpu/test_lowrank_linear_gpu.py -k "not cuda"
until=$(((SECONDS + budget) / 2))
for check in memcheck racecheck; do
  if [ -x "$sanitizer" ]; then
    step "$until" "$check" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      "$sanitizer" --tool "$check" --error-exitcode 1 "${pytest[@]}" tests/gpu -k sanitized
  else
    summary+=("$(printf '%-17s    -    not run: no compute-sanitizer here' "$check")")
  fi
  until=$budget
done

echo "=== in $SECONDS s of $budget:"
printf '%s\n' "${summary[@]}"
exit "$status"
