# `make demo` and `make test` set up everything they need in .venv; Python 3.11+ and make
# are all that must be there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test lint format clean

demo: $(READY)
	$(BIN)/python examples/pretrain_lm.py --preset tiny --compare dense,block_sparse \
	  --sparsity 0.9 --updater rigl --out runs/demo

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup --durations 15

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV)* runs build dist
