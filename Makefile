# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: env demo test conformance soak lint types bench docs clean

env: $(READY)

# torch comes first and pinned: resolving a range would fetch the newest build with all its CUDA parts.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[examples,bench,test]"
	touch $(READY)

demo: env
	@echo; echo "1. A result that the loss does not use, on both libraries"; echo
	@$(BIN)/python examples/unused_result.py
	@echo; echo "2. A model in three workers, trained as in one process"; echo
	@$(BIN)/python examples/multi_node.py

# Tests mostly wait, for processes above all: three at a time take the two cores of a small machine.
test: env
	$(BIN)/python -m pytest -q --numprocesses 3 --dist loadfile

# PyTorch's own tests of its distributed RPC and autograd, over zmq_autograd.compat.
conformance: env
	$(BIN)/python -m tests.conformance.run

soak: env
	$(BIN)/python -m pytest -q -m soak --timeout 3600

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy --strict zmq_autograd tests

bench: env
	$(BIN)/python benchmarks/round_trip.py
	$(BIN)/python benchmarks/split_mlp.py
	$(BIN)/python benchmarks/chain.py
	$(BIN)/python benchmarks/profile_pass.py

docs: env
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/sphinx-build -q -W docs docs/_build

clean:
	rm -rf $(VENV) docs/_build output
