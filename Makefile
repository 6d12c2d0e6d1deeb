# Every command of the project. `make demo` and `make test` set themselves up on a fresh machine.
VENV ?= .venv
PYTHON ?= python3.11
PY := $(VENV)/bin/python
READY := $(VENV)/.ready-$(shell cat setup.py constraints.txt | sha256sum | cut -c1-12)
export DIPTYCH_RUNS ?= runs

.PHONY: help setup check test test-all test-min demo bench clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## .venv with the tested versions, DeepSpeed's CPU extension built

$(READY):
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel ninja
	$(PY) -m pip install --disable-pip-version-check --progress-bar on --constraint constraints.txt --editable '.[tools,dev]'
	$(PY) -m pretrain.engine.prebuild
	touch $@

check: $(READY)  ## ruff, format, import contracts, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

test: $(READY)  ## the test suite, under 15 minutes on 2 cores
	$(PY) -m pytest -q -m 'not slow'

test-all: $(READY)  ## the slow ones: every stage, kills, whole pipelines
	$(PY) -m pytest -q -m slow

demo: $(READY)  ## real data -> pretrain -> evaluate -> export -> fine-tune, on a CPU
	VENV=$(VENV) bash tests/end_to_end/demo.sh

clean:  ## remove runs and built data, keep the environment
	rm -rf runs data exports build dist *.egg-info
