# Everything here sets itself up: Python 3.11+, git and make are enough.  `make` alone lists the targets.
#
#   PYTHON=python3.12 make venv          another interpreter for the environment
#   make test-gpu PYTHON=python3         no environment at all: that interpreter, as it stands, without a network
#   make test ARGS="tests/house -x"      a part of the tests

SHELL := /bin/bash

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
ARGS ?=
# Worker processes for the tests. Those marked `timed` measure times and run one at a time, alone on the machine.
JOBS ?= 2
# The fast tests that compare numbers; pytest finds them (tests/numeric.py).
NUMERIC = -n $(JOBS) --dist worksteal -m "numeric and not slow and not gpu"

ifeq ($(origin PYTHON),undefined)
PYTHON := python3
GPU_PYTHON := $(BIN)/python
GPU_NEEDS := $(STAMP)
else
GPU_PYTHON := $(PYTHON)
GPU_NEEDS :=
endif

.PHONY: help venv demo test test-slow test-gpu test-diffusers-latest docs lint format clean

help:
	@echo "make demo       search a plan for the tiny model in examples/, generate with and without it (writes out/)"
	@echo "make test       lint, types, fast tests"
	@echo "make test-slow  whole searches, compiled models, the built wheel; numbers as older processors compute them"
	@echo "make test-gpu   tests that need a CUDA GPU (PYTHON=python3: with that interpreter, building nothing)"
	@echo "make test-diffusers-latest   what touches diffusers, with the newest one on PyPI"
	@echo "make docs       the documentation's pages, in site/"
	@echo "make lint       ruff (format, lint) and mypy;  make format applies what ruff can"
	@echo "make venv       only the environment, in .venv;  make clean removes what builds and tests left"

venv: $(STAMP)

# torch comes first, by itself, so that the rest is resolved against the build of it that fits this machine.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "diffsparse needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)."; \
	  echo "Name another one: make PYTHON=python3.12 $(or $(MAKECMDGOALS),venv)"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs the package python3-venv."; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt \
	  "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py $(ARGS)

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)
	@echo "open site/index.html; with its search box: $(BIN)/python -m http.server -d site"

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# What compares numbers is run as older x86 processors compute it, too: torch and its libraries sum up in another order
# there, and the CPU kernel is compiled for their instructions.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 DIFFSPARSE_CPU_ISA=avx2
NO_AVX := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 DIFFSPARSE_CPU_ISA=generic

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "slow and not timed" --durations=15 $(ARGS)
	$(BIN)/python -m pytest -m "slow and timed" $(ARGS)
ifeq ($(shell uname -m),x86_64)
	$(AVX2) $(BIN)/python -m pytest $(NUMERIC) $(ARGS)
	$(NO_AVX) $(BIN)/python -m pytest $(NUMERIC) $(ARGS)
endif

test-gpu: $(GPU_NEEDS)
	PYTHONPATH=. $(GPU_PYTHON) -m pytest -m gpu -p no:cacheprovider $(ARGS)

# A folder beside the environment shadows its diffusers; what the newest one needs beyond it shows as an ImportError.
test-diffusers-latest: $(STAMP)
	rm -rf .diffusers-latest
	$(BIN)/python -m pip install --disable-pip-version-check -q --upgrade --no-deps --target .diffusers-latest diffusers
	@PYTHONPATH=.diffusers-latest $(BIN)/python -c 'import diffusers; print("diffusers", diffusers.__version__)'
	PYTHONPATH=.diffusers-latest $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -p no:cacheprovider \
	  tests/pipelines tests/house/test_private_names.py $(ARGS)

clean:
	rm -rf build dist site *.egg-info .diffusers-latest .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
