# Two commands: `make demo` and `make test`. Both need only Python 3.11+, pip and make.
PYTHON ?= python3
# An extra package index for torch; empty means: chosen by `setup` (the README tells how to get the CUDA build).
TORCH_INDEX ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint type bench docs clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-10s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## build .venv with all that demo and test need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "triton_curv needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch (a large package), then the rest"
	@# Without an NVIDIA driver, and unless pip finds torch in a local folder, take torch's CPU build.
	@index="$(TORCH_INDEX)"; \
	if [ -z "$$index" ] && ! command -v nvidia-smi >/dev/null \
		&& ! $(PIP) install -q --dry-run --no-deps --no-index -c constraints.txt torch >/dev/null 2>&1; \
	then index=$(CPU_INDEX); fi; \
	$(PIP) install -q -c constraints.txt $${index:+--extra-index-url "$$index"} torch
	$(PIP) install -q -c constraints.txt -e ".[cli,data,test,dev]"
	@touch $@

demo: setup ## train K-FAC and Neumann beside SGD and AdamW on real data; a table and a picture
	$(BIN)/triton-curv compare digits-cnn --out runs/demo

test: setup ## run all tests that need no GPU
	@# a process for each core, one thread each; a file stays in one process, which keeps what its tests share
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile -m interpreter
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile -m "not interpreter and not gpu"

lint: setup ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup ## check types
	$(BIN)/mypy

bench: setup ## measure, and write tidy tables into profiles/results
	@# exit status 3: needs a GPU, and says so
	for file in profiles/bench_*.py; do $(BIN)/python -m profiles.$$(basename $$file .py) || [ $$? = 3 ] || exit 1; done

docs: setup ## build the pages of docs/ with the API reference into build/docs
	$(PIP) install -q -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build

clean: ## remove everything that these targets made
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -rf *.egg-info
