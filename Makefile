# make demo   installs and runs the main job on a trained model
# make test   installs and runs every test
# make wheels fetches what the tests of OpenVINO run with: 140 MB, in build/
# make docs   builds the site in build/site, and fails on a warning or a link that leads nowhere
# make check  what CI runs: lint, types, docs, wheels, tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL := /bin/bash

# Packages that would overwrite bnfold's own onnxruntime, or that only tests use: each in a folder of its own.
WHEELS := build/wheels
SEPARATE := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),onnxruntime-openvino openvino)

.PHONY: demo test check docs lint types install wheels clean

install: $(STAMP)

# torch alone first: with it installed nothing else asks for another build of it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("bnfold needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

wheels: $(SEPARATE:%=$(WHEELS)/%/.installed)

$(WHEELS)/%/.installed: constraints.txt | $(STAMP)
	rm -rf $(@D)
	$(BIN)/pip install --quiet --no-deps -c constraints.txt --target $(@D) $*
	touch $@

demo: install
	@mkdir -p build
	$(BIN)/python -m bnfold export models/digits.py:digits_cnn --weights models/digits_cnn.safetensors \
		--data models/digits_heldout.npz --output build/digits_cnn.onnx

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

check: lint types docs wheels test

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
