# `make demo` and `make test` are all that a fresh machine needs: both set up .venv once.
# The environment is built in .venv with the marker .venv/.unfinished, and the stamp .venv/.installed is written last, so
# an interrupted set-up is seen and made again, and a finished one costs nothing. The stamp holds the checkout's path: an
# editable install points there, so a moved checkout installs again. All paths here are relative: they may hold spaces.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Renamed first: a deletion that is interrupted must not leave something that looks like a finished .venv.
REMOVE_VENV := rm -rf .venv.old; [ ! -e .venv ] || mv .venv .venv.old; rm -rf .venv.old
MADE_FOR := $(shell [ -x $(BIN)/python ] && cat $(STAMP) 2>/dev/null)
# PIP_REQUIRE_VIRTUALENV: a damaged .venv falls through to the Python it was made from, and must never change that one.
PIP := PIP_REQUIRE_VIRTUALENV=1 $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt
PYTEST_ARGS ?= -n 2

export HF_HUB_OFFLINE ?= 1

.PHONY: help install demo test check bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     train a small language model with PPO and TRPO and write a report (minutes, 2 cores)"
	@echo "make test     run the tests (PYTEST_ARGS='-n 2' chooses how)"
	@echo "make check    ruff and mypy"
	@echo "make bench    throughput on this machine"
	@echo "make install  make .venv only; the others do it by themselves (PYTHON=python3.12 chooses the Python)"
	@echo "make clean    delete .venv, caches and built files; runs/ stays"

install: $(STAMP)

ifneq ($(MADE_FOR),$(CURDIR))
.PHONY: $(STAMP)
endif
$(STAMP): pyproject.toml setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	    { echo "$(PYTHON) is missing or older than Python 3.10; choose another: make install PYTHON=python3.12" >&2; exit 1; }
	@if [ -e .venv/.unfinished ]; then echo "removing a half-made .venv"; $(REMOVE_VENV); fi
	@mkdir -p .venv && rm -f $(STAMP) && touch .venv/.unfinished
	@echo "[1/3] making .venv"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@echo "[2/3] installing torch (the largest download)"
	@$(PIP) torch setuptools
	@echo "[3/3] installing rlhf_gym and its tools"
	@$(PIP) --no-build-isolation --editable ".[dev]"
	@pwd > $(STAMP) && rm .venv/.unfinished

demo: $(STAMP)
	@$(BIN)/python -m rlhf_gym demo

test: $(STAMP)
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy rlhf_gym agents benchmarks

bench: $(STAMP)
	$(BIN)/python -m rlhf_gym.benchmarks.throughput

clean:
	$(REMOVE_VENV)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
