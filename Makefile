# Every target makes the environment it needs; a second call installs nothing.
PYTHON ?= python3
VENV ?= .venv
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

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m "not slow"

test-all: $(INSTALLED)
	$(VENV)/bin/python -m pytest

# Where this package meets ArviZ, NumPyro and BlackJAX: run on every Python that is supported.
test-seams: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m "seam and not slow"

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(INSTALLED)
	$(VENV)/bin/mypy

notebooks: $(INSTALLED)
	$(VENV)/bin/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb

bench: $(INSTALLED)
	for script in benchmarks/*.py; do $(VENV)/bin/python $$script || exit 1; done

clean:
	rm -rf $(VENV) .venv-* out .jax_cache .mypy_cache .pytest_cache .ruff_cache
