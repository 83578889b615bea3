# make demo / make test work from a fresh clone: the first call makes .venv, later calls find it ready.
#   PYTHON=python3.12        interpreter for .venv (3.10 to 3.13)
#   TORCH=torch==2.13.0      what pip installs as torch, options allowed (an --index-url picks a CPU or a CUDA build)
#   CONSTRAINTS=FILE         pip constraints, e.g. constraints/tested.txt for the versions that were tested
#   ARGS="..."               passed on to the command of the target
#   WORKERS=auto             processes that share the tests, one thread each; 0: one process
PYTHON ?= python3
TORCH ?= torch==2.13.0
CONSTRAINTS ?=
ARGS ?=
WORKERS ?= auto
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAIN := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# One process on few cores: as many OpenMP threads as cores, and idle ones sleep instead of spinning.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test sanitize lint types bench clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/hypersd demo $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

# The C++ kernels under the address and undefined-behaviour sanitizers; says so and stops where the compiler has none.
sanitize: $(STAMP)
	$(BIN)/python -m tests.kernels.sanitized $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/hypersd bench --device cpu $(ARGS)

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f hypersd/_C.*so hypersd/_CUDA.*so

# `make .venv` is the environment that every target uses.
.PHONY: $(VENV)
$(VENV): $(STAMP)

# Installed again when the package's own requirements or its C++ sources change. Whether there is an environment is asked
# of its pip: one that was cut short, or made where Python lacks ensurepip, has none, and is made anew.
$(STAMP): pyproject.toml $(wildcard setup.py csrc/*.cpp csrc/*.h csrc/cpu/*)
	$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -q $(CONSTRAIN) "setuptools>=77" wheel ninja
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install $(CONSTRAIN) $(TORCH)
	$(PIP) install $(CONSTRAIN) --no-build-isolation -e ".[dev]"
	touch $@
