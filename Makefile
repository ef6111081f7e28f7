# Each target makes .venv and installs requirements.txt by itself, once.
PYTHON ?= python3
RUN    ?= latest
ARGS   ?=
SEEDS  ?= 3
PY     := .venv/bin/python

.PHONY: help train eval test study spice coco

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

study: .venv/ready  ## the paper's claims, one row of flags each; SEEDS=1 is shorter
	$(PY) distcap.py study --seeds $(SEEDS) $(ARGS)

test: .venv/ready  ## run the tests
	$(PY) -m pytest -q test_distcap.py $(ARGS)

LIB = $(shell $(PY) -c "import pycocoevalcap as p; print(p.__path__[0])")/spice/lib/stanford-corenlp-3.6.0
spice: .venv/ready  ## fetch what the metric SPICE needs, 400 MB
	@# pycocoevalcap looks for the code jar alone; the models' may be what is missing
	test -f $(LIB).jar -a -f $(LIB)-models.jar || { rm -f $(LIB).jar && $(PY) -m pycocoevalcap.spice.get_stanford_models; }
	test -f $(LIB).jar -a -f $(LIB)-models.jar

# Karpathy's split (36 MB), then the images (13 + 6.6 GB). A second call goes on where one stopped.
COCO := https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip \
	http://images.cocodataset.org/zips/train2014.zip http://images.cocodataset.org/zips/val2014.zip
coco:  ## download COCO into data/coco (needs 40 GB); how to train on it
	@echo 'Downloads $(COCO) into data/coco. Then, in the setting of the paper:'
	@echo '  $(PY) distcap.py train --data karpathy --annotations data/coco/dataset_coco.json' \
	  '--images data/coco --preset paper --run runs/coco'
	mkdir -p data/coco
	@for url in $(COCO); do zip=data/coco/$${url##*/}; test -e $$zip.done || { echo $$url; \
	  curl -fL --retry 3 -C - -o $$zip $$url && $(PYTHON) -m zipfile -e $$zip data/coco && \
	  rm $$zip && touch $$zip.done; } || exit 1; done
