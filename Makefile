# Each target makes .venv and installs requirements.txt by itself, once.
PYTHON ?= python3
RUN    ?= latest
ARGS   ?=
PY     := .venv/bin/python

.PHONY: help train eval test
help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements.txt
	@touch $@

train: .venv/ready  ## the whole pipeline on the toy world; flags in ARGS="--steps 50"
	$(PY) distcap.py train $(ARGS)

eval: .venv/ready  ## evaluate the latest run again, or RUN=runs/name
	$(PY) distcap.py eval --run $(RUN) $(ARGS)

test: .venv/ready  ## run the tests
	$(PY) -m pytest -q test_distcap.py $(ARGS)
