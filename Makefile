# `make` alone lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv
STAMP := $(VENV)/.installed
SEED := 0

# Found before the virtual environment goes first on PATH. Another one: make setup PYTHON=python3.12
ifndef PYTHON
PYTHON := $(shell command -v python3)
endif
# `xtuner` runs `python` and `torchrun` from PATH.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help setup lint test test-random coverage demo bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything in it (6.4 GB, about 4 minutes; at once where done)

$(STAMP): requirements.txt requirements-dev.txt pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo 'error: there is no python3 on PATH; install Python 3.11 or 3.12' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else \
	  "error: $(PYTHON) is Python %d.%d; the pinned packages need 3.11 or 3.12: make setup PYTHON=/path/to/python3.11" % v)'
	@echo '[1/5] virtual environment $(VENV) by $(PYTHON)'
	@test -x $(VENV)/bin/python || "$(PYTHON)" -m venv $(VENV)
	@echo '[2/5] requirements.txt: 6.4 GB, 3 to 4 minutes on a fast line'
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@echo '[3/5] sam2 1.1.0'
	@SAM2_BUILD_CUDA=0 $(VENV)/bin/pip install --quiet --disable-pip-version-check \
	  --no-build-isolation --no-deps sam2==1.1.0
	@echo '[4/5] requirements-dev.txt'
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@echo '[5/5] this project, editable'
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(VENV)/bin/pip check
	@touch $@

lint: $(STAMP) ## ruff, mypy and the import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

test: $(STAMP) lint ## lint and every test, always in the same order
	$(PYTEST)

test-random: $(STAMP) ## every test in random order (SEED=0; the same seed, the same order)
	$(PYTEST) -p randomly --randomly-seed $(SEED)

# By lines, of the test processes: what the programs they start run is not counted.
coverage: $(STAMP) ## every test, and which lines of the package they ran
	$(PYTEST) --cov=projects/llava_sam2_rl --cov-report=term-missing:skip-covered

demo: $(STAMP) ## train the tiny model in minutes on a CPU and show what changed (SEED=0)
	$(VENV)/bin/python tools/demo.py --seed $(SEED)

# learn comes last: it trains for hours.
BENCHMARKS := step rollout logprobs gumbel gumbel-step return-trip teacher growth scale data learn

bench: $(STAMP) ## run every benchmark and rewrite docs/benchmarks.md (hours; BENCHMARKS="step rollout")
	@set -e; for name in $(BENCHMARKS); do \
	  $(VENV)/bin/python tools/benchmark.py $$name --update-docs; done

clean: ## remove caches and build folders (.venv, data and work_dirs stay)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .coverage
	find projects tests tools configs -name __pycache__ -type d -prune -exec rm -rf {} +
