# Needs git, make and Python 3.11 or newer; all else is installed into .venv, once and again when pyproject.toml changes.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

# The tests start hundreds of interpreters: what these import is made bytecode once, whatever the environment says.
export PYTHONDONTWRITEBYTECODE =

# Two workers; one of them runs what is live (tests/conftest.py).
PYTEST := $(BIN)/pytest --numprocesses=2

.PHONY: help run check test reproduce lint fmt types docs compiled bench clean

help:
	@echo "make run    one simulated run; e.g. make run ARGS=workload.qps=30"
	@echo "make reproduce   draw the paper's figures, running what is missing; e.g. make reproduce ARGS=fig6"
	@echo "make check  lint, types, and the unit tests that are quick: what to run before a commit"
	@echo "make test   lint, types, and the whole test suite with at least 92 % line coverage of block/"
	@echo "            some of it by markers: .venv/bin/pytest -n 2 -m 'not live and not slow'"
	@echo "            live = needs vLLM, slow = takes seconds"
	@echo "make lint   ruff and the import contracts      make fmt    let ruff rewrite"
	@echo "make types  mypy                               make bench  run benchmarks/"
	@echo "make docs   check the links of docs/ and build the site into site/"
	@echo "make clean  remove caches and build outputs; keeps .venv and artifacts/"

run: .venv/.run
	$(BIN)/python run.py scheduler=block model=llama2-7b $(ARGS)

reproduce: .venv/.run
	$(BIN)/python scripts/reproduce.py $(ARGS)

check: lint types
	$(PYTEST) tests/unit -m "not live and not slow"

test: .venv/.dev
	$(MAKE) --no-print-directory --jobs=2 --output-sync types compiled docs lint
	$(PYTEST) --cov=block --cov-report=term:skip-covered --cov-fail-under=92 --durations=15

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pre-commit validate-config

types: .venv/.dev
	$(BIN)/mypy
	$(BIN)/mypy benchmarks  # by itself: a module there has the name of one at the top

docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet  # strict: a warning fails it

# What numba compiles once, by a run: else both workers of the tests would wait for it.
compiled: .venv/.dev
	@runs=$$(mktemp --directory) && $(BIN)/python run.py workload.num_requests=1 tracking=none runs_dir=$$runs >/dev/null; \
		status=$$?; rm -r "$$runs"; exit $$status

fmt: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev
	@set -e; for file in benchmarks/forecast.py benchmarks/prefix.py benchmarks/run.py benchmarks/scale.py benchmarks/startup.py benchmarks/push.py benchmarks/gateway.py; do echo "== $$file"; $(BIN)/python "$$file"; done

clean:
	rm -rf build dist site *.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv --upgrade-deps .venv  # the pip that comes with Python 3.11 resolves twice as long

.venv/.run: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

# The tests run real vLLM on the CPU. vLLM pulls in builds of these three that do not match its torch, and needs none.
.venv/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev,cpu]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch .venv/.run $@
