# Every command of the project. `make demo` and `make test` set themselves up on a fresh machine.
VENV ?= .venv
PYTHON ?= python3.11
PY := $(VENV)/bin/python
READY := $(VENV)/.ready-$(shell cat setup.py constraints.txt | sha256sum | cut -c1-12)
export PATH := $(abspath $(VENV)/bin):$(PATH)

# GPUs are used where there are any; without, two ranks share the cores
ifeq ($(shell command -v nvidia-smi),)
export DS_ACCELERATOR := cpu
# Large activations come in pages of 2 MB, not 4 kB: 1.1 (demo) to 1.3 times (LiT) the samples a second on 2 cores
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
DEEPSPEED := $(VENV)/bin/deepspeed --num_gpus $(or $(RANKS),2)
else
DEEPSPEED := $(VENV)/bin/deepspeed
endif

.PHONY: help setup check test test-all test-min bench soak demo clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## .venv with the tested versions

# the stamps of other versions go first: they must not be believed again after this
$(READY):
	rm -f $(VENV)/.ready-*
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel
	$(PY) -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[tools,dev]'
	touch $@

check: $(READY)  ## ruff, format, import contracts, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

# a file at a time: its tests share what they have set up
ALL_CORES := -n logical --maxprocesses 4 --dist loadfile
PYTEST := $(PY) -m pytest -q $(ALL_CORES)

test: $(READY)  ## the test suite, under 15 minutes on 2 cores
	$(PYTEST) -m 'not slow'

test-all: $(READY)  ## the slow ones: real launchers at every stage, whole pipelines; CI runs them after `make test`
	$(PYTEST) -m 'slow and not soak'

test-min:  ## the unit tests on the oldest versions that setup.py admits, in an environment of their own
	bash tests/oldest.sh $(PYTHON) $(ALL_CORES)

# The peers pin other versions: an environment of their own, which finds what both share (torch) in ours.
BENCH := .venv-bench
DATA := data/iconcaps
PEERS := open_clip_torch==3.3.0 webdataset==0.2.86 pandas python-dateutil six

$(BENCH)/.ready: | $(READY)
	rm -rf $(BENCH)
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(PEERS)
	$(PY) -c "import site; print(site.getsitepackages()[0])" > "$$(echo $(BENCH)/lib/python3*/site-packages)/zz_ours.pth"
	touch $@

bench: $(BENCH)/.ready $(DATA)/dataset.json  ## side by side with the peers; writes tests/benchmarks/results
	$(PY) -m tests.benchmarks.data --peers $(BENCH)/bin/python
	$(PY) -m tests.benchmarks.train --peers $(BENCH)/bin/python
	$(PY) -m tests.benchmarks.loss
	$(PY) -m tests.benchmarks.checkpoint --out tests/benchmarks/results/checkpoint.md

soak: $(READY)  ## fuzzing the data engine, killed data commands, a hang at default settings, 50 killed runs; writes tests/soak/results
	$(PY) -m tests.soak.fuzz --minutes 5 --out tests/soak/results/fuzz.md
	$(PY) -m tests.soak.chain --size 64 --out tests/soak/results/chain.md
	$(PY) -m pytest -q -m soak
	$(PY) -m tests.soak.kills --kills 50 --out tests/soak/results/kills.md

# -- make demo: real data -> pretrain -> evaluate -> export -> fine-tune; each step is skipped where its result exists --

RUN := runs/clip_iconcaps
EXPORT := exports/clip_iconcaps

demo: $(EXPORT)/open_clip/README.md runs/linear_probe/.done runs/coop/.done  ## the main job on real data
	@$(PY) -m pretrain.report.scores $(RUN) runs/linear_probe runs/coop
	@echo "pictures: $(DATA)/contact_sheet.png   report: $(RUN)/report.html   export: $(EXPORT)"

$(DATA)/dataset.json: | $(READY)
	$(PY) -m data_tools build --recipe iconcaps --out $(DATA)

$(RUN)/.done: pretrain/configs/clip_iconcaps.yaml | $(DATA)/dataset.json
	$(DEEPSPEED) pretrain/main.py --config $<
	touch $@

$(EXPORT)/open_clip/README.md: $(RUN)/.done
	$(PY) pretrain/export.py $(RUN) $(EXPORT)/diptych --format diptych
	$(PY) pretrain/export.py $(RUN) $(EXPORT)/open_clip --format open_clip --pairs '$(DATA)/test-00000.tar'
	$(PY) pretrain/evaluate.py $(EXPORT)/open_clip --config pretrain/configs/clip_iconcaps.yaml

runs/linear_probe/.done runs/coop/.done: runs/%/.done: finetune/configs/%.yaml | $(EXPORT)/open_clip/README.md
	$(DEEPSPEED) finetune/main.py --config $< base=$(EXPORT)/diptych
	touch $@

clean:  ## remove runs, exports and built data; keep the environment
	rm -rf runs data exports build dist *.egg-info
