# One command each, on a machine that has nothing but Python >= 3.11 (and make).
#   make quickstart   install, then run SFT, reward model and PPO on a small made-up world: runs/quickstart/report.html
#   make test         install, then the fast tests (under 10 minutes on 2 cores)
#   make test-slow    the tests that train for minutes
#   make bench        TRL beside ours on the same work: a table, .bench/benchmarks.json (an hour; needs DATA=folder, see README)
#   make lint         ruff and mypy
#   make audit        a note on known vulnerabilities of the pinned dependencies (pip-audit); it never fails
# On a machine with a GPU choose the build of PyTorch yourself:  make TORCH='torch==2.13.0 --index-url URL' quickstart
# or install into an environment of your own:                    make VENV=/path/to/venv quickstart

SHELL := /bin/bash
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
STAMP := $(VENV)/.lit-rlhf-installed
# More threads than cores slow small models down; nothing is fetched from the hub.
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: install quickstart test test-slow bench lint audit format clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

# torch goes first and alone: asked for by another package, pip takes the newest build with several GB of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "lit-rlhf needs Python 3.11 or newer on the PATH (or: make PYTHON=/path/to/python3.12 ...)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	@touch $@

install: $(STAMP)

quickstart: $(STAMP)
	$(RUN) $(BIN)/python -m lit_rlhf quickstart $(ARGS)

# Two workers with a thread each: the tests' models are too small for two threads to help. A file stays with one worker, for its fixtures.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test: $(STAMP)
	$(RUN) $(PYTEST) -m 'not slow' $(ARGS)

test-slow: $(STAMP)
	$(RUN) $(PYTEST) -m slow $(ARGS)

# TRL's two versions go into environments of their own in .bench/, made once.
DATA ?= ../shared/data
bench: $(STAMP)
	$(BIN)/python tests/benchmarks/run.py --torch '$(TORCH)' --data $(DATA) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In an environment of its own, so that its dependencies do not mix with those that it looks up.
audit: $(STAMP)
	@test -x $(VENV)-audit/bin/pip-audit || { $(BIN)/python -m venv $(VENV)-audit && $(VENV)-audit/bin/pip install --quiet pip-audit; } >/dev/null 2>&1 || true
	@$(BIN)/python .ci/audit.py $(VENV)-audit/bin/pip-audit constraints.txt

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-audit .bench .pytest_cache .mypy_cache .ruff_cache dist
