# `make demo` and `make test` are all that a newcomer needs: Python >= 3.11, pip and make suffice.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,data,gguf,draw,examples
PYTEST_ARGS ?=
WORKERS ?= 2
DIST ?= dist

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --quiet
CONSTRAINTS := .ci/constraints.txt
TORCH := $(shell grep '^torch==' $(CONSTRAINTS))
CORE := $(VENV)/.installed-core
FULL := $(VENV)/.installed-extras
QUIET := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help demo test slow bench setup lint format typecheck build clean

help:
	@echo "make demo       install lmppl into $(VENV) and run its demonstration"
	@echo "make test       install what the tests need and run them"
	@echo "make slow       the slow tests: statistics, SmolLM2"
	@echo "make bench      the benchmarks"
	@echo "make lint       ruff: rules and format        make format   let ruff rewrite the files"
	@echo "make typecheck  mypy, strict                  make build    sdist and wheel into $(DIST)/"
	@echo "make clean      remove caches and builds; $(VENV) stays"

# torch comes first and alone, at the pinned release: any other one would bring its own gigabytes.
$(CORE): pyproject.toml $(CONSTRAINTS)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) -c $(CONSTRAINTS) -e .
	@touch $@

$(FULL): $(CORE)
	$(PIP) -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

setup: $(FULL)

demo: $(CORE)
	$(QUIET) $(VENV)/bin/lmppl demo

# A file stays with one worker, so that what its tests share is computed once.
PARALLEL := -n $(WORKERS) --dist loadfile

test: setup
	$(QUIET) $(PY) -m pytest $(PARALLEL) $(PYTEST_ARGS)

slow: setup
	$(QUIET) $(PY) -m pytest -m "slow and not benchmark" $(PARALLEL) $(PYTEST_ARGS)

bench: setup
	$(QUIET) $(PY) -m pytest tests/benchmarks -m benchmark $(PYTEST_ARGS)

lint: setup
	$(PY) -m ruff check
	$(PY) -m ruff format --check

format: setup
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

typecheck: setup
	$(PY) -m mypy

build: setup
	$(PY) -m build --no-isolation --outdir $(DIST)

clean:
	rm -rf build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find lmppl tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
