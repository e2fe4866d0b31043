# Two commands on a bare machine with python3.11 and make: `make demo` and `make test`.
# The first Python that runs, is recent enough, and can make environments.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo $$python; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
FUZZ := .venv-fuzz
READY := $(VENV)/.ready
DEMO := outputs/demo.png
PROMPT ?= a large red circle at the left on a white background

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-reliability test-parallel fuzz lint types parity features bench clean

help:  ## say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /: /' | sort

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || \
		{ echo "no Python 3.11 or later with its venv module found (Debian: apt install python3.11-venv)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (torch is large; once only)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

demo: $(READY)  ## make a picture with the shipped model, and name it
	@mkdir -p $(dir $(DEMO))
	@echo "prompt: $(PROMPT)"
	@$(BIN)/safelight generate "$(PROMPT)" --seed 7 --overwrite -o $(DEMO)

lint: $(READY)  ## ruff
	@$(BIN)/ruff check src tests training benchmarks examples
	@$(BIN)/ruff format --check --quiet src tests training benchmarks examples || \
		{ echo "not formatted: run $(BIN)/ruff format"; exit 1; }

types: $(READY)  ## mypy --strict
	@$(BIN)/mypy

test: lint types  ## lint, types and the tests that take minutes
	@$(BIN)/python -m pytest -q -n 3 --dist loadfile

test-all: lint types  ## as test, with the slow tests
	@$(BIN)/python -m pytest -q --slow

test-reliability: $(READY)  ## the tests of faults: deaths, hangs, kill -9, full disks
	@$(BIN)/python -m pytest -q --slow tests/reliability tests/serving tests/runtime

test-parallel: $(READY)  ## every layout of devices on ranks of the CPU; writes docs/parallel.md
	@$(BIN)/python -m pytest -q --slow tests/parallel --parallel-report docs/parallel.md

fuzz: $(READY)  ## schemathesis against live servers, from an environment of its own
	@test -x $(FUZZ)/bin/schemathesis || { $(PYTHON) -m venv $(FUZZ) && \
		$(FUZZ)/bin/python -m pip install --quiet --disable-pip-version-check 'schemathesis>=4.32,<5'; }
	@$(BIN)/python -m tests.reliability.fuzz --schemathesis $(FUZZ)/bin/schemathesis

parity: $(READY)  ## compare with Diffusers, and write docs/parity.md
	@$(BIN)/python -m pytest -q tests/families/test_parity.py --slow --parity-report docs/parity.md

features: $(READY)  ## every pair of features on tiny models of all families; writes docs/features.md
	@$(BIN)/python -m pytest -q --slow tests/features --features-report docs/features.md

bench: $(READY)  ## the CPU benchmarks against Diffusers
	@for script in startup operations overhead loading denoising_step serving; do $(BIN)/python -m benchmarks.$$script || exit 1; done

clean:  ## remove the environment and what was made
	rm -rf $(VENV) $(FUZZ) outputs build dist .pytest_cache .mypy_cache .ruff_cache
