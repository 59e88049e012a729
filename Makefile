# Everything runs in .venv; `make train` and `make test` need nothing but Python >= 3.10 and a C++ compiler.
PYTHON ?= python3
# Named by EXTRAS=cpu or EXTRAS=gpu, or found out: a machine with an NVIDIA driver takes the CUDA packages.
EXTRAS ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
# A new folder, whose name every line of a recipe must agree on; RUN=DIR names another, which must not hold a run.
ifndef RUN
RUN := runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
endif

BIN    := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install train test lint clean

install: .venv/installed-$(EXTRAS)

.venv/installed-$(EXTRAS): setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[train,$(EXTRAS),dev]'
	touch $@

train: install
	deepspeed launch/train.py --deepspeed_config ds_configs/quickstart.json --run-dir $(RUN)
	embrag impute --run-dir $(RUN) --out $(RUN)/imputed.vcf.gz
	embrag evaluate --imputed embrag_ds=$(RUN)/imputed.vcf.gz --baselines --json $(RUN)/evaluation.json

test: install
	python -m pytest

lint: install
	ruff check .
	ruff format --check .
	mypy

# runs/ stays: it holds trained models.
clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
