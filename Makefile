# Everything runs from .venv, which the targets make by themselves. Paths are relative and console scripts are never
# called, because a shebang cannot hold the space that the path to this folder may have.
PYTHON ?= python3
OUT ?= runs/ala2
PYTEST_ARGS ?=
# Files go whole to one of as many workers as there are cores: what a file prepares for its tests is prepared once. They
# go by name, since by number of tests those with few long ones would come last, and one core would wait for the other.
PARALLEL ?= -n auto --dist loadfile --no-loadscope-reorder

VENV := .venv
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help ala2 test test-all lint docs clean

help:
	@echo "make ala2       install, then the main job: alanine dipeptide at 300 K from 600 K training, into $(OUT)"
	@echo "make test       install, then the quick test suite"
	@echo "make test-all   install, then every test, the slow ones too"
	@echo "make lint       ruff, check and format"
	@echo "make docs       check that links, file names and commands in README, CONTRIBUTING and docs/ exist"
	@echo "make clean      remove caches and build leftovers; .venv and runs/ stay"
	@echo "Another Python: make test PYTHON=python3.12"

ala2: $(VENV)/.installed-core
	$(PY) -m openmm_tsf run examples/ala2.toml --out "$(OUT)"

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-all: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL) -m "" $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

docs: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "" tests/test_docs.py $(PYTEST_ARGS)

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: Python 3.11 or newer is needed, and '$(PYTHON)' is not; try make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# One stamp for each set of packages: with the stamp newer than both files nothing is installed again.
$(VENV)/.installed-core: setup.py constraints.txt | $(PY)
	@echo "installing into $(VENV) (the first time: some minutes)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: setup.py constraints.txt | $(PY)
	@echo "installing into $(VENV) with the test tools (the first time: some minutes)"
	$(INSTALL) -e ".[test]"
	@touch $@ $(VENV)/.installed-core
