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
	@echo "make parity BUNDLE=DIR [BACKEND=onnxruntime] [DATA=DIR]   the parity suite on any bundle"
	@echo "make gpu-check  what needs a CUDA GPU"

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

test: .venv/.installed
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: .venv/.installed
	$(BIN)/python -m pytest -m "not gpu"

check: .venv/.installed .venv/typing/dualmatch
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.venv/typing $(BIN)/mypy $(addprefix -p dualmatch.,$(PACKAGES))

parity: .venv/.installed
	@test -n "$(BUNDLE)" || { echo "say which bundle: make parity BUNDLE=DIR"; exit 2; }
	DUALMATCH_PARITY_BUNDLE="$(abspath $(BUNDLE))" DUALMATCH_PARITY_BACKEND="$(BACKEND)" DUALMATCH_PARITY_DATA="$(DATA)" \
		$(BIN)/python -m pytest tests/parity

gpu-check: .venv/.installed
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf .venv build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache
