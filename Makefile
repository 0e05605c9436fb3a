# `make` alone lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv
# What is installed: constraints/$(STACK).txt. Unless it is said, what $(VENV) holds already.
STACKS := default stock-xtuner newest
STACK := $(or $(patsubst $(VENV)/.stack-%,%,$(firstword $(wildcard $(VENV)/.stack-*))),default)
STAMP := $(VENV)/.stack-$(STACK)
SEED := 0

ifeq ($(filter $(STACK),$(STACKS)),)
$(error there is no stack '$(STACK)'; there are: $(STACKS))
endif

# Without their dependencies: sam2's build needs the torch that is there; xtuner's metadata do not fit
# the default stack, stock-xtuner.txt has xtuner itself, and newest has none (constraints/*.txt).
NO_DEPS := sam2==1.1.0
LAST_MINOR := 13
ifeq ($(STACK),default)
NO_DEPS += xtuner==0.2.0
else ifeq ($(STACK),stock-xtuner)
LAST_MINOR := 12
endif

# The first Python in range, of those on PATH; where that is a virtual environment's, what it was made
# by. Another one: make setup PYTHON=/path/to/python3.12
RANGE := 3.11 to 3.$(LAST_MINOR)
OTHER := make setup PYTHON=/path/to/python3.11
IN_RANGE := (3, 11) <= sys.version_info[:2] <= (3, $(LAST_MINOR))
ifndef PYTHON
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; $(IN_RANGE) or sys.exit(1); print(sys._base_executable)' 2>/dev/null \
  && break; done)
endif
# `xtuner` runs `python` and `torchrun` from PATH, DeepSpeed `ninja`.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help setup lint test test-stacks test-stack test-random coverage demo bench audit clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything in it (6.4 GB, about 4 minutes; STACK=newest)

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet

$(STAMP): constraints/common.txt constraints/$(STACK).txt requirements-dev.txt pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo 'error: no Python $(RANGE) on PATH: $(OTHER)' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; $(IN_RANGE) or sys.exit("error: $(PYTHON) is Python %d.%d, the stack $(STACK) needs $(RANGE): $(OTHER)" % sys.version_info[:2])'
	@echo '[1/5] virtual environment $(VENV) by $(PYTHON)'
	@for old in $(filter-out $(STAMP),$(wildcard $(VENV)/.stack-*)); do \
	  echo "      it held another stack ($${old#$(VENV)/.stack-}): made anew"; rm -r $(VENV); done
	@rm -f $(STAMP)
	@test -x $(VENV)/bin/python || "$(PYTHON)" -m venv $(VENV)
	@echo '[2/5] constraints/$(STACK).txt: 6.4 GB, 3 to 4 minutes on a fast line'
	@$(PIP) install -r constraints/$(STACK).txt
	@echo '[3/5] $(NO_DEPS)'
	@SAM2_BUILD_CUDA=0 $(PIP) install --no-build-isolation --no-deps --ignore-requires-python $(NO_DEPS)
	@echo '[4/5] requirements-dev.txt and this project, editable'
	@$(PIP) install -r requirements-dev.txt
	@$(PIP) install --no-build-isolation --no-deps -e .
	@echo '[5/5] check'
	@$(VENV)/bin/python tools/check_environment.py constraints/$(STACK).txt $(NO_DEPS)
	@touch $@

lint: $(STAMP) ## ruff, mypy and the import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

# A crashed worker ends the run with its test named: replaced, it can leave xdist waiting for ever.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile \
  --max-worker-restart 0

test: $(STAMP) lint ## lint and every test, always in the same order
	$(PYTEST)

# What depends on the versions: network, losses, checkpoints, launch, training on one rank and on two.
STACK_TESTS := tests/test_utils tests/test_losses tests/test_models tests/test_export.py \
  tests/test_hooks/test_checkpoint.py tests/test_engine tests/test_training.py \
  tests/test_tools/test_train.py tests/test_tools/test_distributed_training.py tests/test_stacks.py

test-stacks: ## the tests that depend on versions, on the other two stacks (.venv-<stack>, 12 GB)
	@for stack in $(filter-out default,$(STACKS)); do \
	  $(MAKE) --no-print-directory test-stack STACK=$$stack VENV=.venv-$$stack || exit; done

test-stack: $(STAMP)
	$(PYTEST) $(STACK_TESTS)

test-random: $(STAMP) ## every test in random order (SEED=0; the same seed, the same order)
	$(PYTEST) -p randomly --randomly-seed $(SEED)

# By lines, of the test processes: what the programs they start run is not counted.
coverage: $(STAMP) ## every test, and which lines of the package they ran
	$(PYTEST) --cov=projects/llava_sam2_rl --cov-report=term-missing:skip-covered

demo: $(STAMP) ## train the tiny model in minutes on a CPU and show what changed (SEED=0)
	$(VENV)/bin/python tools/demo.py --seed $(SEED)

# learn comes last: it trains for hours.
BENCHMARKS := step trl reward-step rollout logprobs gumbel gumbel-step return-trip propagation teacher growth scale zero data learn

bench: $(STAMP) ## run every benchmark and rewrite docs/benchmarks.md (hours; BENCHMARKS="step rollout")
	@set -e; for name in $(BENCHMARKS); do \
	  $(VENV)/bin/python tools/benchmark.py $$name --update-docs; done

# Asks the registry for what is known of each version; pip-audit itself is no part of a stack.
audit: $(STAMP) ## known vulnerabilities of what is installed (docs/security.md has what they mean here)
	$(PIP) install --target $(VENV)/audit pip-audit
	PYTHONPATH=$(VENV)/audit $(VENV)/bin/python -m pip_audit --path $(wildcard $(VENV)/lib/python*/site-packages)

clean: ## remove caches and build folders (.venv*, data and work_dirs stay)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .coverage
	find projects tests tools configs -name __pycache__ -type d -prune -exec rm -rf {} +
