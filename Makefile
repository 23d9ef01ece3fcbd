# Every target sets itself up: `make demo` on a clean clone needs Python 3.11 or newer and PyPI, nothing else.
#   make PYTHON=python3.12 ...      another interpreter
#   make TORCH_FROM="--index-url https://download.pytorch.org/whl/cpu" ...
#                                   where torch comes from: on Linux, PyPI's own wheel brings the CUDA libraries along

PYTHON ?= python3
TORCH_FROM ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two test processes of one thread each: torch would otherwise start a thread a core in both, and they fight.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow style bench clean

help:
	@echo "make demo       train the tiny model three ways and write out/demo/"
	@echo "make test       style, then every test that takes seconds"
	@echo "make test-slow  the tests that take minutes"
	@echo "make style      format the code and fix what ruff can fix"
	@echo "make bench      time the reducers"
	@echo "make clean      remove out/, caches and build folders; $(VENV) stays"

# torch by itself and first: everything after it finds it there and asks no index for another build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt $(TORCH_FROM) torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/saccade demo --output out/demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not gpu"

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/selection.py

clean:
	rm -rf out build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
