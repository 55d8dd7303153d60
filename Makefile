# What people type. PYTHON chooses the interpreter, VENV the virtual environment's place.
PYTHON ?= python3
VENV ?= .venv
bin := $(VENV)/bin
sources := dpmem kernels profiling tests examples

.PHONY: setup demo test test-all lint clean

setup: $(VENV)/.ready

# torch first and alone, so that nothing else decides which one; then the rest against the pins.
# The last line compiles numba's CPU loops into their cache: about half a minute, once.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(bin)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(bin)/python -m dpmem_kernels.warm
	touch $@

demo: setup
	$(bin)/dpmem demo

test: setup
	$(bin)/python -m pytest -q

test-all: setup
	$(bin)/python -m pytest -q -m "slow or not slow"

lint: setup
	$(bin)/ruff check $(sources)
	$(bin)/ruff format --check $(sources)
	$(bin)/mypy
	$(bin)/lint-imports

clean:
	rm -rf $(VENV) reports/demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
