# Each target makes .venv and installs requirements.txt by itself, once.
PYTHON ?= python3
RUN    ?= latest
ARGS   ?=
SEEDS  ?= 3
PY     := .venv/bin/python

.PHONY: help train eval test study compare bench spice coco

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

.venv/ready: requirements.txt
	@echo 'Installing requirements.txt into .venv, once: minutes, about 6 GB where torch brings CUDA.'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --progress-bar on --quiet -r requirements.txt
	@touch $@

train: .venv/ready  ## the whole pipeline on the toy world; flags in ARGS="--steps 50"
	$(PY) distcap.py train $(ARGS)

eval: .venv/ready  ## evaluate the latest run again, or RUN=runs/name
	$(PY) distcap.py eval --run $(RUN) $(ARGS)

test: .venv/ready  ## run the tests
	$(PY) -m pytest -q -rs test_distcap.py $(ARGS)

bench: .venv/ready  ## time an RL step of BLIP-base against the released way of working
	BENCH=1 $(PY) -m pytest -q -s test_distcap.py -k bench $(ARGS)

# The study: a row is a name and its flags. Rows resume; `make -j2 study` runs two at a time.
# Rows of a seed share row 9's CLIP, TF captioner and discriminator, and a held-out CLIP.
ALONE := --wtf-weight 0 --alpha 1 --no-gt-in-pool
row_1  := --steps 0
row_2  := --rl-weight 0
row_3  := $(ALONE) --reward similarity
row_4  := $(ALONE) --reward unidirectional
row_5  := $(ALONE)
row_6  := --wtf-weight 0 --alpha 1
row_7  := --alpha 1
row_8  := --wtf-weight 0
row_9  :=
row_10 := --decode sample
row_11 := --regulariser grammar
row_12 := --no-center-reward
row_13 := --lr 5e-4 --steps 80
ROWS   ?= 9 5 2 3 4 6 8 7 1 12 10 11 13
LAST   := $(shell expr $(SEEDS) - 1)
RUNS   := $(foreach row,$(ROWS),$(foreach seed,$(shell seq 0 $(LAST)),runs/study/$(row)-$(seed)))
seed_of = $(lastword $(subst -, ,$(1)))
flags_of = $(row_$(firstword $(subst -, ,$(1)))) --seed $(call seed_of,$(1)) --run runs/study/$(1) \
	$(if $(wildcard runs/study/$(1)/config.json),--resume)

study: $(addsuffix /metrics.json,$(RUNS))  ## the paper's claims, one row of flags each
	@$(MAKE) --no-print-directory compare

FINISHED = $(patsubst %/metrics.json,%,$(wildcard $(addsuffix /metrics.json,$(RUNS))))
compare: .venv/ready  ## the study's table, of the rows that are there
	@test -n "$(FINISHED)" || \
	  { echo 'make compare: no finished row yet; `make study` makes them' >&2; exit 1; }
	@$(PY) distcap.py compare $(FINISHED)

.PRECIOUS: runs/study/%/metrics.json runs/study/heldout-%/metrics.json data/toy-%/captions_test.json
data/toy-%/captions_test.json: | .venv/ready
	$(PY) -c "import pathlib, distcap; distcap.write_world(pathlib.Path('data/toy-$*'), $*)"

# A CLIP of another seed that is trained on the same world.
runs/study/heldout-%/metrics.json: | data/toy-%/captions_test.json
	@mkdir -p runs
	OMP_NUM_THREADS=1 $(PY) distcap.py train --tf-steps 0 --steps 0 --seed 100$* --images data/toy-$* \
	  --run runs/study/heldout-$* --overwrite > runs/study-heldout-$*.log 2>&1

.SECONDEXPANSION:
runs/study/%/metrics.json: runs/study/heldout-$$(call seed_of,$$*)/metrics.json \
		$$(if $$(findstring @9-,@$$*),,runs/study/9-$$(call seed_of,$$*)/metrics.json)
	OMP_NUM_THREADS=1 $(PY) distcap.py train --steps 200 --eval-clip runs/study/heldout-$(call seed_of,$*)/clip \
	  $(if $(findstring @9-,@$*),,--start runs/study/9-$(call seed_of,$*)) $(call flags_of,$*) \
	  >> runs/study-$*.log 2>&1

# Into a folder beside the place first: what is found there is whole. ~/.m2 keeps mvn's own copy.
spice: .venv/ready  ## fetch what the metric SPICE needs, 400 MB
	@set -e; lib=$$($(PY) -c "import pycocoevalcap as p; print(p.__path__[0])")/spice/lib; \
	set -- stanford-corenlp-3.6.0.jar stanford-corenlp-3.6.0-models.jar; \
	test ! -f "$$lib/$$1" || test ! -f "$$lib/$$2" || exit 0; \
	new=$$lib/new; trap 'rm -rf "$$new"' EXIT; trap 'exit 1' HUP INT TERM; rm -rf "$$new"; mkdir -p "$$new/lib"; \
	for kind in jar jar:models; do mvn -q -B dependency:copy -DoutputDirectory="$$new/lib" \
	  -Dartifact=edu.stanford.nlp:stanford-corenlp:3.6.0:$$kind || break; done; \
	test -f "$$new/lib/$$2" || { rm -f "$$new/lib/"*; cp "$$lib/../get_stanford_models.py" "$$new"; \
	  TMPDIR=$$new $(PY) "$$new/get_stanford_models.py"; } || { echo 'make spice: CoreNLP 3.6.0 came' \
	  'neither by mvn nor by pycocoevalcap (nlp.stanford.edu); nothing was changed' >&2; exit 1; }; \
	$(PY) -c "import sys, zipfile as z; sys.exit(any(z.ZipFile(f).testzip() for f in sys.argv[1:]))" "$$new/lib/"*.jar || \
	  { echo 'make spice: a downloaded jar is broken; nothing was changed' >&2; exit 1; }; mv "$$new/lib/"*.jar "$$lib"

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
