# Two commands: `make demo` does the whole job on a laptop, `make test` proves it.
PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready
TESTS  := $(VENV)/.ready-for-tests

.PHONY: demo test setup clean

demo: $(READY)
	$(VENV)/bin/glide demo

test: $(TESTS)
	$(VENV)/bin/python -m pytest

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
