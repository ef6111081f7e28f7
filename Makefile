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
	$(PY) -m pytest -q test_distcap.py $(ARGS)

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
ROWS   ?= 9 5 1 2 3 4 6 7 8 10 11 12
LAST   := $(shell expr $(SEEDS) - 1)
RUNS   := $(foreach row,$(ROWS),$(foreach seed,$(shell seq 0 $(LAST)),runs/study/$(row)-$(seed)))
seed_of = $(lastword $(subst -, ,$(1)))
flags_of = $(row_$(firstword $(subst -, ,$(1)))) --seed $(call seed_of,$(1)) --run runs/study/$(1) \
	$(if $(wildcard runs/study/$(1)/config.json),--resume)

study: $(addsuffix /metrics.json,$(RUNS))  ## the paper's claims, one row of flags each
	@$(MAKE) --no-print-directory compare

compare: .venv/ready  ## the study's table, of the rows that are there
	@$(PY) distcap.py compare $(patsubst %/metrics.json,%,$(wildcard $(addsuffix /metrics.json,$(RUNS))))

.PRECIOUS: runs/study/%/metrics.json runs/study/heldout-%/metrics.json
runs/study/heldout-%/metrics.json: .venv/ready
	OMP_NUM_THREADS=1 $(PY) distcap.py train --tf-steps 0 --steps 0 --seed 100$* --images data/toy-$* \
	  --run runs/study/heldout-$* --overwrite > runs/study-heldout-$*.log 2>&1

.SECONDEXPANSION:
runs/study/%/metrics.json: runs/study/heldout-$$(call seed_of,$$*)/metrics.json \
		$$(if $$(findstring @9-,@$$*),,runs/study/9-$$(call seed_of,$$*)/metrics.json)
	OMP_NUM_THREADS=1 $(PY) distcap.py train --steps 200 --eval-clip runs/study/heldout-$(call seed_of,$*)/clip \
	  $(if $(findstring @9-,@$*),,--start runs/study/9-$(call seed_of,$*)) $(call flags_of,$*) \
	  >> runs/study-$*.log 2>&1

CORE = $(shell $(PY) -c "import pycocoevalcap as p; print(list(p.__path__)[0])")/spice/lib
spice: .venv/ready  ## fetch what the metric SPICE needs, 400 MB
	@set -e; new="$(CORE)/new.$$$$"; trap 'rm -rf "$$new"' EXIT INT TERM; \
	for end in .jar -models.jar; do jar="$(CORE)/stanford-corenlp-3.6.0$$end"; \
	  if test -f "$$jar"; then continue; fi; mkdir -p "$$new"; echo "fetching $${jar##*/}"; \
	  kind=$$(test $$end = .jar || echo :jar:models); \
	  if command -v mvn > /dev/null; then \
	    mvn -q dependency:copy -Dartifact=edu.stanford.nlp:stanford-corenlp:3.6.0$$kind -DoutputDirectory="$$new"; \
	    $(PY) -m zipfile -t "$$new/$${jar##*/}" > /dev/null; mv "$$new/$${jar##*/}" "$$jar"; \
	  else $(PY) -m pycocoevalcap.spice.get_stanford_models; $(PY) -m zipfile -t "$$jar" > /dev/null || \
	    { rm -f "$(CORE)"/stanford-corenlp-3.6.0*; exit 1; }; fi; done

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
