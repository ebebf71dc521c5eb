# make demo         three daemons on this machine find each other, exchange a model and call each other
# make test         every test that needs no foreign peer
# make check        ruff, mypy, the layer rule
# make interop      tests against other libp2p implementations, which it installs
# make nat          NAT traversal: simulated boxes, then real daemons behind kernel NATs, as far as this machine allows
# make nat-figures  the figures of NAT traversal, as a table
# make bench        measurements beside other implementations, in one run
# make fuzz         every parser of bytes from the network, longer than `make test` does
# make soak         ten minutes of garbage on every port of a daemon that has to go on serving
#
# Everything runs in .venv, which is made here from the newest Python of 3.11 or later that is found.

.PHONY: demo test check interop nat nat-figures bench fuzz soak venv clean
.DEFAULT_GOAL := help

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# A version manager's stub may be there without the Python behind it, so each candidate is run.
define FIND_PYTHON
for candidate in $(PYTHON_FOR_VENV) python3.13 python3.12 python3.11 python3.14 python3; do \
    if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
        echo $$candidate; exit 0; \
    fi; \
done
endef

help:
	@sed -n '1,11s/^# *//p' Makefile

$(STAMP): pyproject.toml
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then \
	    echo "no Python 3.11 or later with venv found: install one (Debian: apt install python3 python3-venv)" >&2; \
	    exit 1; \
	fi; \
	[ -x $(PYTHON) ] || { echo "making $(VENV) with $$python"; $$python -m venv $(VENV); }
	@echo "installing into $(VENV)"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

venv: $(STAMP)

demo: $(STAMP)
	@$(VENV)/bin/lattica demo

test: $(STAMP)
	$(PYTHON) -m pytest -m 'not interop' --ignore=tests/interop --ignore=tests/bench --ignore=tests/fuzz --ignore=tests/nat

check: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q tests/arch

interop: $(STAMP)
	$(PYTHON) -m pytest tests/interop

nat: $(STAMP)
	@$(PYTHON) tests/nat/run.py

nat-figures: $(STAMP)
	@$(PYTHON) tests/nat/figures.py

bench: $(STAMP)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(PYTHON) tests/bench/run.py

fuzz: $(STAMP)
	$(PYTHON) -m pytest tests/fuzz

soak: $(STAMP)
	$(PYTHON) tests/fuzz/soak.py --seconds 600

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
