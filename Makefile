# The doors into the project. Each does its own set-up first: a virtual environment in .venv at the
# versions of constraints.txt, and Debian packages where they may be installed. A set-up that was
# interrupted goes on where it stopped; a finished one costs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STATIC := $(wildcard bacalhau_jupyter/static/*.js)

.PHONY: help demo test kubo lab lint bench clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    run the first notebook on real data and print its table'
	@echo 'make test    every test; make test ARGS="tests/unit -k glob" for some'
	@echo 'make kubo    build a kubo (needs Go), against which later tests run, too'
	@echo 'make lab     JupyterLab on notebooks/'
	@echo 'make lint    style, types, imports, spelling'
	@echo 'make bench   figures beside other tools; make bench CASES="glob fanout" for some'

$(VENV)/.%: pyproject.toml constraints.txt tests/prepare.py
	@$(PYTHON) tests/prepare.py install $*
	@touch $@

demo: $(VENV)/.demo
	@$(BIN)/python -m tests.demo

test: $(VENV)/.test
	@$(PYTHON) tests/prepare.py debian chromium dockerd bwrap debootstrap
	@$(BIN)/python tests/services.py $(BIN)/python -m pytest $(ARGS)

kubo:
	@$(PYTHON) tests/prepare.py kubo

lab: $(VENV)/.lab
	@$(BIN)/python -m jupyterlab --notebook-dir=notebooks $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PYTHONPATH=node:. $(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python tests/budgets.py
	@$(BIN)/python tests/frontend.py $(STATIC)

bench: $(VENV)/.bench
	@$(PYTHON) tests/prepare.py debian dockerd
	@$(BIN)/python tests/services.py $(BIN)/python -m tests.bench $(CASES)

clean:
	rm -rf $(VENV) artifacts bench-out notebooks/data dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
