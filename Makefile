# Both commands of the README work on a bare machine with Python >= 3.11, git and make: each creates the virtual
# environment .venv and installs into it first. The stamp's name carries a checksum of pyproject.toml and of this
# folder, so that the installation is done once and again only when one of them changes.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(shell { cat pyproject.toml; pwd; } | cksum | cut -d ' ' -f 1)
ARGS ?=
# Two processes train the same bits as one (docs/reliability.md). The demo takes them where there are two cores, unless ARGS
# says how many there shall be, or something that need not divide by two.
CORES ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
# GPUs are all taken by devices=auto.
GPUS ?= $(wildcard /dev/nvidiactl /dev/dxg)
CHOSEN := $(strip $(foreach key,devices= strategy= batch_size= accumulate=,$(findstring $(key),$(ARGS))))
TWO_PROCESSES = $(if $(CHOSEN)$(GPUS)$(filter 1,$(CORES)),,devices=2 strategy=ddp)
TEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

# The installation compiles nothing (20 000 files of other packages in two minutes): a module is compiled when it is first
# imported, and its bytecode is kept whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test lint venv shell docs reference peers mutants

help: ## this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /make \1  \t/'

demo: $(STAMP) ## train, fold, pack, run and report on the small model (ARGS="bits=4 seed=1")
	$(PYTHON) train.py $(TWO_PROCESSES) $(ARGS)

test: $(STAMP) ## all tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q $(TEST_ARGS)

N ?= 25
SEED ?= 0
mutants: $(STAMP) ## change N lines at random, one at a time, and see a test fail for each (N=25 SEED=0); an hour
	OMP_NUM_THREADS=1 $(PYTHON) tests/mutants/mutate_lines.py $(N) $(SEED)

lint: $(STAMP) ## style, formatting, types, import directions
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

venv: $(STAMP) ## only the virtual environment

shell: $(STAMP) ## a shell in which `python train.py ...` and `qvgen ...` work (as after: source .venv/bin/activate)
	@bash --rcfile <(cat ~/.bashrc 2>/dev/null; echo 'source "$(CURDIR)/$(VENV)/bin/activate"') -i

docs: $(STAMP) ## the site of docs/ with the API reference, in build/site; a broken link or reference is an error
	$(PYTHON) -m mkdocs --version >/dev/null 2>&1 || $(PYTHON) -m pip install --no-compile --quiet --disable-pip-version-check -e '.[docs]'
	$(PYTHON) -m mkdocs build --strict

reference: $(STAMP) ## docs/configuration.md from the schema and conf/
	$(PYTHON) -m qvgen.config.reference > docs/configuration.md.new && mv docs/configuration.md.new docs/configuration.md

peers: $(STAMP) ## what `qvgen benchmark kernels` also measures: torchao, ONNX Runtime
	$(PYTHON) -m pip install --no-compile --quiet --disable-pip-version-check -e '.[peers]'

$(STAMP): pyproject.toml
	@set -e; \
	if [ ! -x $(PYTHON) ]; then \
	  found=; \
	  for candidate in $(BOOTSTRAP) python3.11 python3.12 python3.13 python3; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "no Python >= 3.11 found (looked for python3.11, python3.12, python3.13, python3);" \
	      "install one or say where it is: make BOOTSTRAP=/path/to/python" >&2; exit 1; \
	  fi; \
	  $$found -m venv $(VENV) || { rm -rf $(VENV); echo "$$found has no working venv module;" \
	    "on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	fi
	$(PYTHON) -m pip install --no-compile --quiet --disable-pip-version-check -e '.[dev]'
	@rm -f $(VENV)/.installed-*; touch $@
