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

LIB = $(shell $(PY) -c "import pycocoevalcap as p; print(p.__path__[0])")/spice/lib/stanford-corenlp-3.6.0
.PHONY: spice
spice: .venv/ready  ## fetch what the metric SPICE needs, 400 MB
	@# pycocoevalcap looks for the code jar alone; the models' may be what is missing
	test -f $(LIB).jar -a -f $(LIB)-models.jar || { rm -f $(LIB).jar && $(PY) -m pycocoevalcap.spice.get_stanford_models; }
	test -f $(LIB).jar -a -f $(LIB)-models.jar

test: .venv/ready  ## run the tests
	$(PY) -m pytest -q test_distcap.py $(ARGS)
