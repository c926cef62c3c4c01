# `make help` lists what there is. Every target makes what it needs by itself, says what it is doing,
# and does nothing twice. Nothing needs root, /dev/kvm or a C compiler.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help env stubs firecracker firecracker-if-kvm check test test-linux demo bench-quick bench bench-pause bench-images dist lock clean

BIN := .venv/bin
PY := $(BIN)/python
# Tests at a time (JOBS=0: in one process, for a debugger); each starts servers and VMMs of its own.
JOBS ?= $(shell nproc | awk '{ print $$1 < 4 ? $$1 : 4 }')
# What is there of the folders with Python in them.
PYTHON_DIRS := $(wildcard server client tests bench tools)

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

env: ## .venv with the locked packages and this project in it (PYTHON=... names the interpreter)
	@tools/env

stubs: env ## client/forkpoint/v1: messages, gRPC stubs and type hints from proto/forkpoint/v1
	@$(PY) tools/stubs.py

firecracker: env ## the pinned Firecracker: found, or fetched once into the user's cache
	@vmm=$$($(PY) -c 'import sys; from forkpointd.vmm.fetch import main; sys.exit(main())') && echo "==> Firecracker: $$vmm" >&2

firecracker-if-kvm: env
	@if [ -r /dev/kvm ] && [ -w /dev/kvm ]; then \
	    $(MAKE) --no-print-directory firecracker; \
	else \
	    echo "==> /dev/kvm can't be used here: the simulator takes Firecracker's place" >&2; \
	fi

check: env stubs ## lint, format, types, imports between the rooms, the contract
	@tools/check $(PYTHON_DIRS)

test: env stubs firecracker-if-kvm check ## everything this project tests with (ARGS=... goes to pytest)
	@echo "==> pytest, $(JOBS) at a time"
	@$(BIN)/pytest -q -rs -n $(JOBS) --dist loadfile $(ARGS)

test-linux: env stubs firecracker ## Linux guests under real Firecracker, in an emulated machine (needs QEMU and Debian's apt, no /dev/kvm)
	@echo "==> pytest tests/linux: the lab boots, some minutes without a word"
	@$(BIN)/pytest -q -rs -p no:xdist tests/linux $(ARGS)

demo: env stubs firecracker-if-kvm ## a running source is branched and forked before your eyes (ARGS=--json)
	@$(BIN)/forkpoint demo $(ARGS)

bench-quick: env stubs firecracker ## pause windows by plain sockets and through forkpoint, in about three minutes
	@$(PY) -m bench quick $(ARGS)

bench: env stubs firecracker ## the same with the counts whose figures are claimed; no time limit
	@$(PY) -m bench full $(ARGS)

bench-pause: env stubs firecracker ## the pause window in all its phases, each trial a row; goes on where it stopped (ARGS=--help)
	@$(PY) -m bench.pause_window $(ARGS)

bench-images: env stubs firecracker ## images: layers, flat copies, flattens, branches to children; each trial a row (ARGS=--help)
	@$(PY) -m bench.images $(ARGS)

dist: ## dist/*.whl, built from dist/*.tar.gz in a locked environment of its own
	@tools/dist

lock: ## requirements/*.txt anew from pyproject.toml (ARGS=--upgrade for the newest versions)
	@tools/lock $(ARGS)

clean: ## removes what the build made; the cache of the user stays
	rm -rf .venv build dist client/forkpoint/v1 .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find server client tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
