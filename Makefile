# `make demo` and `make test` need Python 3.11+ and make; everything else is installed into .venv, pinned by constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PACKAGES := models training export runtime bench cli

.PHONY: help demo test test-all check parity gpu-check clean

help:
	@echo "make demo       train, export, compile, encode, search, verify and bench on embedded data (writes ./demo)"
	@echo "make test       the test suite"
	@echo "make test-all   the test suite with the slow tests"
	@echo "make check      ruff and mypy"
	@echo "make parity BUNDLE=DIR [BACKEND=onnxruntime] [DATA=DIR] [REGIONS=FILE]   the parity suite on any bundle"
	@echo "make gpu-check  what needs a CUDA GPU: tests, then the benchmark into bench/results/ [GPU_PYTHON=python3: your own torch and CUDA packages]"

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("dualmatch needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# mypy reads the packages under the names that they are installed under.
.venv/typing/dualmatch:
	mkdir -p $@
	for folder in $(PACKAGES); do ln -sfn "$(CURDIR)/$$folder" "$@/$$folder"; done

demo: .venv/.installed
	$(BIN)/dualmatch demo --out demo

# A process for each core, each with one thread; a file's tests stay together, because they share what the file has made.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test: .venv/.installed
	$(PYTEST) -m "not slow and not gpu"

test-all: .venv/.installed
	$(PYTEST) -m "not gpu"

check: .venv/.installed .venv/typing/dualmatch
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.venv/typing $(BIN)/mypy $(addprefix -p dualmatch.,$(PACKAGES))

parity: .venv/.installed
	@test -n "$(BUNDLE)" || { echo "say which bundle: make parity BUNDLE=DIR"; exit 2; }
	DUALMATCH_PARITY_BUNDLE="$(abspath $(BUNDLE))" DUALMATCH_PARITY_BACKEND="$(BACKEND)" DUALMATCH_PARITY_DATA="$(DATA)" \
		DUALMATCH_PARITY_REGIONS="$(if $(REGIONS),$(abspath $(REGIONS)))" \
		$(BIN)/python -m pytest tests/parity

# GPU_PYTHON=python3 takes an environment that has torch, onnx and the GPU packages already; dualmatch alone is installed into it.
GPU_PYTHON ?= $(BIN)/python
gpu-check: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),.venv/.installed)
	@$(GPU_PYTHON) -c 'import dualmatch.runtime' 2>/dev/null || \
		$(GPU_PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@$(GPU_PYTHON) -m dualmatch.bench.gpu --check || { echo "make gpu-check: NOT RUN, see above"; exit 1; }
	$(GPU_PYTHON) -m pytest -m gpu tests/gpu
	$(GPU_PYTHON) -m dualmatch.bench.gpu --out bench/results

clean:
	rm -rf .venv build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache
