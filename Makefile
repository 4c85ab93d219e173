# ComfyUI-Dense2MoE: everything a developer runs. `make help` lists it.
#
#   COMFYUI_PATH=/path/to/ComfyUI make …   use a ComfyUI of yours
#   make HOST=0.18.2 …                     use another release of the table in tools/host.py
#   make PYTHON=python3.12 …               make the environment with another Python

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup host browser demo comfy test test-web test-hosts lint format bench lock clean

PYTHON = python3
# Set here, so that a HOST in the environment (some shells set it) does not choose a ComfyUI.
HOST =
export D2M_HOST := $(HOST)
export PYTHONUNBUFFERED = 1

# One line, read after set-up: which environment belongs to the host in use.
RUN = "$$($(PYTHON) -m tools.host --python)" -m
# Models of tests are tiny: a core for each process beats all cores for one. Files stay whole, for what their tests share,
# and keep their order: many short ones come last, so that no core waits for a long one.
SIDE_BY_SIDE = --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## virtual environment, pinned packages and a ComfyUI; again at any time
	@$(PYTHON) -m tools.setup

host: setup ## print where the ComfyUI in use stands
	@$(PYTHON) -m tools.host

browser: ## print where the Chromium of the browser tests stands; installs Debian's if it may
	@$(PYTHON) -m tools.browser

demo: setup ## convert the emoji FLUX and paint with it in ComfyUI; results in demo/out/
	@$(RUN) demo.run

comfy: setup ## leave ComfyUI running with the example workflow
	@$(RUN) demo.run --serve

test: setup ## every test
	@OMP_NUM_THREADS=1 $(RUN) pytest tests $(SIDE_BY_SIDE)

test-web: setup ## oxlint on web/, and its unit tests in Node.js
	@$(RUN) tools.javascript

test-hosts: setup ## the tests that run in a ComfyUI, in the newest and the oldest supported (6 GB more)
	@OMP_NUM_THREADS=1 PYTEST_ADDOPTS="$(SIDE_BY_SIDE) $$PYTEST_ADDOPTS" $(PYTHON) -m tools.on_hosts

lint: setup ## ruff, types and import contracts
	@$(RUN) tools.lint

format: setup ## let ruff put the code in order
	@$(RUN) ruff check --fix-only .
	@$(RUN) ruff format .

bench: setup ## speed, as ratios measured in one run
	@$(RUN) benchmarks

lock: setup ## pin the newest packages in constraints.txt
	@$(RUN) tools.lock

clean: ## remove caches and the demo's output (the environment stays: .venv and .host)
	rm -rf demo/out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
	find . -path './.*' -prune -o -name __pycache__ -type d -print -prune | xargs -r rm -rf
