# Two commands: `make demo` does the whole job on a laptop, `make test` proves it.
# `make test-slow` has the long runs with faults and new random draws, `make test-all` both.
PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready
TESTS  := $(VENV)/.ready-for-tests
# Test processes at once; each starts a Ray of its own (about 3 GB).
JOBS   ?= 2
PYTEST := $(VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-all setup clean

demo: $(READY)
	$(VENV)/bin/glide demo

test: $(TESTS)
	$(PYTEST) -m 'not chaos'

test-slow: $(TESTS)
	$(PYTEST) -m chaos

test-all: $(TESTS)
	$(PYTEST)

setup: $(READY)

# The stamp is written last: an installation that was interrupted is taken up again.
$(READY): pyproject.toml
	@test -x $(VENV)/bin/python || $(PYTHON) -c 'import sys; sys.exit("glide_ray needs Python 3.10 or newer; run make PYTHON=python3.11 ..." if sys.version_info < (3, 10) else 0)'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[cluster,emoji]'
	@touch $(READY)

$(TESTS): $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[cluster,emoji,test]'
	@touch $(TESTS)

clean:
	rm -rf $(VENV) runs .pytest_cache
