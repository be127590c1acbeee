#!/usr/bin/env bash
# The GPU tests of a wheel that was built elsewhere, with the torch, Triton and pytest of PYTHON and without a network:
#   tests/gpu/from_wheel.sh dist/lowrank_ops-*.whl [SECONDS [PYTHON]]
# CUDA kernels first, then Triton kernels, then a small set of CUDA kernels under compute-sanitizer where it is there.
# SECONDS, 470 unless given, is what all of it may take. The exit code is 0 if every step ended and passed some tests.
set -uo pipefail
tests=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(realpath "$1")
budget=${2:-470}
python=$(command -v "${3:-python3}")
[[ $python == /* ]] || python=$PWD/$python  # without following links, which lead out of a virtual environment
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0 summary=()

step() {  # NAME, the second by which it has to have ended, COMMAND: a step that hangs does not stop those behind it
  local name=$1 left=$(($2 - SECONDS)) code=124
  echo "=== $name, at most $left s"
  : > "$work/log"
  if ((left > 0)); then
    timeout --signal=INT --kill-after=$((budget / 50 + 1)) "$left" "${@:3}" 2>&1 | tee "$work/log"
    code=${PIPESTATUS[0]}
  fi
  local counts
  counts=$(grep -aE '[0-9]+ (passed|failed|error|skipped|deselected)' "$work/log" | tail -1 | tr -d '=')
  if [ "$code" = 0 ] && [[ $counts != *" passed"* ]]; then code=5; fi
  [ "$code" = 0 ] || status=1
  summary+=("$name: exit code $code, ${counts:-no test ended}")
}

set -e
# Into a folder rather than a virtual environment, which would not see the packages of the one that PYTHON lies in.
"$python" -m pip install --quiet --no-index --no-deps --target "$work/site" "$wheel"
cp -r "$tests" "$work/tests"  # away from the sources, so that what is tested is what was installed
cp "$tests/../pyproject.toml" "$work"
cd "$work"
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
"$python" -c "import pytest, lowrank_ops; print('=== testing', lowrank_ops.__file__)"
set +e

has() { "$python" -c "import $1" 2> /dev/null; }
pytest=("$python" -m pytest -vv -o faulthandler_timeout=60 -m gpu tests/gpu)
cuda=()  # kernels that are compiled already: a test of theirs that hangs ends well before the step
if has pytest_timeout; then pytest+=(--timeout 90 --timeout-method thread) cuda=(--timeout 45); fi
several=("${pytest[@]}")
if has xdist; then several+=(-n $((($(nproc) + 1) / 2)) --maxprocesses 8); fi  # each process has a CUDA context

step "CUDA kernels" $((budget * 40 / 100)) "${several[@]}" "${cuda[@]}" -k "cuda and not sanitized"
step "Triton kernels" $((budget * 80 / 100)) "${several[@]}" -k "not cuda"
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [ -x "$sanitizer" ]; then
  step memcheck $((budget * 90 / 100)) env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "$sanitizer" --tool memcheck --error-exitcode 1 "${pytest[@]}" -k sanitized
  step racecheck "$budget" "$sanitizer" --tool racecheck --error-exitcode 1 "${pytest[@]}" -k sanitized
else
  summary+=("memcheck, racecheck: not run, no compute-sanitizer here")
fi
echo "=== in $SECONDS s of $budget:"
printf '%s\n' "${summary[@]}"
exit "$status"
