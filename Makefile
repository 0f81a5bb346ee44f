# Everything runs in .venv, made on first use; `make clean` removes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test lint format doctor bench bench-cpu bench-serving bench-core soak clean

help: ## show what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

setup: $(READY) ## make the environment (SGLang and EconoServe)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: run 'make PYTHON=python3.12 $(MAKECMDGOALS)'" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (SGLang with torch: 11 GB on first use, some minutes)"
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode --editable '.[dev]'
	@touch $(READY)

demo: $(READY) ## start a server on the demo model, send it prompts, show what came of them
	@$(BIN)/python -m econoserve.demo

serve: $(READY) ## the demo's server, kept running until Ctrl-C
	@$(BIN)/python -m econoserve.demo --keep

# Two at a time, but for the servers, whose tests look at the time.
test: $(READY) ## all tests
	@$(BIN)/python -m pytest --ignore=tests/server --numprocesses=2 --dist=loadfile; \
	others=$$?; $(BIN)/python -m pytest tests/server && exit $$others

lint: $(READY) ## check style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(READY) ## format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

doctor: $(READY) ## check the installation
	@$(BIN)/econoserve doctor

bench: $(READY) ## compare with stock SGLang (about half an hour)
	@$(BIN)/python -m benchmark.scheduler_comparison.run

bench-cpu: $(READY) ## compare the CPU engine with torch_native and vLLM (about an hour; sets up vLLM)
	@$(BIN)/python -m benchmark.cpu_engine.run

bench-serving: $(READY) ## compare servers with stock SGLang and vLLM (some hours; can be resumed)
	@$(BIN)/python -m benchmark.serving --out build/serving

bench-core: $(READY) ## time the scheduler's planning (about a minute)
	@$(BIN)/python benchmark/core/plan_time.py

soak: $(READY) ## a long mixed load on a real server, after which nothing may be left (some minutes)
	@$(BIN)/python -m benchmark.soak.run

clean: ## remove the environment and what tools left behind
	rm -rf $(VENV) .venv-vllm .pytest_cache .ruff_cache .hypothesis python/*.egg-info *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
