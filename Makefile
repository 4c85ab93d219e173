# ComfyUI-Dense2MoE: everything a developer runs. `make help` lists it.
#
#   COMFYUI_PATH=/path/to/ComfyUI make …   use a ComfyUI of yours
#   make HOST=0.18.2 …                     use another release of the table in tools/host.py
#   make PYTHON=python3.12 …               make the environment with another Python

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup packages host browser demo distil comfy screenshots check lint format clean bench bench-gpu lock
.PHONY: test test-unit test-train test-web test-host test-browser test-hosts trust

PYTHON = python3
# Set here, so that a HOST in the environment (some shells set it) does not choose a ComfyUI.
HOST =
export D2M_HOST := $(HOST)
export PYTHONUNBUFFERED = 1

# Programs leave their compiled modules for the next start, also where the shell says otherwise: torch, diffusers and
# ComfyUI take 20 seconds to compile.
export PYTHONDONTWRITEBYTECODE =

# Evaluated after set-up: the Python of the environment that belongs to the host in use.
RUN = "$$($(PYTHON) -m tools.host --python)" -m
# How many processes, and which tests share one: tests/conftest.py.
SIDE_BY_SIDE = --numprocesses auto --dist loadscope --no-loadscope-reorder
PYTEST = $(RUN) pytest $(SIDE_BY_SIDE)

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## virtual environment, pinned packages and a ComfyUI; again at any time
	@$(PYTHON) -m tools.setup

packages: ## virtual environment and pinned packages only, for what needs no ComfyUI
	@$(PYTHON) -m tools.setup --without-host

host: setup ## print where the ComfyUI in use stands
	@$(PYTHON) -m tools.host

browser: ## print where the Chromium of the browser tests stands; installs Debian's if it may
	@$(PYTHON) -m tools.browser

demo: setup ## convert the emoji FLUX and paint with it in ComfyUI: demo/out/
	@$(RUN) demo.run

distil: setup ## train the emoji FLUX's presets L and M, and paint before and after
	@$(RUN) demo.distil

comfy: setup ## leave ComfyUI running with the example workflow
	@$(RUN) demo.run --serve

screenshots: setup ## pictures of every template in both renderers and themes: demo/out/screenshots/
	@$(RUN) tests.browser.screenshots

check: lint test-web ## the verdict on a change in three minutes; needs no ComfyUI
	@$(PYTEST) tests/unit -m "not slow"

lint: packages ## ruff, types and import contracts
	@$(RUN) tools.lint

test: setup lint test-web ## everything: lint and every test
	@$(PYTEST) tests

test-unit: packages ## tests of methods, files and tools; no ComfyUI, no Chromium
	@$(PYTEST) tests/unit

test-train: packages ## tests of the trainer; no ComfyUI, no Chromium
	@$(PYTEST) tests/train

test-web: packages ## oxlint on web/, and its unit tests in Node.js
	@$(RUN) tools.javascript

test-host: setup ## tests in a ComfyUI
	@$(PYTEST) tests/comfyui

test-browser: setup ## tests of a Chromium on a ComfyUI
	@$(PYTEST) tests/browser

test-hosts: setup ## test-host and test-browser in the newest and the oldest ComfyUI supported (6 GB more)
	@PYTEST_ADDOPTS="$(SIDE_BY_SIDE) $$PYTEST_ADDOPTS" $(PYTHON) -m tools.on_hosts

trust: setup ## standing tests of trust, about an hour: hostile files and requests, kills, hundreds of prompts
	@$(RUN) tests.trust

format: packages ## let ruff put the code in order
	@$(RUN) ruff check --fix-only .
	@$(RUN) ruff format .

bench: setup ## measure speed, as ratios within one run
	@$(RUN) benchmarks

bench-gpu: setup ## is it right on this GPU, and how fast: benchmarks/results/device-NAME.json
	@$(RUN) benchmarks.gpu

lock: setup ## pin the newest packages in constraints.txt
	@$(RUN) tools.lock

clean: ## remove caches and the demo's output (the environment stays: .venv and .host)
	rm -rf demo/out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
	find . -path './.*' -prune -o -name __pycache__ -type d -print -prune | xargs -r rm -rf
