# make quickstart: from raw text to a trained language model, with everything it needs set up here.
# make help: everything else.
#
# PYTHON   the interpreter, 3.11 to 3.13       make PYTHON=python3.12 test
# VENV     the virtual environment's folder
# TORCH    what pip installs for torch         make TORCH=torch quickstart
# JOBS     test processes (one more for the tests, of which many wait)

SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
  "$$p" -c '$(SUPPORTED)' >/dev/null 2>&1 && echo "$$p" && break; done)
ifeq ($(PYTHON),)
PYTHON := python3
endif
endif
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ "$$n" -gt 8 ] && echo 8 || echo "$$n")
BIN := $(VENV)/bin
BASE := $(VENV)/.paralm-installed
DEV := $(VENV)/.paralm-dev-installed
PEERS := $(VENV)/.paralm-peers-installed
SOURCES := paralm kernels data_pipeline launch tests benchmarks tools

.DEFAULT_GOAL := help
.PHONY: help quickstart compare tracking test peers lint format scaling-study bench gpu-check gpu-wheels mutants chaos clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | awk -F ':.*  ## ' '{printf "make %-14s %s\n", $$1, $$2}'

quickstart: $(BASE)  ## text → tokenizer → trained model → report, on this machine, in minutes
	$(BIN)/paralm run quickstart

test: $(DEV) $(PEERS)  ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(($(JOBS) + 1)) --dist worksteal --durations 30 --durations-min 8 -m "not gpu" tests

lint: $(DEV)  ## ruff (lint and format) and mypy
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(DEV)  ## let ruff rewrite what lint would complain about
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

peers: $(PEERS)  ## what tests compare with: others' implementations, each in a folder of its own

mutants: $(DEV) $(PEERS)  ## plant known defects one at a time; each must make its test fail
	$(BIN)/python tools/mutants.py --jobs $(JOBS) $(MUTANTS)

chaos: $(DEV)  ## kill training at random moments, 30 times at least, and compare its losses; about 20 minutes
	OMP_NUM_THREADS=1 $(BIN)/python tools/chaos.py --out benchmarks/results/chaos.json

COMPARED := $(patsubst configs/compare/%.yaml,%,$(wildcard configs/compare/*.yaml))

compare: $(BASE)  ## every architecture at equal parameters and tokens on the quick start's text, curves in one figure
	@set -e; for name in $(COMPARED); do $(BIN)/paralm run compare/$$name; done
	$(BIN)/paralm compare $(COMPARED:%=runs/compare-%) --out runs/compare.png

TRACKED := $(patsubst configs/tracking/%.yaml,%,$(wildcard configs/tracking/parity_*.yaml))

tracking: $(BASE)  ## every architecture on parity, tested far past the trained lengths, curves in one figure
	@set -e; for name in $(TRACKED); do $(BIN)/paralm run tracking/$$name; done
	$(BIN)/paralm compare $(foreach name,$(TRACKED),runs/tracking-$(subst _,-,$(name))) --out runs/tracking.png

scaling-study: $(DEV)  ## docs/scaling.md: plans of 7B runs, 8 to 1,024 GPUs, 2K to 1M tokens; minutes
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scaling_study.py

bench: $(DEV) $(PEERS)  ## every benchmark that needs no GPU; results in benchmarks/results
	@set -e; for script in $(filter-out benchmarks/gpu_% benchmarks/scaling_study.py,$(wildcard benchmarks/*.py)); do \
	  echo "== $$script"; $(BIN)/python "$$script"; done

gpu-check: $(DEV) $(PEERS)  ## tests and benchmarks that need a GPU; one that fails ends no other (tools/gpu_check.py)
	$(BIN)/python tools/gpu_check.py --jobs $(JOBS) $(GPU_CHECK)

# For a GPU machine that has torch and reaches no registry: python3 tools/gpu_check.py --wheels .wheels --minutes 9
GPU_PYTHON ?= 3.12
GPU_WHEELS ?= annotated-doc annotated-types datasets deepspeed dill execnet hjson httpcore2 httpx2 huggingface_hub \
  hypothesis multiprocess pydantic pydantic_core pytest-timeout pytest-xdist pyyaml rich safetensors sentencepiece \
  shellingham truststore typer typing-inspection zstandard
WHEEL_TAGS := $(foreach n,17 24 27 28 34,--platform manylinux_2_$(n)_x86_64) --platform manylinux2014_x86_64
GPU_FETCH = $(BIN)/pip download -q --no-deps --only-binary=:all: --implementation cp --python-version $(GPU_PYTHON) $(WHEEL_TAGS)

gpu-wheels: $(DEV)  ## the packages and peers a bare GPU machine lacks, as wheels, into .wheels
	rm -rf .wheels && mkdir .wheels
	$(BIN)/pip list --format=freeze | grep -iE "^($$(echo $(GPU_WHEELS) | tr ' ' '|'))==" > .wheels/versions.txt
	grep -vi '^deepspeed==' .wheels/versions.txt > .wheels/binary.txt
	grep -i '^deepspeed==' .wheels/versions.txt > .wheels/source.txt
	$(GPU_FETCH) -d .wheels -r .wheels/binary.txt
	$(BIN)/pip wheel -q --no-deps --no-build-isolation -w .wheels -r .wheels/source.txt
	@rm .wheels/*.txt
	@set -e; grep -v '^#' tests/peers.txt | while IFS=: read -r name packages; do \
	  echo "peer: $$name"; $(GPU_FETCH) -d .wheels/peers/$$name $$packages; done
	$(GPU_FETCH) -d .wheels/peers/solver 'pararnn-torch>=0.17.4,<0.18' accelerated-scan
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(BIN)/pip wheel -q --no-deps --no-build-isolation \
	  -w .wheels/peers/mamba_ssm $$($(BIN)/python -c 'import sys; sys.path.insert(0, "benchmarks"); import mixers; print(*mixers.MAMBA_SSM)')
	cp .wheels/peers/mamba_ssm/*.whl .wheels/peers/solver
	@du -sh .wheels; ls .wheels .wheels/peers

clean:  ## remove what was built or installed here; runs stay
	rm -rf $(VENV) .wheels .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(BASE): pyproject.toml
	@"$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { \
	  found=$$("$(PYTHON)" --version 2>/dev/null); \
	  echo "make: paralm needs Python 3.11 to 3.13 with its venv module, and $(PYTHON) is $${found:-not there}; try make PYTHON=python3.12" >&2; \
	  exit 2; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(DEV): $(BASE)
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

$(PEERS): tests/peers.txt $(DEV)
	rm -rf $(VENV)/peers
	@set -e; grep -v '^#' tests/peers.txt | while IFS=: read -r name packages; do \
	  echo "peer: $$name"; $(BIN)/python -m pip install -q --no-deps --target $(VENV)/peers/$$name $$packages; done
	@touch $@
