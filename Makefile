PYTHON ?= python3
# The machine's own interpreter for `make gpu`, which needs no network and installs nothing but this package.
GPU_PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CPP := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cuh csrc/*/*.cpp csrc/*/*.cu benchmarks/*.cpp emulator/*.h emulator/*.cpp tests/*/*.h tests/*/*.cpp tests/*/*.cu)

# Without the constraints pip would resolve torch to its newest release and fetch gigabytes of it.
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help extension emulator older-triton libraries demo test test-all test-libraries sanitize lint format docs wheel bench bench-quick aot gpu clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

# Always run: ninja, not make, knows what has to be compiled again.
extension: $(STAMP) ## compile the CPU backend's kernels where they changed
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

# timm needs torchvision, and that a torch of its own build: an environment beside the other one. timm's own tests come
# with its source distribution alone.
LIBRARIES := out/libraries
LIBRARIES_PY := $(LIBRARIES)/venv/bin/python
LIBRARIES_PIP := $(LIBRARIES_PY) -m pip --quiet --disable-pip-version-check
libraries: $(LIBRARIES)/.installed ## install timm, torchvision, transformers and others into out/, 6 GB, for the tests that need them
$(LIBRARIES)/.installed: constraints-libraries.txt pyproject.toml | $(STAMP)
	rm -rf $(LIBRARIES)
	$(PY) -m venv $(LIBRARIES)/venv
	$(LIBRARIES_PIP) install -c constraints-libraries.txt ninja pybind11 setuptools
	REATTN_BUILD_CPU=0 $(LIBRARIES_PIP) install -c constraints-libraries.txt --no-build-isolation -e '.[analysis,demo,libraries,test]'
	$(LIBRARIES_PIP) download --no-deps --no-binary timm --dest $(LIBRARIES) $$(grep ^timm== constraints-libraries.txt)
	mkdir $(LIBRARIES)/timm && tar -xzf $(LIBRARIES)/timm-*.tar.gz -C $(LIBRARIES)/timm --strip-components 1
	@touch $@

demo: extension ## train a small DeepViT and a plain ViT on handwritten digits; the figure goes to out/
	$(PY) examples/digits.py

# The emulator is single-threaded: processes help, torch's own threads would only get in their way.
PYTEST_FLAGS = -n $(WORKERS) --dist worksteal
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest tests $(PYTEST_FLAGS)
test: extension emulator ## run all but the slow tests in WORKERS processes (default 2), nine minutes on two cores
	@echo "Importing torch and collecting tests in $(WORKERS) processes; in half a minute the first have run."
	$(PYTEST) -m "not slow and not libraries"

test-all: extension emulator older-triton libraries ## run the slow tests too: kernels compiled for every GPU, long rows, whole builds
	@echo "Importing torch and collecting tests in $(WORKERS) processes; in half a minute the first have run."
	$(PYTEST) -m "not libraries"
	PYTHONPATH=out/triton-$(OLDER_TRITON) TRITON_CACHE_DIR=out/triton-$(OLDER_TRITON)/cache $(PYTEST) -q -k "test_compiled and triton and not sm_80"

	$(MAKE) test-libraries

test-libraries: extension libraries ## run the tests that need timm, torchvision, transformers and others
	OMP_NUM_THREADS=1 $(LIBRARIES_PY) -m pytest tests $(PYTEST_FLAGS) -q -m libraries

# The library lies beside the one that everything else uses. What malloc hands out is filled with NaN. Reports go past
# pytest, which captures no more than Python's own output.
sanitize: export ASAN_OPTIONS := detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=67108864
sanitize: export UBSAN_OPTIONS := print_stacktrace=1
sanitize: $(STAMP) ## run the CPU backend's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	REATTN_BUILD_CPU=1 REATTN_CPU_SANITIZE=address,undefined $(PY) setup.py --quiet build_ext --build-lib out/sanitize --build-temp build/sanitize
	REATTN_CPU_FOLDER=out/sanitize/reattn LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so)" OMP_NUM_THREADS=1 \
	    $(PY) -m pytest tests/test_parity.py tests/test_cpu.py tests/test_masks.py -q -m extension --capture=sys \
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

docs: $(STAMP) ## build the documentation site, from what is installed alone: out/docs/index.html
	$(PY) -m sphinx -q -W --keep-going -n -c docs -d out/doctrees . out/docs

# What the wheel holds is laid out from nothing: build/ keeps modules that were removed. Objects are those of `extension`.
# Without a patcher auditwheel refuses a library that it would have to take along: a second OpenMP, as an example.
wheel: $(STAMP) ## build a wheel with the CPU extension, tagged for the oldest glibc that it runs on, into out/dist
	rm -rf out/wheel out/dist
	REATTN_BUILD_CPU=1 $(PY) -W 'ignore:setup.py install is deprecated' setup.py --quiet build --build-lib out/wheel/lib bdist_wheel --dist-dir out/wheel
ifeq ($(shell uname -s),Linux)
	$(PY) -m auditwheel repair --patcher none --wheel-dir out/dist out/wheel/*.whl
else
	mkdir out/dist && mv out/wheel/*.whl out/dist
endif

bench: extension ## measure operator, masks, module, models and growth on this machine: out/bench, seven minutes on two cores
	@mkdir -p out/bench
	$(PY) -m pytest benchmarks/ --benchmark-only -q --benchmark-json=out/bench/benchmarks.json
	$(PY) -m benchmarks.report --out out/bench out/bench/benchmarks.json

bench-quick: extension ## the same in small: that everything measured is right and the suite runs
	$(PY) -m pytest benchmarks/ --benchmark-only -q --quick

aot: $(STAMP) older-triton ## compile every kernel for the GPU architectures it is meant for, no GPU needed
	$(PY) -m benchmarks.compile_report
	PYTHONPATH=out/triton-$(OLDER_TRITON) $(PY) -m benchmarks.compile_report --backend triton

# On a GPU that is there for a few minutes: each part ends within 280 s and says what did not fit. GPU_FLAGS=--emulated
# tries the flow of stages without one.
PART ?= check
gpu: ## check and time the kernels on this machine's GPU with GPU_PYTHON (default python3); PART=tune, profile or tests
	@PYTHONUNBUFFERED=1 $(GPU_PYTHON) -m benchmarks.gpu $(PART) --out "$(or $(OUT),out/gpu)" $(GPU_FLAGS)

clean: ## remove everything that these targets made, the virtual environment too
	rm -rf $(VENV) out build dist reattn.egg-info reattn/*.so reattn/not_built.txt emulator/*.so .benchmarks .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Without the extension: pip would hide what its build says, and start it from nothing every time.
$(STAMP): constraints.txt pyproject.toml setup.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found; name an interpreter: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "reattn needs Python 3.10 or newer, $(PYTHON) is %d.%d; name another: make PYTHON=/path/to/python3" % sys.version_info[:2])'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing the pinned packages of constraints.txt into $(VENV); the first time takes a few minutes."
	$(PIP_INSTALL) ninja pybind11 setuptools
	REATTN_BUILD_CPU=0 $(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@
