# Two commands on a bare machine with python3.11 and make: `make demo` and `make test`.
# The first Python that runs, is recent enough, and can make environments.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo $$python; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
FUZZ := .venv-fuzz
NEWEST := .venv-newest
LOWEST := .venv-lowest
# The range of torch begins at 2.11, but 2.13 is the oldest with a build for processors alone that pip finds without an
# index of its own: `make test-lowest` takes that one, and every other package at its floor. TORCH=2.11.0 takes another.
TORCH ?= 2.13.0
# What builds the package, in an environment of pip's own, is locked as well: by the one or the other, as pip is old or new.
LOCKED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
READY := $(VENV)/.ready
DEMO := outputs/demo.png
PROMPT ?= a large red circle at the left on a white background

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-newest test-lowest lock gpu-wheels test-reliability test-attacks test-mutations test-parallel fuzz lint types parity features bench clean

help:  ## say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /: /' | sort

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || \
		{ echo "no Python 3.11 or later with its venv module found (Debian: apt install python3.11-venv)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (torch is large; once only)"
	@$(LOCKED) $(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[test]'
	@touch $@

lock:  ## write constraints.txt: the newest versions that the ranges admit, which `make demo` and `make test` install
	@$(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python $(PIP_INSTALL) --dry-run --ignore-installed --report .venv-lock/report.json '.[test]'
	@.venv-lock/bin/python tools/requirements.py lock .venv-lock/report.json > .venv-lock/constraints.txt
	@mv .venv-lock/constraints.txt constraints.txt
	@rm -rf .venv-lock

demo: $(READY)  ## make a picture with the shipped model, and name it
	@mkdir -p $(dir $(DEMO))
	@echo "prompt: $(PROMPT)"
	@$(BIN)/safelight generate "$(PROMPT)" --seed 7 --overwrite -o $(DEMO)

lint: $(READY)  ## ruff
	@$(BIN)/ruff check src tests training benchmarks examples tools
	@$(BIN)/ruff format --check --quiet src tests training benchmarks examples tools || \
		{ echo "not formatted: run $(BIN)/ruff format"; exit 1; }

types: $(READY)  ## mypy --strict
	@$(BIN)/mypy

test: lint types  ## lint, types and the tests that take minutes
	@$(BIN)/python -m pytest -q -n 3 --dist loadfile

test-all: lint types  ## as test, with the slow tests
	@$(BIN)/python -m pytest -q --slow -n 3 --dist loadfile

# With scipy too, without which there are no solvers `lms` and `..._beta`.
test-newest:  ## the tests with the newest versions that the ranges admit, in an environment of their own
	@test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	@$(NEWEST)/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager -e '.[test]' scipy
	@$(NEWEST)/bin/python -m pytest -q -n 3 --dist loadfile

test-lowest:  ## the tests with the lowest versions that the ranges admit, in an environment of their own
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python tools/requirements.py floors torch==$(TORCH) > $(LOWEST)/floors.txt
	@$(LOWEST)/bin/python $(PIP_INSTALL) -c $(LOWEST)/floors.txt -e '.[test]'
	@$(LOWEST)/bin/python -m pytest -q -n 3 --dist loadfile

gpu-wheels: $(READY)  ## fetch what a machine with a GPU may lack for `python -m benchmarks.gpu_day`, as wheels
	@$(BIN)/python -m benchmarks.gpu_wheels

test-reliability: $(READY)  ## the tests of faults: deaths, hangs, kill -9, full disks
	@$(BIN)/python -m pytest -q --slow tests/reliability tests/serving tests/runtime

test-attacks: $(READY)  ## attacks on a live server; writes the table of docs/reliability.md
	@$(BIN)/python -m tests.reliability.attacks --write docs/reliability.md

test-mutations: $(READY)  ## break each promise in a copy, and see its test fail
	@$(BIN)/python -m tests.mutations

test-parallel: $(READY)  ## every layout of devices on ranks of the CPU; writes docs/parallel.md
	@$(BIN)/python -m pytest -q --slow tests/parallel --parallel-report docs/parallel.md

fuzz: $(READY)  ## schemathesis against live servers, from an environment of its own
	@test -x $(FUZZ)/bin/schemathesis || { $(PYTHON) -m venv $(FUZZ) && \
		$(FUZZ)/bin/python $(PIP_INSTALL) 'schemathesis>=4.32,<5'; }
	@$(BIN)/python -m tests.reliability.fuzz --schemathesis $(FUZZ)/bin/schemathesis

parity: $(READY)  ## compare with Diffusers, and write docs/parity.md
	@$(BIN)/python -m pytest -q tests/families/test_parity.py --slow --parity-report docs/parity.md

features: $(READY)  ## every pair of features on tiny models of all families; writes docs/features.md
	@$(BIN)/python -m pytest -q --slow tests/features --features-report docs/features.md

bench: $(READY)  ## the CPU benchmarks against Diffusers
	@for script in startup operations overhead loading denoising_step serving; do $(BIN)/python -m benchmarks.$$script || exit 1; done

clean:  ## remove the environment and what was made
	rm -rf $(VENV) $(FUZZ) $(NEWEST) $(LOWEST) .venv-lock outputs build dist .pytest_cache .mypy_cache .ruff_cache
