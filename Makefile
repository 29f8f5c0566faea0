# make demo   installs into .venv and runs the five steps on this machine's CPU
# make test   installs into .venv and runs all tests but the next three
# make test-system  runs the tests on real clusters made on this machine: wants root and Debian's packages
# make test-gpu  runs the tests that need NVIDIA GPUs, as many as there are
# make test-optional runs those that need packages which are used when present, in a folder of their own
# make lint   ruff, mypy and ShellCheck only
# make clean  removes .venv and caches, not output/
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: help install demo test test-fast test-system test-gpu test-optional lint clean

PYTHON3 ?= python3
VENV_PYTHON := .venv/bin/python

help:
	@sed -n 's/^# \(make.*\)/\1/p' Makefile

install: .venv/installed

# --timeout and --retries: a slow mirror is not a failure
.venv/installed: requirements.txt pyproject.toml
	@scripts/common/check_python.sh "$(PYTHON3)"
	@echo "installing into .venv: a few minutes the first time"
	"$(PYTHON3)" -m venv .venv
	"$(VENV_PYTHON)" -m pip install --quiet --timeout 60 --retries 10 --requirement requirements.txt
	"$(VENV_PYTHON)" -m pip install --quiet --no-deps --editable .
	touch .venv/installed

demo: install
	@scripts/common/demo.sh

test: install
	@"$(VENV_PYTHON)" -m pytest -n 2 --dist loadgroup -m "not system and not gpu"

test-fast: install
	@"$(VENV_PYTHON)" -m pytest -n 2 --dist loadgroup -m "not slow and not system and not gpu"

# one after the other: they would wait for each other's GPUs
test-gpu: install
	@"$(VENV_PYTHON)" -m pytest -s tests -m gpu

# not in the environment: with torchao in it, transformers imports it everywhere and warns
test-optional: install
	@"$(VENV_PYTHON)" -m pip install --quiet --no-deps --upgrade --target .cache/optional \
		bitsandbytes==0.50.2 torchao==0.18.0
	PYTHONPATH="$$PWD/.cache/optional" "$(VENV_PYTHON)" -m pytest -n 2 --dist loadgroup \
		tests/finetune/test_quantized.py tests/engine/test_megatron_float8.py
	@"$(VENV_PYTHON)" -m pip install --quiet --no-deps --upgrade --target .cache/triton triton==3.9.0
	PYTHONPATH="$$PWD/.cache/triton" TRITON_INTERPRET=1 "$(VENV_PYTHON)" -m pytest tests/engine/test_triton_kernels.py

# each worker makes hosts and schedulers of its own, which mostly wait
test-system: install
	@"$(VENV_PYTHON)" -m pytest -n 2 tests/system -m "system and not alone"
	"$(VENV_PYTHON)" -m pytest tests/system -m "system and alone"

lint: install
	@"$(VENV_PYTHON)" -m pytest tests/test_lint.py

clean:
	rm -rf .venv build ./*.egg-info .pytest_cache .mypy_cache .ruff_cache
