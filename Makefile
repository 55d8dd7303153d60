# What people type. PYTHON chooses the interpreter, VENV the virtual environment's place.
PYTHON ?= python3
VENV ?= .venv
bin := $(VENV)/bin
sources := dpmem kernels profiling tests examples reports

next := $(VENV)/triton-next
timm_then := $(VENV)/timm-1.0.9
# Whole files, so that what a file compiles once is compiled once.
parallel := --numprocesses 2 --dist loadfile

.PHONY: setup demo test test-all validation verify verify-next bench lint clean

setup: $(VENV)/.ready

# torch first and alone, so that nothing else decides which one; then the rest against the pins.
# The last line compiles numba's CPU loops into their cache: a minute or two, once.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(bin)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(bin)/python -m dpmem_kernels.warm
	touch $@

demo: setup
	$(bin)/dpmem demo

test: setup
	$(bin)/python -m pytest -q $(parallel)

test-all: setup
	$(bin)/python -m pytest -q $(parallel) -m "slow or not slow"

# Every kernel beside what people use instead, in paired runs: writes reports/bench/kernels-*.
bench: setup
	PYTHONPATH=kernels $(bin)/python -m bench --threads 1 2

# Forecasts beside the peaks that others measured on GPUs: writes reports/validation/. Needs
# transformers, timm and torchvision (extra `examples`); an hour on two cores.
validation: setup $(timm_then)
	$(bin)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[examples]"
	PYTHONPATH=reports/validation $(bin)/python reports/validation/validate.py
	PYTHONPATH=$(timm_then):reports/validation \
		$(bin)/python reports/validation/timm_slopes.py --models 150
	PYTHONPATH=reports/validation $(bin)/python reports/validation/cpu_witness.py

# The timm that the measured runs were of, beside the one that the tests are run with.
$(timm_then): | $(VENV)/.ready
	$(bin)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ timm==1.0.9

# What a machine without a GPU can prove of the kernels, every one for every target: writes
# reports/kernels/verify.json and the table in kernels/README.md. Minutes; uses every core.
verify: setup
	PYTHONPATH=kernels $(bin)/python -m verify

# The Triton after ours, in an environment of its own (it needs a network once): every kernel has to
# compile with it. `make test-all` does the same wherever that environment has been made.
verify-next: $(next)/.ready
	PYTHONPATH=kernels $(next)/bin/python -m verify.aot

$(next)/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(next)
	$(next)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(next)/bin/python -m pip install --quiet --disable-pip-version-check triton==3.9.0
	touch $@

lint: setup
	$(bin)/ruff check $(sources)
	$(bin)/ruff format --check $(sources)
	$(bin)/mypy
	$(bin)/lint-imports

clean:
	rm -rf $(VENV) reports/demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
