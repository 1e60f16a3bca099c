# What can be done with this checkout. `make` lists it. Everything is installed into .venv and nowhere else.
# ARGS is handed on to the command behind demo, test and bench: make demo ARGS="--help"

SHELL := /bin/sh
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PIP := $(PYTHON) -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-triton check format bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## make the environment in .venv (the other targets do this when it is needed)

# The stamp is written last, so a set-up that failed halfway is done again by the next call.
$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@if ! $(PYTHON) -c "import pip; $(NEW_ENOUGH)" 2>/dev/null; then \
	  new= found=; \
	  for name in python3 python3.13 python3.12 python3.11; do \
	    $$name -c "$(NEW_ENOUGH)" 2>/dev/null || continue; \
	    new=$$name; \
	    if $$name -c "import venv, ensurepip" 2>/dev/null; then found=$$name; break; fi; \
	  done; \
	  if [ -z "$$new" ]; then \
	    echo "setup: no Python 3.11 or newer found (tried python3, python3.13, 3.12, 3.11). Install one, then run make again." >&2; exit 1; \
	  fi; \
	  if [ -z "$$found" ]; then \
	    echo "setup: $$new has no venv module. Install it (on Debian and Ubuntu: apt install python3-venv), then run make again." >&2; exit 1; \
	  fi; \
	  echo "setup: making the environment in $(VENV) with $$($$found --version)"; \
	  $$found -m venv --clear $(VENV) || exit 1; \
	fi
	@echo "setup: installing torch (the largest part; some minutes on a slow line)"
	@$(PIP) torch
	@echo "setup: installing equipoise and its tools (the rest; a few minutes)"
	@$(PIP) -e '.[dev]'
	@touch $@
	@echo "setup: done"

demo: $(STAMP) ## train a small model on this machine, break its router, watch it being repaired
	@$(VENV)/bin/equipoise demo $(ARGS)

# Schemathesis makes no cases in the processes of pytest-xdist, so its file has a run of its own.
test: $(STAMP) ## run the tests, without the slow ones, in two processes
	@[ -n "$(ARGS)" ] || $(PYTHON) -m pytest --quiet tests/serve/api/test_document.py
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: $(STAMP) ## run the slow tests (minutes)
	@$(PYTHON) -m pytest -m slow $(ARGS)

test-triton: $(STAMP) ## run the kernels for GPUs under Triton's interpreter (installs Triton: a gigabyte)
	@$(PYTHON) -c "import triton" 2>/dev/null || { echo "test-triton: installing Triton"; $(PIP) -e '.[triton]'; }
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/ops/triton $(ARGS)

check: $(STAMP) ## format, lint, types, and the rules of the architecture
	@echo "check: format"
	@$(PYTHON) -m ruff format --check .
	@echo "check: lint"
	@$(PYTHON) -m ruff check .
	@echo "check: types"
	@$(PYTHON) -m mypy
	@echo "check: architecture"
	@$(PYTHON) -m pytest --quiet tests/test_architecture.py

format: $(STAMP) ## format the code and mend what the linter can mend
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

bench: $(STAMP) ## time the layer on this machine, beside dense blocks and transformers
	@$(PYTHON) -c "import transformers" 2>/dev/null || { echo "bench: installing transformers to compare with"; $(PIP) -e '.[dev,bench]'; }
	@$(VENV)/bin/equipoise bench layer $(ARGS)

docs: $(STAMP) ## build the documentation into site/, with broken links as errors
	@$(VENV)/bin/zensical --version >/dev/null 2>&1 || { echo "docs: installing the generator"; $(PIP) -e '.[docs]'; }
	@$(VENV)/bin/zensical build --clean --strict

clean: ## remove the environment, caches and builds; runs/ is kept
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
	@echo "clean: done (runs/ is kept)"
