# make install   .venv with everything in it, mipipe included
# make demo      the whole path on this machine: capture, profile, plan, train, compare
# make test      all unmarked tests (test-slow: the rest); make lint: ruff and mypy
# make docs      the site, into site/; its outputs and pictures: docs/make_outputs.py, docs/make_pictures.py
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Bytecode is written when a module is first imported: without it every worker process would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-slow lint docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 found; say which with make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ $(PYTHON) -m pip install -q virtualenv && $(PYTHON) -m virtualenv -q $(VENV); }
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m mipipe.planner.warm
	touch $@

demo: install
	$(BIN)/python examples/train_moe.py

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy -p mipipe

docs: install
	$(BIN)/python -c 'import material, mkdocstrings' 2>/dev/null || $(BIN)/python -m pip install -q --no-compile \
		--disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site

clean:
	rm -rf $(VENV) build dist demo site *.egg-info .mypy_cache .ruff_cache .pytest_cache
