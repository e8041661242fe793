PYTHON ?= python3
# The machine's own interpreter for `make gpu`, which sets nothing up and needs no network.
GPU_PYTHON ?= python3
WORKERS ?= 2
# Kernels are compiled as the tests meet them: processes share that work.
GPU_WORKERS ?= 8

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CPP := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.cu benchmarks/*.cpp emulator/*.h emulator/*.cpp tests/*/*.h tests/*/*.cpp tests/*/*.cu)
GPU_OUT := $(or $(OUT),out/gpu)

# Without the constraints pip would resolve torch to its newest release and fetch gigabytes of it.
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help extension emulator older-triton demo test test-all sanitize lint format bench bench-quick aot gpu gpu-test gpu-bench gpu-tune gpu-sanitize clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

# Always run: ninja, not make, knows what has to be compiled again.
extension: $(STAMP) ## compile the CPU backend's kernels and, with nvcc, the CUDA one's, where they changed
	$(PY) setup.py --quiet build_ext --inplace

emulator: $(STAMP) ## compile the emulator, which runs the GPU kernels' compiled code without a GPU
	$(PY) emulator/build.py

# The release that goes with torch 2.11, for Linux as all of them: the tests compile every kernel with both.
OLDER_TRITON := 3.6.0
OLDER_STAMP := $(if $(filter Linux,$(shell uname -s)),out/triton-$(OLDER_TRITON)/.installed)
older-triton: $(OLDER_STAMP) ## install the oldest supported Triton into out/, beside the one that everything else uses
out/triton-%/.installed: | $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) triton==$*
	@touch $@

demo: extension ## train a small DeepViT and a plain ViT on handwritten digits; the figure goes to out/
	$(PY) examples/digits.py

# Interpreted kernels are single-threaded Python: processes help, torch's own threads would only get in their way.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest tests -n $(WORKERS) --dist worksteal
test: extension emulator ## run all but the slow tests in WORKERS processes (default 2), five minutes on two cores
	@echo "Importing torch and collecting tests in $(WORKERS) processes; in half a minute the first have run."
	$(PYTEST) -m "not slow"

test-all: extension emulator older-triton ## run the slow tests too: kernels compiled for every GPU, long rows, whole builds
	@echo "Importing torch and collecting tests in $(WORKERS) processes; in half a minute the first have run."
	$(PYTEST)

# The library lies beside the one that everything else uses. What malloc hands out is filled with NaN. Reports go past
# pytest, which captures no more than Python's own output.
sanitize: export ASAN_OPTIONS := detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=67108864
sanitize: export UBSAN_OPTIONS := print_stacktrace=1
sanitize: $(STAMP) ## run the CPU backend's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	REATTN_BUILD_CPU=1 REATTN_BUILD_CUDA=0 REATTN_CPU_SANITIZE=address,undefined $(PY) setup.py --quiet build_ext --build-lib out/sanitize --build-temp build/sanitize
	REATTN_CPU_FOLDER=out/sanitize/reattn LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so)" OMP_NUM_THREADS=1 \
	    $(PY) -m pytest tests/test_parity.py tests/test_cpu.py -q -m extension --capture=sys \
	    -n $(WORKERS) --dist worksteal --max-worker-restart=0

lint: $(STAMP) ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(PY) -m mypy reattn/

format: $(STAMP) ## rewrite the sources in the project's style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

bench: extension ## measure operator, module, models and growth on this machine: out/bench, six minutes on two cores
	@mkdir -p out/bench
	$(PY) -m pytest benchmarks/ --benchmark-only -q --benchmark-json=out/bench/benchmarks.json
	$(PY) -m benchmarks.report --out out/bench out/bench/benchmarks.json

bench-quick: extension ## the same in small: that everything measured is right and the suite runs
	$(PY) -m pytest benchmarks/ --benchmark-only -q --quick

aot: $(STAMP) older-triton ## compile every kernel for the GPU architectures it is meant for, no GPU needed
	$(PY) -m benchmarks.compile_report
	PYTHONPATH=out/triton-$(OLDER_TRITON) $(PY) -m benchmarks.compile_report --backend triton

# For the GPU that is there. What the build says is shown: without the extension its tests would be skipped.
GPU_INSTALL = REATTN_BUILD_CPU=0 REATTN_BUILD_CUDA=1 \
    REATTN_CUDA_ARCHS="$$($(GPU_PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')" \
    timeout -k 5 100 $(GPU_PYTHON) -m pip install --verbose --no-build-isolation --no-deps -e . 2>&1 | grep -E "reattn:|error|Success"

# The parts, each within nine minutes; `make gpu` runs all of them, `make gpu PART=bench` one. Tests that fail do not keep
# the others from being run, but the target still fails. What is in the folder already is not measured again.
PART ?= test bench tune
gpu: SHELL := bash
gpu: export PYTHONUNBUFFERED := 1
gpu: ## test, measure and tune on this machine's GPU with GPU_PYTHON (default python3), results in OUT (default out/gpu)
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu needs a CUDA device; torch %s sees none" % torch.__version__)'
	@set -o pipefail; $(GPU_INSTALL)
	@status=0; for part in $(PART); do $(MAKE) --no-print-directory gpu-$$part || status=1; done; exit $$status

gpu-test gpu-bench gpu-tune: SHELL := bash
gpu-test:
	@mkdir -p "$(GPU_OUT)"
	@set -o pipefail; timeout -s INT -k 10 420 $(GPU_PYTHON) -m pytest tests -q -n $(GPU_WORKERS) --dist worksteal --durations=10 \
	    --junitxml="$(GPU_OUT)/tests.xml" 2>&1 | tee "$(GPU_OUT)/tests.log"

# kind:seconds for those that begin; what an earlier run left out for want of time is measured now.
gpu-bench:
	@mkdir -p "$(GPU_OUT)/results"
	@set -o pipefail; status=0; end=$$((SECONDS + 400)); \
	for each in operator:230 scaling:60 model:60 module:60; do \
	    kind=$${each%:*}; seconds=$${each#*:}; left=$$((end - SECONDS)); [ $$left -gt 40 ] || { echo "no time left for $$kind: run it again"; continue; }; \
	    [ $$seconds -lt $$((left - 30)) ] || seconds=$$((left - 30)); \
	    timeout -s INT -k 10 $$left $(GPU_PYTHON) -m pytest benchmarks/test_$$kind.py --benchmark-only -q --seconds $$seconds \
	        --measured "$(GPU_OUT)/results" --benchmark-json="$(GPU_OUT)/results/$$kind-$$(date +%s).json" 2>&1 | tee "$(GPU_OUT)/$$kind.log"; \
	    case $${PIPESTATUS[0]} in 0|5) ;; *) status=1;; esac; \
	done; \
	find "$(GPU_OUT)/results" -name '*.json' -empty -delete; \
	$(GPU_PYTHON) -m benchmarks.report --out "$(GPU_OUT)" "$(GPU_OUT)"/results/*.json || status=1; exit $$status

gpu-tune:
	@mkdir -p "$(GPU_OUT)"
	@set -o pipefail; timeout -s INT -k 10 420 $(GPU_PYTHON) -m benchmarks.tune --seconds 270 --out "$(GPU_OUT)/tuning" 2>&1 | tee "$(GPU_OUT)/tuning.log"

# The kernels of torch are none of its business.
gpu-sanitize: SHELL := bash
gpu-sanitize: ## run the CUDA backend's kernels on this machine's GPU under compute-sanitizer
	@set -o pipefail; $(GPU_INSTALL)
	for tool in memcheck racecheck initcheck; do \
	    timeout -k 5 140 compute-sanitizer --tool $$tool --error-exitcode 9 --kernel-regex kns=reattn \
	        $(GPU_PYTHON) -m pytest tests/test_parity.py -q -x -p no:cacheprovider -k "test_shapes and cuda and (17x17 or 50x50)" || exit 1; \
	done

clean: ## remove everything that these targets made, the virtual environment too
	rm -rf $(VENV) out build dist reattn.egg-info reattn/*.so emulator/*.so .benchmarks .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Without the extension: pip would hide what its build says, and start it from nothing every time.
$(STAMP): constraints.txt pyproject.toml setup.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found; name an interpreter: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "reattn needs Python 3.10 or newer, $(PYTHON) is %d.%d; name another: make PYTHON=/path/to/python3" % sys.version_info[:2])'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing the pinned packages of constraints.txt into $(VENV); the first time takes a few minutes."
	$(PIP_INSTALL) ninja pybind11 setuptools
	REATTN_BUILD_CPU=0 REATTN_BUILD_CUDA=0 $(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@
