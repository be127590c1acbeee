#!/usr/bin/env bash
# The GPU tests of a wheel that was built elsewhere, with the torch, Triton and pytest at hand and without a network:
#   tests/gpu/from_wheel.sh dist/lowrank_ops-*.whl
# The native kernels come first, then memcheck and racecheck of a small set of them where the toolkit's
# compute-sanitizer is there, then the Triton kernels, which have to be compiled.
set -euo pipefail
tests=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv --system-site-packages "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-index --no-deps --force-reinstall "$wheel"
cp -r "$tests" "$work/tests"  # away from the sources, so that what is tested is what was installed
cp "$tests/../pyproject.toml" "$work"
cd "$work"

status=0
step() {  # seconds, command: what fails or hangs does not keep the rest from being run
  timeout --kill-after=10 "$@" || { status=$?; echo "ended with $status (124: out of time): ${*:2}"; }
}
# A test that hangs says where; -vv, over the -q of pyproject.toml, says which one, should the process be killed.
pytest=(venv/bin/python -m pytest -vv -o faulthandler_timeout=100 -m gpu)

step 300 "${pytest[@]}" tests/gpu/test_native_gpu.py
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [ -x "$sanitizer" ]; then
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for check in memcheck racecheck; do
    step 240 "$sanitizer" --tool "$check" --error-exitcode 1 \
      "${pytest[@]}" tests/gpu/test_native_gpu.py -k test_sanitized
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  echo "compute-sanitizer is not here: memcheck and racecheck were not run"
fi
step 420 "${pytest[@]}" tests/gpu --ignore=tests/gpu/test_native_gpu.py
exit "$status"
