# `make demo` and `make test` need Python 3.11 or later and make, and no step before: they set up VENV themselves.

PYTHON ?= python3
VENV ?= .venv
# Exact versions of all that is installed. LOCK= installs the newest releases that pyproject.toml allows.
# Without a GPU a smaller download of the same torch is
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test
LOCK ?= requirements.lock
# The release that `make lock` writes down: of torch we choose one whose CPU build is at hand, not the newest.
TORCH ?= 2.13.0

# Processes that run tests, each with one thread.
JOBS ?= 2

# VENV= sets nothing up: PYTHON has what is needed, and the sources are used in place.
BIN := $(if $(VENV),$(VENV)/bin/)
READY := $(if $(VENV),$(VENV)/.ready)
RUN := PYTHONPATH=src $(if $(VENV),$(VENV)/bin/python,$(PYTHON))

.PHONY: demo test test-newest fuzz gpu certify virtual lint lock clean

demo: $(READY)
	$(BIN)trunkline train training/configs/demo.yaml --overwrite
	@echo "The report is in $(CURDIR)/runs/demo/report.html"

test: $(READY)
	$(BIN)ruff check .
	$(BIN)pytest -q --numprocesses $(JOBS) --dist worksteal

# The same with the newest releases, in an environment of its own that is brought up to date at every call.
test-newest:
	rm -f .venv-newest/.ready
	$(MAKE) test VENV=.venv-newest LOCK=

# New random inputs for as long as asked; `make test` has a few that are always the same.
fuzz: $(READY)
	TRUNKLINE_FUZZ_MINUTES=$(or $(MINUTES),10) $(BIN)pytest -q -o faulthandler_timeout=0 tests/fuzz

# On a machine with an NVIDIA GPU, in at most 9 minutes: tests, benchmarks, training steps. DRY=1 tries it on the CPU.
gpu: $(READY)
	$(RUN) -m trunkline.benchmarks.gpu $(if $(DRY),--dry) $(if $(DATA),--data $(DATA))

# With TRITON=3.6.0 that release of Triton, in a folder of its own, takes the place of the one in VENV.
certify: $(READY) $(TRITON:%=$(VENV)/triton-%)
	PYTHONPATH=$(TRITON:%=$(VENV)/triton-%:)src $(BIN)python -m trunkline.benchmarks.microbenchmarks.certify --jobs 2

# Every op's compiled code for A100 and H100, executed on this CPU, and the kernels' tests as on a GPU; needs g++.
# DTYPE=bfloat16 and ONLY="attention window" choose; TRITON as above.
virtual: export PYTHONPATH := $(TRITON:%=$(VENV)/triton-%:)src:tests:tests/helpers
virtual: $(READY) $(TRITON:%=$(VENV)/triton-%)
	$(if $(VENV),$(VENV)/bin/python,$(PYTHON)) -m virtual_gpu.run $(DTYPE:%=--dtype %) $(if $(ONLY),--only $(ONLY))
	$(if $(ONLY),,TRUNKLINE_VIRTUAL_GPU=90 $(if $(VENV),$(VENV)/bin/python,$(PYTHON)) -m pytest -q -W default \
		-m "not gpu" tests/kernels/interpreter)

$(VENV)/triton-%: | $(READY)
	$(BIN)pip install --quiet --no-deps --target $@ triton==$*

lint: $(READY)
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy

lock:
	$(PYTHON) -m venv build/uv
	build/uv/bin/pip install --quiet uv
	echo torch==$(TORCH) | build/uv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev \
		--constraint - --custom-compile-command 'make lock' --output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) .venv-newest build dist runs src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks

# The lock is a list of constraints: of what it names, each machine takes what its build of torch needs. Packages that are
# built are built with its setuptools, too.
INSTALL := $(BIN)pip install --quiet $(if $(LOCK),--constraint $(LOCK),--upgrade --upgrade-strategy eager)

$(READY): pyproject.toml setup.py $(LOCK)
	@echo "Setting up $(VENV); the first time takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	touch $@
