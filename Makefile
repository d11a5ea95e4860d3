# `make demo` and `make test` need Python 3.11 or later and make, and no step before: they set up VENV themselves.

PYTHON ?= python3
VENV ?= .venv
# Without a GPU: a torch release whose wheels are known to work here. Elsewhere a smaller download is
#   make test TORCH='torch --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0

# VENV= sets nothing up: PYTHON has what is needed, and the sources are used in place.
BIN := $(if $(VENV),$(VENV)/bin/)
READY := $(if $(VENV),$(VENV)/.ready)
RUN := PYTHONPATH=src $(if $(VENV),$(VENV)/bin/python,$(PYTHON))

.PHONY: demo test gpu certify lint clean

demo: $(READY)
	$(BIN)trunkline train training/configs/demo.yaml --overwrite
	@echo "The report is in $(CURDIR)/runs/demo/report.html"

test: $(READY)
	$(BIN)ruff check .
	$(BIN)pytest -q

# On a machine with an NVIDIA GPU, in at most 9 minutes: tests, benchmarks, training steps. DRY=1 tries it on the CPU.
gpu: $(READY)
	$(RUN) -m trunkline.benchmarks.gpu $(if $(DRY),--dry) $(if $(DATA),--data $(DATA))

# With TRITON=3.6.0 that release of Triton, in a folder of its own, takes the place of the one in VENV.
certify: $(READY) $(TRITON:%=$(VENV)/triton-%)
	PYTHONPATH=$(TRITON:%=$(VENV)/triton-%:)src $(BIN)python -m trunkline.benchmarks.microbenchmarks.certify --jobs 2

$(VENV)/triton-%: | $(READY)
	$(BIN)pip install --quiet --no-deps --target $@ triton==$*

lint: $(READY)
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy

clean:
	rm -rf $(VENV) build dist runs src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks

$(READY): pyproject.toml setup.py
	@echo "Setting up $(VENV); the first time takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null || $(BIN)pip install --quiet $(TORCH)
	$(BIN)pip install --quiet --editable '.[dev]'
	touch $@
