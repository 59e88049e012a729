# Everything runs in .venv; `make train` and `make test` need nothing but Python >= 3.10 and a C++ compiler.
PYTHON ?= python3
# EXTRAS=cpu, gpu (CUDA 13) or gpu-cu12 (CUDA 12) names the packages. Without it those in .venv stay, and a new .venv gets
# what fits the driver.
INSTALLED := $(patsubst .venv/installed-%,%,$(wildcard .venv/installed-*))
ifdef EXTRAS
CHOICE := $(EXTRAS) (as EXTRAS says)
else
CHOICE := $(or $(patsubst %,% (as before),$(INSTALLED)),$(shell ./which_extra.sh $(PYTHON)))
EXTRAS := $(firstword $(CHOICE))
endif
$(if $(filter cpu gpu gpu-cu12,$(EXTRAS)),,$(error EXTRAS=$(EXTRAS): there are cpu, gpu and gpu-cu12))
CONSTRAINTS := $(if $(filter gpu-cu12,$(EXTRAS)),constraints-cu12.txt,constraints.txt)
# A new folder, whose name every line of a recipe must agree on; RUN=DIR names another, which must not hold a run.
ifndef RUN
RUN := runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
endif

BIN    := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install train test test-long test-gpu lint docs clean

install: .venv/installed-$(EXTRAS)

# Packages of other EXTRAS would stay beside these, and every FAISS owns the same folder: then .venv is emptied first.
# The tests compile CUDA sources; without CUDA packages, nvrtc brings the compiler.
.venv/installed-$(EXTRAS): setup.py constraints.txt constraints-cu12.txt
	@echo 'EXTRAS: $(CHOICE)'
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(if $(filter-out $(EXTRAS),$(INSTALLED)),$(PYTHON) -m venv --clear .venv,test -x $(BIN)/python || $(PYTHON) -m venv .venv)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c $(CONSTRAINTS) -e '.[train,$(EXTRAS:cpu=cpu,nvrtc),dev]'
	touch $@

train: install
	deepspeed launch/train.py --deepspeed_config ds_configs/quickstart.json --run-dir $(RUN)
	embrag impute --run-dir $(RUN) --adapt off --out $(RUN)/imputed.vcf.gz
	embrag evaluate --imputed embrag_ds=$(RUN)/imputed.vcf.gz --baselines --json $(RUN)/evaluation.json

# The CPU's tests, on any machine, in two processes; a file's tests stay together, for what they share. Those marked
# `long` take as much time as all others; MARKS='not gpu' runs both.
ON_CPU := DS_ACCELERATOR=cpu python -m pytest -n 2 --dist loadfile
MARKS := not gpu and not long
test: install
	$(ON_CPU) -m '$(MARKS)'

test-long: install
	$(ON_CPU) -m 'long and not gpu'

test-gpu: install
	python -m pytest -m gpu

lint: install
	ruff check .
	ruff format --check .
	mypy

# The documentation as a website in site/. A broken link ends it, but not with --quiet.
docs: install
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# runs/ stays: it holds trained models.
clean:
	rm -rf .venv build site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
