# make demo | test | check | bench | clean
#
# On a fresh machine with Python 3.11 or newer, gcc/g++, make and pip, each target sets up .venv first. What is done
# is noted in stamp files in .venv, so a second run installs nothing. Variables:
#
#   PYTHON=python3.12              the interpreter that .venv is made with
#   TORCH=torch==2.11.0            the PyTorch to install, with pip options if need be
#   TRITON=triton==3.6.0           likewise; empty: none, or the one that comes with TORCH
#   ARGS="-k crash -x"             further arguments of pytest, `sandbox demo` or `sandbox bench`

SHELL := /bin/sh
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?=
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help demo test check bench clean compiler

help:
	@echo "make demo   real models through torch.compile, every graph in a sandboxed child"
	@echo "make test   the whole test suite"
	@echo "make check  ruff and mypy"
	@echo "make bench  side by side with Inductor's own modes; takes many minutes"
	@echo "make clean  remove caches and build outputs; .venv stays (rm -rf .venv removes it)"

demo: $(VENV)/.demo | compiler
	@$(BIN)/sandbox demo $(ARGS)

# With the extra `demo`, so that no test is skipped for want of transformers.
test: $(VENV)/.test $(VENV)/.demo | compiler
	@$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/.bench | compiler
	@$(BIN)/sandbox bench $(ARGS)

clean:
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# .venv, step by step ------------------------------------------------------------------------------------------

# PyTorch first and by its exact version, so that nothing that comes later can bring another one.
$(VENV)/.torch: | $(VENV)/.python
	@echo "installing $(TORCH) into $(VENV): once, some minutes"
	@$(PIP) install $(TORCH)
	@touch $@

$(VENV)/.triton: | $(VENV)/.torch
	@$(if $(strip $(TRITON)),$(PIP) install $(TRITON),:)
	@touch $@

# The project itself with one extra each; again when pyproject.toml has changed.
$(VENV)/.test $(VENV)/.demo $(VENV)/.bench: $(VENV)/.%: pyproject.toml | $(VENV)/.triton
	@echo "installing this project with its extra '$*' into $(VENV)"
	@$(PIP) install --editable '.[$*]'
	@touch $@

# What is there is kept, whoever made it; what is missing (all, or pip) is added.
$(VENV)/.python:
	@set -e; \
	found=; \
	for python in $(if $(PYTHON),'$(PYTHON)',python3.11 python3 python3.12 python3.13); do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "make: no Python 3.11 or newer$(if $(PYTHON), at PYTHON=$(PYTHON)): install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	fi; \
	if ! $(BIN)/python -c '' >/dev/null 2>&1 && ! "$$found" -m venv --without-pip $(VENV); then \
	    echo "make: $$found cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; \
	    exit 1; \
	fi; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 \
	    || $(BIN)/python -m ensurepip >/dev/null 2>&1 \
	    || "$$found" -m pip --disable-pip-version-check --quiet --python $(BIN)/python install pip \
	    || { \
	        echo "make: no pip for $(VENV): $$found has neither ensurepip nor a pip of 22.3 or newer." >&2; \
	        echo "make: on Debian and Ubuntu: apt install python3-venv (or python3.11-venv), then make again." >&2; \
	        exit 1; \
	    }; \
	touch $@

compiler:
	@command -v "$${CXX:-g++}" >/dev/null || { \
	    echo "make: no C++ compiler: install g++, or set CXX; torch.compile needs one for CPU graphs" >&2; exit 1; }
