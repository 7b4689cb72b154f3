# make demo   the whole thing on embedded data, in three minutes once installed, without a network; ends with a page
# make results   train the runs behind docs/results.md that are missing, and rebuild its tables
#                (DATA=folder of CIFAR-100's parquet, if not the hub's; WEIGHTS=Tiny ImageNet's for ResNet-50;
#                PRECISION=bf16 for new rows that no finished run is compared with)
# make test   the tests
# make lint   ruff
# A virtual environment (.venv) is made and filled when it is missing or when the requirements have changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NOW := $(shell date +%Y%m%d-%H%M%S)
DEMO_RUNS = runs/demo-pretrain-$(NOW) runs/demo-finetune-$(NOW) runs/demo-scratch-$(NOW)
LAUNCH = $(BIN)/accelerate launch --config_file accelerate_config.yaml train.py

.PHONY: demo results test lint install
install: $(VENV)/installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "Python 3.10 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -f $@; exit 1; }

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -r requirements.txt
	@touch $@

$(VENV)/installed-for-tests: tests/requirements.txt requirements.txt | $(VENV)/installed
	$(BIN)/python -m pip install -r tests/requirements.txt
	@touch $@

demo: $(VENV)/installed
	$(LAUNCH) --config recipes/demo_pretrain.yaml --run_name demo-pretrain-$(NOW)
	$(LAUNCH) --config recipes/demo_finetune.yaml --run_name demo-finetune-$(NOW) --model.weights runs/demo-pretrain-$(NOW)/best
	$(LAUNCH) --config recipes/demo_scratch.yaml --run_name demo-scratch-$(NOW)
	$(BIN)/python predict.py runs/demo-finetune-$(NOW)
	@$(BIN)/python report.py $(DEMO_RUNS)
	@echo; echo "The runs lie in runs/demo-*-$(NOW): best/ has the weights, history.jsonl the epochs, summary.json the figures."
	@$(BIN)/python report.py $(DEMO_RUNS) --output runs/demo-finetune-$(NOW)/report.html

results: $(VENV)/installed
	$(BIN)/python benchmarks/results.py
	$(BIN)/python benchmarks/results.py --run $(if $(DATA),--data '$(DATA)') $(if $(WEIGHTS),--weights '$(WEIGHTS)') \
		$(if $(PRECISION),--mixed_precision '$(PRECISION)')

test: $(VENV)/installed-for-tests
	$(BIN)/python -m pytest

lint: $(VENV)/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
