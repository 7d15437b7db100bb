# Each target makes .venv and installs into it on its own, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench-constraints clean

demo: $(STAMP)
	$(BIN)/python recipes/vit_cifar10.py --config recipes/configs/vit_digits_demo.yaml

test: $(STAMP)
	$(BIN)/python -m pytest

bench-constraints: $(STAMP)
	$(BIN)/python tests/benchmarks/constraints.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(STAMP): pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) outputs build *.egg-info
