# make train   trains the built-in sample in runs/quickstart; again: continues, or says that it is finished
# make test    runs all tests
# make check   lint and types, what CI checks before the tests
# make bench   measures the claims that need no GPU (benchmarks/README.md)
# make clean   removes the environment and caches, never runs/
# All of them install into .venv first where that is not done; PYTHON=python3.12 chooses the interpreter,
# EXTRAS=cuda12,dev chooses DALI for CUDA 12.
PYTHON ?= python3
EXTRAS ?= cuda13,slurm,dev
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: train test check bench setup clean

train: setup
	$(BIN)/python train.py --config configs/quickstart.yaml

# Two at a time, each file in one process: most tests wait for processes that they start. One thread each, or
# OpenMP's would wait for each other.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --shell sh launch/slurm/job.sh

bench: setup
	$(BIN)/python -m distrib.tools.bench index
	$(BIN)/python -m distrib.tools.bench train --model resnet18 --size 64
	$(BIN)/python -m distrib.tools.bench model --model resnet18 --size 64 --batch 32
	$(BIN)/python -m distrib.tools.bench loader --photos 400 --batch 32

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
