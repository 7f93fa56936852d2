PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SETUP := setup.cfg pyproject.toml constraints.txt

.PHONY: demo test lint bench bench-weightings clean

demo: $(VENV)/.demo
	$(BIN)/python -m torch_pathloss $(DEMO)

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.bench
	$(BIN)/python -m bench.overhead
	$(BIN)/python -m bench.compiled
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.launches
	$(BIN)/python -m bench.plots

bench-weightings: $(VENV)/.bench $(VENV)/.demo
	$(BIN)/python -m bench.weightings

clean:
	rm -rf $(VENV) build *.egg-info

# A constraint on torch comes first: an open range would take several GB of CUDA packages.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python $(SETUP)
	$(INSTALL) --editable '.[demo]'
	touch $@

$(VENV)/.test: $(BIN)/python $(SETUP)
	$(INSTALL) --editable '.[test,demo,lightning,profile]'
	touch $@

$(VENV)/.bench: $(BIN)/python $(SETUP)
	$(INSTALL) --editable '.[bench]'
	touch $@
