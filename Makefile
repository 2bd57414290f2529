# `make demo` does the whole job on a laptop, `make test` proves it, `make check` reads the code.
# `make test-slow` has the long runs with faults and new random draws, `make test-all` both.
PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready
TESTS  := $(VENV)/.ready-for-tests
PIP    := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Test processes at once; each starts a Ray of its own (about 3 GB).
JOBS   ?= 2
PYTEST := $(VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-all check setup clean

demo: $(READY)
	$(VENV)/bin/glide demo

test: $(TESTS)
	$(PYTEST) -m 'not slow'

test-slow: $(TESTS)
	$(PYTEST) -m slow

test-all: $(TESTS)
	$(PYTEST)

# Format, lint, types, the order of imports, and the grammar of the lowest supported Python.
check: $(TESTS)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest $$(find tests -name test_layering.py -o -name test_package.py)

setup: $(READY)

# The stamp is written last: an installation that was interrupted is taken up again.
$(READY): pyproject.toml constraints.txt
	@test -x $(VENV)/bin/python || $(PYTHON) -c 'import sys; sys.exit("glide_ray needs Python 3.10 or newer; run make PYTHON=python3.11 ..." if sys.version_info < (3, 10) else 0)'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[cluster,emoji]'
	@$(VENV)/bin/python -m compileall -q glide_ray  # pip does so only if not --editable
	@touch $(READY)

$(TESTS): $(READY)
	$(PIP) --editable '.[cluster,emoji,test]'
	@touch $(TESTS)

clean:
	rm -rf $(VENV) runs .pytest_cache
