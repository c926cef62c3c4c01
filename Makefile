# `make help` lists what there is. Everything a target needs it makes by itself.
.DEFAULT_GOAL := help
.PHONY: help env stubs

PY := .venv/bin/python

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

env: ## .venv with the locked packages and this project in it; nothing to do when nothing changed
	@tools/env

stubs: env ## client/forkpoint/v1 (messages, gRPC stubs, type hints) from proto/forkpoint/v1
	@$(PY) tools/stubs.py
