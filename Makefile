# Everything from an empty checkout: make quickstart, make test. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first of these that starts and is new enough (a pyenv shim may stand for a version that is not installed).
# On 3.11 the peers (torch, PEFT) are installed too, so it is preferred.
find-python = $(shell for p in $(1) "$$HOME"/.pyenv/versions/*/bin/python3; do \
	"$$p" -c 'import sys; sys.exit(not ($(2)))' 2>/dev/null && { command -v "$$p"; break; }; done)
PYTHON ?= $(call find-python,python3.11 python3 python3.13 python3.12,sys.version_info >= (3$(,) 11))
NEWEST ?= $(call find-python,python3.13 python3.12 python3.14 python3,sys.version_info >= (3$(,) 12))
, := ,

VENV := .venv
NEWEST_VENV := .venv-newest
WORKDIR ?= runs/quickstart
# Two workers with one thread pool each; a file's tests stay together, so that what they share is built once.
PYTEST := -m pytest -q -n 2 --dist loadfile

.PHONY: help install quickstart benchmark test test-newest test-all lint format clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 16

# A stamp file says which pyproject.toml a virtual environment was made from; it is installed again only after a change.
$(VENV)/.made:
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11 or later is needed and was not found; set PYTHON=/path/to/python" >&2; exit 2; fi
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.package: $(VENV)/.made pyproject.toml
	$(VENV)/bin/python -m pip install -q -e .
	touch $@

$(VENV)/.all: $(VENV)/.made pyproject.toml
	$(VENV)/bin/python -m pip install -q -e '.[dev,peers,ray,slurm]'
	touch $@ $(VENV)/.package

$(NEWEST_VENV)/.all: pyproject.toml
	$(NEWEST) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install -q -e '.[dev]'
	touch $@

install: $(VENV)/.all  ## .venv with the package, what tests need, the peers and the launchers

quickstart: $(VENV)/.package  ## fine-tune the embedded model: audit, training, before and after
	@$(VENV)/bin/python -m experiments.train --config=configs/quickstart.py --workdir=$(WORKDIR)

DATA ?= data/sst2
benchmark: $(VENV)/.all  ## ours and PEFT side by side on CPU (DATA=DIR/sst2); takes long, wants a quiet machine
	$(VENV)/bin/python -m experiments.benchmark --suite=cpu --data=$(DATA)

lint: $(VENV)/.all  ## ruff and mypy
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test: lint  ## lint and the whole suite but the slow tests
	$(VENV)/bin/python $(PYTEST) -m 'not slow'

test-all: lint  ## lint and every test
	$(VENV)/bin/python $(PYTEST)

# What depends on JAX itself: the transform, methods, formats, models, training. The rest is the same on every version.
CORE := tests/lift tests/adapters tests/quant/weight_test.py tests/models tests/saving_test.py tests/audit_test.py \
	tests/sharding_test.py tests/step_test.py tests/recompute_test.py tests/likelihood_test.py tests/tiling_test.py \
	tests/optim_test.py tests/checkpoint_test.py tests/train_test.py tests/train_methods_test.py \
	tests/ablation/running/packed_test.py tests/generate_test.py tests/import_order_test.py tests/sites_test.py \
	tests/trees_test.py tests/dropout_test.py

test-newest:  ## the core suite, without peers, on Python 3.12 or later with the newest jax
	@if [ -z "$(NEWEST)" ]; then \
	  echo '================================================================================'; \
	  echo 'test-newest: NOT RUN: no Python 3.12 or later was found; set NEWEST=/path/to/python'; \
	  echo '================================================================================'; \
	else $(MAKE) --no-print-directory run-newest; fi

.PHONY: run-newest
run-newest: $(NEWEST_VENV)/.all
	$(NEWEST_VENV)/bin/python -c 'import jax, sys; print("Python", sys.version.split()[0], "jax", jax.__version__)'
	$(NEWEST_VENV)/bin/python $(PYTEST) -m 'not slow and not peers' $(CORE)

format: $(VENV)/.all  ## write the format that lint asks for
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:  ## the virtual environments and caches
	rm -rf $(VENV) $(NEWEST_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
