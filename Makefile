# `make demo` and `make test` set everything up by themselves (.venv, dependencies, default model).
PY := .venv/bin/python
.PHONY: help setup demo test quick vllm browser lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    build the sample corpus's cartridge, report on it, ask it over HTTP"
	@echo "make test    all tests        make quick   only the fast ones"
	@echo "make vllm    add vLLM's CPU build to .venv     make browser   Chromium, for the web page's tests"
	@echo "make lint    ruff             make clean   remove .venv, runs and caches"

setup:
	@PYTHON="$(PYTHON)" bash requirements/install.sh

demo: setup
	$(PY) -m workflows.demo

test: setup
	$(PY) -m pytest

quick: setup
	$(PY) -m pytest -m "not slow and not quality and not vllm"

vllm: setup
	@bash requirements/install_vllm.sh

browser:
	@bash requirements/install_browser.sh

lint: setup
	$(PY) -m ruff check .

clean:
	rm -rf .venv runs wandb build dist *.egg-info .pytest_cache .ruff_cache
