#!/usr/bin/env bash
# The GPU tests of a wheel that was built elsewhere, with the torch, Triton and pytest at hand and without a network:
#   tests/gpu/from_wheel.sh dist/lowrank_ops-*.whl
# memcheck and racecheck of a small set follow where the toolkit's compute-sanitizer is there.
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
timeout 420 venv/bin/python -m pytest -m gpu tests/gpu

sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
if [ -x "$sanitizer" ]; then
  for check in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 240 "$sanitizer" --tool "$check" --error-exitcode 1 \
      venv/bin/python -m pytest -m gpu tests/gpu/test_native_gpu.py -k test_sanitized
  done
else
  echo "compute-sanitizer is not here: memcheck and racecheck were not run"
fi
