# Everything runs in .venv, made from the pinned versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-all lint format docs bench clean

$(VENV)/base.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Weft needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[data,plots,serve,tokenizers-extra]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/base.stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/base.stamp  ## From raw text to a model that writes Python
	$(BIN)/weft quickstart $(ARGS)

test: $(VENV)/dev.stamp lint  ## What CI runs
	$(PYTEST) -m "not slow and not gpu and not net" -n 2 --dist loadfile

test-all: $(VENV)/dev.stamp lint  ## With slow tests and those that reach a package index
	$(PYTEST) -m "not gpu" -n 2 --dist loadfile

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev.stamp  ## Training speed against transformers, in one run
	$(BIN)/python benchmarks/train.py --out benchmarks/results/train-cpu.json

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
