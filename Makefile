# Everything happens in .venv, which is made on first use. PYTHON chooses the Python it is made from.
PYTHON ?= python3
ARGS ?=
BENCH_JSON ?= bench/results/latest.json
TRITON_VERSIONS ?= 3.6.0 3.9.0
TORCH_VERSIONS ?= 2.11.0 2.14.1
TORCH_TESTS ?= $(foreach t,conv3x3 conv3x3_pixel_shuffle conv1x1 spab esa bsconv depthwise_conv layer_norm2d modulate \
	adaptive_max_pool selective_scan window_attention dispatch graphs plan modules models reparam checkpoint native_cpu \
	native_cpu_backward native_bfloat optimize optimize_entries optimize_channels optimize_networks tiling processes \
	cli_upscale,tests/test_$(t).py)
SANITIZERS ?= address thread
FUZZ_SECONDS ?= 300
FUZZ_EXAMPLES ?= 5000

VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet --constraint constraints.txt
STYLED := find csrc tests -type f \( -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' \) -print0

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# A user who installs to his home by default would break the environment's own pip.
export PIP_USER := 0
unexport PYTHONHOME

.PHONY: help run train-demo test test-triton test-torch sanitize fuzz lint format bench build clean distclean
.DEFAULT_GOAL := help

help:
	@echo 'make run        super-resolve a photograph, verified and timed   ARGS="--weights FILE ..."'
	@echo 'make train-demo trains a small network on photographs in minutes  ARGS="--resume ..."'
	@echo 'make test       lint, then all tests                             ARGS="-k NAME ..."'
	@echo 'make test-triton  the Triton tests with TRITON_VERSIONS="$(TRITON_VERSIONS)"'
	@echo 'make test-torch   one wheel with TORCH_VERSIONS="$(TORCH_VERSIONS)", gigabytes each'
	@echo 'make sanitize   the CPU backend under sanitizers      SANITIZERS="address thread"'
	@echo 'make fuzz       hostile input and drawn operator calls, for minutes   FUZZ_SECONDS=300 FUZZ_EXAMPLES=5000'
	@echo 'make lint       ruff, mypy, clang-format'
	@echo 'make format     rewrite the sources the way lint wants them'
	@echo 'make bench      the microbenchmarks; results in $(BENCH_JSON)    ARGS="-k NAME ..."'
	@echo 'make build      compile what changed (ESR_KERNELS_CUDA=0|1|auto, MAX_JOBS=N, CXX=...)'
	@echo 'make clean      remove what was compiled;  make distclean: the environment too'

$(VENV)/.esr-python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, $(PYTHON) is " + sys.version.split()[0] \
		+ ": make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo 'making $(VENV)'; $(PYTHON) -m venv --clear $(VENV); }
	@touch $@

# torch comes first and alone, so that nothing else decides which one is taken. The project itself is installed without
# build isolation: an isolated build would fetch another torch.
$(VENV)/.esr-requirements: $(VENV)/.esr-python constraints.txt pyproject.toml
	@echo 'installing the pinned requirements into $(VENV) (a few minutes the first time)'
	@$(PIP_INSTALL) setuptools wheel ninja pybind11
	@$(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)"
	@ESR_KERNELS_NATIVE=0 $(PIP_INSTALL) --no-build-isolation --editable '.[test,bench,lint,demo,triton,train,onnx,plot]'
	@touch $@

build: $(VENV)/.esr-requirements
	@$(PY) setup.py --quiet build_ext --inplace

run: build
	@$(PY) -m esr_kernels demo $(ARGS)

# The folder of the run is kept: see docs/training.md.
train-demo: build
	@$(PY) -m esr_kernels train demo --output outputs/train-demo $(ARGS)

lint: $(VENV)/.esr-requirements
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy $(wildcard esr_kernels python_models)
	$(STYLED) | xargs -0 -r $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/.esr-requirements
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(STYLED) | xargs -0 -r $(VENV)/bin/clang-format -i

# A file stays in one process: fixtures of a module are made once.
test: export ESR_KERNELS_EMULATOR = 1
test: lint build
	$(PY) -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		--durations 15 $(ARGS)

# The Triton tests with other versions than the pinned one, each kept in a folder of its own.
test-triton: build
	@for v in $(TRITON_VERSIONS); do \
		test -d build/triton-$$v || $(PY) -m pip install --quiet --no-deps --target build/triton-$$v triton==$$v || exit 1; \
		echo "Triton $$v"; \
		PYTHONPATH=build/triton-$$v $(PY) -m pytest -q tests/test_triton_interpreter.py tests/test_triton.py \
			tests/test_triton_compile.py $(ARGS) || exit 1; \
	done

# One wheel, compiled against the pinned torch, installed and tested with other versions, each in an environment of its
# own: what depends on torch, on the CPU.
test-torch: build
	@rm -rf build/wheel
	@$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	@grep -vE '^(torch|triton|setuptools)==' constraints.txt > build/constraints-any-torch.txt
	@for v in $(TORCH_VERSIONS); do \
		env=build/torch-$$v; \
		test -x $$env/bin/esr-kernels || { $(PY) -m venv --clear $$env && $$env/bin/pip install --quiet torch==$$v \
			&& $$env/bin/pip install --quiet --constraint build/constraints-any-torch.txt \
				"$$(ls build/wheel/*.whl)[test,bench,demo,train,onnx,plot]"; } || exit 1; \
		$$env/bin/pip install --quiet --no-deps --force-reinstall build/wheel/*.whl || exit 1; \
		(cd build/wheel && ../../$$env/bin/esr-kernels info) || exit 1; \
		$$env/bin/python -m pytest -q -p no:cacheprovider -k 'not triton and not native-cuda' $(TORCH_TESTS) $(ARGS) \
			|| exit 1; \
	done

# The CPU backend's tests under AddressSanitizer and UndefinedBehaviorSanitizer, then ThreadSanitizer.
sanitize: $(VENV)/.esr-requirements
	$(PY) tests/sanitize.py $(SANITIZERS) -- $(ARGS)

# Many more inputs than `make test` tries, the same ones every time; counts are printed.
fuzz: build
	ESR_KERNELS_EXAMPLES=$(FUZZ_EXAMPLES) $(PY) -m pytest -q -s -p no:cacheprovider \
		tests/test_fuzz.py tests/test_properties.py -k 'not triton and not native-cuda' $(ARGS)
	$(PY) tests/fuzz/run.py -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -seed=2

bench: build
	@mkdir -p $(dir $(BENCH_JSON))
	$(PY) -m pytest bench --benchmark-json=$(BENCH_JSON).part $(ARGS)
	@mv $(BENCH_JSON).part $(BENCH_JSON)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f esr_kernels/*.so
	find esr_kernels python_models tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV)
