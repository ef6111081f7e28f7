# Each target makes .venv and installs requirements.txt by itself, once. A target that was stopped
# goes on when it is called again.
PYTHON ?= python3
RUN    ?= runs/toy
ARGS   ?=
PY     := .venv/bin/python

.PHONY: help train eval test bench study compare paper coco spice

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

eval: .venv/ready  ## caption and score the test images of RUN=runs/toy again
	$(PY) distcap.py eval --run $(RUN)

test: .venv/ready  ## run the tests
	$(PY) -m pytest -q -rs --disable-warnings test_distcap.py $(ARGS)

bench: .venv/ready  ## time an RL step of BLIP-base against the released way of working
	BENCH=1 $(PY) -m pytest -q -s test_distcap.py -k bench $(ARGS)

# The study: a row is a name and its flags; RL starts from the captioner and the CLIP of a base run
# of its seed. The held-out CLIP is that of the next seed's base run. `make -j2 study` runs two rows
# at a time.
ALONE  := --wtf-weight 0 --alpha 1 --no-gt-in-pool
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

BASES  := $(foreach seed,0 1 2 3 4,runs/study/base-$(seed))
RUNS   := $(foreach seed,0 1 2,$(foreach row,9 5 6 7 8 11,runs/study/$(row)-$(seed))) \
          $(foreach seed,0 1 2,$(foreach row,1 2 3 4 12 10 13,runs/study/$(row)-$(seed))) \
          $(foreach seed,3 4,$(foreach row,9 5 6 7 8 11,runs/study/$(row)-$(seed)))
row     = $(firstword $(subst -, ,$(notdir $(@D))))
seed    = $(lastword $(subst -, ,$(notdir $(@D))))
held_out = runs/study/base-$(shell expr \( $(seed) + 1 \) % 5)/clip

study: $(addsuffix /metrics.json,$(RUNS))  ## the paper's claims, one row of flags each (hours)
	@$(MAKE) --no-print-directory compare

$(addsuffix /metrics.json,$(BASES)): | .venv/ready
	@mkdir -p $(@D)
	OMP_NUM_THREADS=1 $(PY) distcap.py train --seed $(seed) --run $(@D) --steps 0 --alpha 1 \
	  >> $(@D).log 2>&1

$(addsuffix /metrics.json,$(RUNS)): | $(addsuffix /metrics.json,$(BASES))
	OMP_NUM_THREADS=1 $(PY) distcap.py train --seed $(seed) --run $(@D) --tf-steps 0 \
	  --captioner runs/study/base-$(seed)/captioner_tf --clip runs/study/base-$(seed)/clip \
	  --eval-clip $(held_out) --steps 200 --eval-every 25 $(row_$(row)) >> $(@D).log 2>&1

FINISHED = $(patsubst %/metrics.json,%,$(wildcard $(addsuffix /metrics.json,$(RUNS))))
compare: .venv/ready  ## the study's table, of the rows that are there
	@test -n "$(FINISHED)" || { echo 'no finished row in runs/study; make study makes them'; exit 1; }
	@$(PY) distcap.py compare $(FINISHED)

# [S] slides, [C] released code; what nobody has printed is marked as ours and was not tuned, since
# nobody here has run COCO. Of 20,000 TF steps of 32 each COCO caption is drawn about once.
paper: .venv/ready  ## train in the setting of the paper, on COCO (see coco)
	$(PY) distcap.py train --annotations data/coco/dataset_coco.json --images data/coco \
	  --run runs/paper $(PAPER) $(ARGS)

PAPER := --captioner OFA-Sys/ofa-tiny --clip ViT-B-32-quickgelu --clip-pretrained openai
PAPER += --reward bidirectional --no-center-reward --rl-weight 1 --wtf-weight 1 --gt-in-pool  # [S]
PAPER += --alpha .94 --mined-images 2 --disc-lr 7e-5 --decode beam --num-beams 5  # [C]
PAPER += --tf-steps 20000 --tf-lr 5e-5 --steps 5000 --batch-size 32 --lr 1e-6 --warmup 100  # ours

# Karpathy's split (36 MB), then the images (13 + 6.6 GB). A second call goes on where one stopped.
COCO := https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip \
	http://images.cocodataset.org/zips/train2014.zip http://images.cocodataset.org/zips/val2014.zip
coco:  ## download COCO into data/coco (needs 40 GB)
	mkdir -p data/coco
	@for url in $(COCO); do zip=data/coco/$${url##*/}; test -e $$zip.done || { echo $$url; \
	  curl -fL --retry 3 -C - -o $$zip $$url && $(PYTHON) -m zipfile -e $$zip data/coco && \
	  rm $$zip && touch $$zip.done; } || exit 1; done

# pycocoevalcap's own download, else Maven's.
spice: .venv/ready  ## fetch what the metric SPICE needs, 400 MB
	lib=$$($(PY) -c "import pycocoevalcap; print(pycocoevalcap.__path__[0])")/spice/lib; \
	$(PY) $$lib/../get_stanford_models.py || for kind in jar jar:models; do mvn -q -B dependency:copy \
	  -DoutputDirectory=$$lib -Dartifact=edu.stanford.nlp:stanford-corenlp:3.6.0:$$kind || exit 1; done
