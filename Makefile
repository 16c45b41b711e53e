# Every target makes the environment it needs; a second call installs nothing.
PYTHON ?= python3
VENV ?= .venv
# Two at a time, a file to a process: compiling takes most of the time, and one core at a time.
PYTEST = $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-all test-seams lint format types notebooks bench clean

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lehr needs Python 3.11 or newer; name one by: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(VENV)/bin/lehr demo

# Compiled without optimisation, which takes longer than what these tests then run.
test: $(INSTALLED)
	XLA_FLAGS=--xla_backend_optimization_level=0 $(PYTEST) -m "not slow"

# Compiled as users have it.
test-all: $(INSTALLED)
	$(PYTEST)

# Where this package meets ArviZ, NumPyro and BlackJAX: run on every Python that is supported.
test-seams: $(INSTALLED)
	$(PYTEST) -m "seam and not slow"

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(INSTALLED)
	$(VENV)/bin/mypy

notebooks: $(INSTALLED)
	XLA_FLAGS=--xla_cpu_multi_thread_eigen=false $(VENV)/bin/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb

bench: $(INSTALLED)
	for script in $$(ls benchmarks/*.py | grep -v report.py); do $(VENV)/bin/python $$script || exit 1; done
	$(VENV)/bin/python benchmarks/report.py

clean:
	rm -rf $(VENV) .venv-* out .jax_cache .mypy_cache .pytest_cache .ruff_cache
