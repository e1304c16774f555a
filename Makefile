# The only commands a newcomer needs; `make` lists them. Each installs and downloads what it lacks, once.
# Python 3.10 or newer with its venv module and headers, and a C++ compiler, must be there.
#
# pip takes its index from the environment as usual (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL): that of torch's CPU
# builds saves several GB.

SHELL := /bin/bash
PYTHON ?= python3
NP ?= 4
COMPRESSOR ?= mask:sparsity=0.99,bits=2
ARGS ?=

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
READY := $(VENV)/.ready
ENGINES := $(VENV)/.engines
PIP = $(BIN)/python -m pip --disable-pip-version-check
# CuPy for the CUDA of torch; it imports and compiles without a GPU.
CUPY = $$($(BIN)/python -c 'import torch; print(f"cupy-cuda{(torch.version.cuda or str(13)).split(chr(46))[0]}x")')
# Collecting the other files takes each worker seconds.
RANK_TESTS = $(shell grep -l 'mark\.ranks' tests/test_*.py)
CHECKERS := $(VENV)/.checkers
DOCS := $(VENV)/.docs
# horovodrun starts `python` and helpers by name.
export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup venv engines data train outer split check lint types docs test coverage attack test-gpu bench clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile
	@echo '  variables: PYTHON=$(PYTHON) NP=$(NP) COMPRESSOR=$(COMPRESSOR) ARGS="--epochs 3"'

setup: $(READY) ## create .venv with torch, Horovod and gcompress (10 minutes the first time, then nothing)

venv: setup

$(READY): pyproject.toml constraints.txt setup.py tools/build_horovod.py tools/wheel_cache.py $(wildcard csrc/* csrc/*/*)
	@command -v $(PYTHON) >/dev/null || { echo 'make: $(PYTHON) not found: install Python 3.10 or newer, or name it: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo 'make: $(PYTHON) has no venv module (Debian, Ubuntu: apt-get install python3-venv)' >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { echo 'make: $(PYTHON) has no headers, which Horovod needs (Debian, Ubuntu: apt-get install python3-dev)' >&2; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo 'make: no C++ compiler found (Debian, Ubuntu: apt-get install g++)' >&2; exit 1; }
	@test -x $(BIN)/python || { echo '+ $(PYTHON) -m venv $(VENV)'; $(PYTHON) -m venv $(VENV); }
	$(PIP) install -q -c constraints.txt 'setuptools<81' wheel numpy torch torchvision
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[examples,split,test,frameworks]'
	$(BIN)/python tools/build_horovod.py
	@$(PIP) install -q nvidia-cuda-nvrtc-cu12 || echo 'make: no NVRTC for this machine: the GPU kernels are not compiled in tests'
	@$(PIP) install -q $(CUPY) || echo 'make: no CuPy for this machine: its side of the GPU is not tested'
	@touch $@

data: $(READY) ## put Fashion-MNIST into data/ (from Debian's package or torchvision's download)
	@$(BIN)/python tools/fetch_data.py

train: data ## train on NP ranks with COMPRESSOR and draw runs/train.png (ARGS= for more options)
	@mkdir -p runs
	$(BIN)/horovodrun -np $(NP) $(BIN)/python examples/train.py --compressor '$(COMPRESSOR)' \
		--plot runs/train.png --log-file runs/train.jsonl \
		--progress $$([ -t 2 ] && echo bar || echo auto) $(ARGS)

outer: $(READY) ## train a language model by outer steps and by fp16 gradients, and compare: runs/outer.png (3 minutes on 2 cores)
	@mkdir -p runs
	$(BIN)/horovodrun -np $(NP) $(BIN)/python examples/train_lm.py --sync gradients --compressor fp16 \
		--log-file runs/outer-fp16.jsonl --progress $$([ -t 2 ] && echo bar || echo auto) $(ARGS)
	$(BIN)/horovodrun -np $(NP) $(BIN)/python examples/train_lm.py --sync outer --every 15 \
		--log-file runs/outer-steps.jsonl --compare runs/outer-fp16.jsonl --plot runs/outer.png \
		--progress $$([ -t 2 ] && echo bar || echo auto) $(ARGS)

split: data ## train a model cut in two, with and without compression, and compare: runs/split.png (2 processes)
	$(BIN)/python examples/split_learning.py --demo --compressor none --log-file runs/split-none.jsonl $(ARGS)
	$(BIN)/python examples/split_learning.py --demo --compressor ms --ratio 0.99 --bit 2 \
		--log-file runs/split-ms.jsonl --compare runs/split-none.jsonl --plot runs/split.png $(ARGS)

engines: $(ENGINES) ## add MPI and BytePS, where they can be had (5 minutes the first time, then nothing)

$(ENGINES): $(READY) tools/install_mpi.py tools/build_byteps.py tools/byteps_edits.py $(wildcard tools/byteps_stand_ins/*) \
		plugins/byteps/compressor.cc
	$(BIN)/python tools/install_mpi.py --optional
	$(BIN)/python tools/build_byteps.py --optional
	@touch $@

test: data $(ENGINES) ## run all tests (ARGS= for pytest's options): side by side, then those that start ranks, two files or classes at a time
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not ranks' $(ARGS) || [ $$? = 5 ]
	$(BIN)/python -m pytest -n 2 --dist loadscope -m ranks $(if $(findstring tests/,$(ARGS)),,$(RANK_TESTS)) $(ARGS) || [ $$? = 5 ]

attack: $(READY) ## try hostile payloads and handshakes, failing servers and damaged checkpoints for longer (13 minutes)
	GCOMPRESS_LONG=1 $(BIN)/python -m pytest -n auto tests/test_hostile.py tests/test_split_hostile.py \
		tests/test_split_failures.py tests/test_split_round_failures.py tests/test_split_checkpoints.py tests/test_split_cut.py $(ARGS)
	GCOMPRESS_LONG=1 $(BIN)/python -m pytest tests/test_split_kills.py $(ARGS)

test-gpu: $(READY) ## run the laws on this machine's GPU (adds CuPy the first time)
	@$(BIN)/python -c 'import cupy' 2>/dev/null || $(PIP) install -q $(CUPY)
	$(BIN)/python -m gcompress.cli doctor
	GCOMPRESS_REQUIRE_GPU=1 $(BIN)/python -m pytest tests/test_cuda_device.py $(ARGS)

bench: $(READY) ## measure the compressors' speed against a plain copy
	$(BIN)/python benchmarks/compressors.py $(ARGS)

$(CHECKERS): $(READY) constraints.txt
	@$(PIP) install -q -c constraints.txt ruff mypy clang-format
	@touch $@

check: lint types ## style, types and the fast tests, in two minutes: before each commit
	$(BIN)/python -m pytest -n auto -m fast -q $(ARGS)

lint: $(CHECKERS) ## check the style of Python (ruff) and C++ (clang-format)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc plugins tests -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh')

types: $(CHECKERS) ## check the types of the library (mypy)
	$(BIN)/python -m mypy

$(DOCS): $(READY) constraints.txt
	@$(PIP) install -q -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	@touch $@

docs: $(DOCS) ## build the documentation into site/, with warnings as errors (ARGS=serve shows it, and follows changes)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs $(if $(ARGS),$(ARGS),build --clean)
	@$(if $(ARGS),true,echo 'built: site/index.html')

coverage: data $(ENGINES) ## run the tests that need one process and print the lines that none of them reaches
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not ranks' --cov --cov-report=term-missing:skip-covered $(ARGS)

clean: ## remove .venv, builds and caches; keeps data/, runs/ and the cached wheels
	rm -rf $(VENV) build dist site *.egg-info gcompress/*.so plugins/byteps/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
