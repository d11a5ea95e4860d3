# `make demo` and `make test` need Python 3.11 or later and make, and no step before: they set up VENV themselves.

PYTHON ?= python3
VENV ?= .venv
# Without a GPU: a torch release whose wheels are known to work here. Elsewhere a smaller download is
#   make test TORCH='torch --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test gpu lint clean

demo: $(READY)
	$(BIN)/trunkline train training/configs/demo.yaml --overwrite
	@echo "The report is in $(CURDIR)/runs/demo/report.html"

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/pytest -q

gpu: $(READY)
	$(BIN)/pytest tests -m gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist runs src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks

$(READY): pyproject.toml setup.py
	@echo "Setting up $(VENV); the first time takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null || $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
