# `make run` and `make test` need Python 3.11 or newer, and nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help run test faults bench-train bench-memory generate verify lint fmt types clean
.DEFAULT_GOAL := help

help: ## This list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: $(READY) ## Train the tiny model on real text; run again to resume
	@$(BIN)/python trainer_image/train_deepspeed.py --preset tiny || test $$? -eq 75 # saved and stopped by Ctrl-C

test: $(READY) ## All tests
	@$(BIN)/python -m pytest

faults: $(READY) ## The long kill tests: 2,000 kills, counts add up over runs
	@$(BIN)/python tests/faults/kill_harness.py --kills 2000 --engine-kills 200

bench-train: $(READY) ## On a GPU: ours beside stock mamba_ssm (DATA=prepared dataset, PRESET=1b_mamba)
	@$(BIN)/python tests/perf/train_vs_stock.py --preset $(or $(PRESET),1b_mamba) --data $(DATA) --out build/bench

bench-memory: $(READY) ## On a GPU: planned against rehearsed memory of one rank of N
	@$(BIN)/python tests/perf/memory_rehearsal.py --out build/bench

generate: $(READY) ## Write the generated files
	@$(BIN)/python -m mamba_trainer.reference > docs/configuration.md

verify: generate ## Fail if a generated file was out of date
	@git diff --exit-code -- docs/configuration.md

lint: $(READY) ## Style, imports, layers
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

fmt: $(READY) ## Format
	@$(BIN)/ruff check --fix-only . && $(BIN)/ruff format .

types: $(READY) ## Type check
	@$(BIN)/mypy

clean: ## Remove the virtual environment
	rm -rf $(VENV)

$(READY): trainer_image/pyproject.toml constraints.txt requirements-dev.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python is needed: install Python 3.11 or newer, or set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up $(VENV) (about 5 GB with PyTorch's CUDA libraries; once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt
	@touch $@
