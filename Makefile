# Everything works in one virtual environment that these targets make: `make demo` and `make test` need nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# SGLang is several thousand modules: without cached bytecode every start takes half a minute longer.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup model demo bench test test-fast lint clean

help: ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# uv installs in a fraction of pip's time; where it cannot be had, pip does the same.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; then \
		$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[programs,dev]'; \
	else \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[programs,dev]'; \
	fi
	touch $(INSTALLED)

setup: $(INSTALLED) ## install everything into .venv

model: setup ## fetch the embedded model (once, into the user's cache)
	$(BIN)/rksc model fetch

demo: model ## self-consistency on 8 problems with the embedded model: votes, and what stopping early saves
	$(BIN)/python -m programs.self_consistency --source reading --problems 8 --branches 8 --max-tokens 32

bench: model ## what it is worth, into benchmarks/results and README; ARGS=--quick takes minutes, not hours
	$(BIN)/rksc bench $(ARGS)
	$(BIN)/python -m benchmarks.tables

test: model ## all tests, with real servers on the CPU
	$(BIN)/python -m pytest

test-fast: setup ## the tests that need no server and no download
	$(BIN)/python -m pytest -m 'not server and not slow'

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove what was made here (not the user's cache)
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
