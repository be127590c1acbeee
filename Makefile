# Every target sets itself up in a virtual environment of its own; nothing outside the folder is touched.
#
#   make demo      compress a trained Vision Transformer and compare it with the dense one
#   make test      lint, type check, all tests that this machine can run, coverage
#   make test-gpu  the tests that need a CUDA device, with the torch and Triton that are installed
#
# On a machine whose package index serves a CUDA build of torch, a CPU build comes with
#   make demo PIP_TORCH="--index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_TORCH ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test lint test-unit test-interpreter test-compile coverage test-triton36 test-gpu clean

demo: $(VENV)/ready
	$(BIN)/lowrank-ops demo

test: lint test-unit test-interpreter test-compile coverage

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Interpreted and compiled kernels get processes of their own: Triton decides which it does when it is imported.
test-unit: $(VENV)/ready-dev
	$(PYTEST) tests --ignore tests/interpreter --ignore tests/compile_gate \
	  --cov --cov-report=

test-interpreter: $(VENV)/ready-dev
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) tests/interpreter -n 2 --cov --cov-append --cov-report=

test-compile: $(VENV)/ready-dev
	$(PYTEST) tests/compile_gate -n 2

# Of all the tests that ran before it.
coverage: $(VENV)/ready-dev
	$(BIN)/coverage report --fail-under=90

# The oldest supported Triton, whose interpreter needs an older numpy.
test-triton36: OLD := .venv-triton36
test-triton36: .venv-triton36/ready
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(OLD)/bin/python -m pytest tests/interpreter -n 2
	$(OLD)/bin/python -m pytest tests/compile_gate -n 2

# Uses the environment at hand, which has to have a CUDA build of torch.
test-gpu:
	$(PYTHON) -m pytest -m gpu tests/gpu

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(PIP_TORCH) "$(TORCH)"
	$(PIP) --editable ".[plots]"
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(PIP) --editable ".[dev]"
	touch $@

.venv-triton36/ready: pyproject.toml
	$(PYTHON) -m venv .venv-triton36
	.venv-triton36/bin/python -m pip install --quiet $(PIP_TORCH) "$(TORCH)"
	.venv-triton36/bin/python -m pip install --quiet --editable . pytest pytest-xdist "triton==3.6.*" "numpy<2.4"
	touch $@

clean:
	rm -rf $(VENV) .venv-triton36 build dist *.egg-info
