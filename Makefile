# Everything goes into .venv. `make demo` and `make test` do their own set-up; a second call installs nothing.
#   make demo      the main job, offline, on scikit-learn's digits
#   make test      all tests          (make test ARGS="-m 'not ray'" for those without Ray)
#   make lint      ruff, mypy, import layers
#   make setup     only the set-up    (make setup PYTHON=python3.12 to choose the interpreter)

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

.PHONY: setup demo test lint format clean

setup: $(READY)

demo: $(READY)
	$(BIN)/jem demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamp is newer than what decides what is installed. An interrupted set-up has no stamp and goes on.
$(READY): pyproject.toml ray_configs/constraints.txt
	@bash .ci/setup "$(VENV)" "$(PYTHON)"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
