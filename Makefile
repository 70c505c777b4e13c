# Every target works from a fresh clone: what it needs is made first. `make help` lists them.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help score test lint clean

# Passed on to compute_score.py or pytest, for example: make score ARGS="--limit 2"
ARGS ?=

# A process for each core, up to four; each file's tests stay in one. tests/conftest.py says when it is one for all.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

help:
	@echo 'make score   preprocess.sh, then compute_score.py over the pictures'
	@echo 'make test    the tests'
	@echo 'make lint    ruff: rules and formatting'
	@echo 'make clean   delete build/ and caches; .venv stays'
	@echo 'ARGS="..." is passed on: make score ARGS="--limit 2", make test ARGS="-k canny"'

score:
	@bash preprocess.sh
	@python="$$(bash preprocess.sh --which)" && "$$python" compute_score.py $(ARGS)

test:
	@bash preprocess.sh --dev --env-only
	@python="$$(bash preprocess.sh --dev --which)" && "$$python" -m pytest $(PARALLEL) $(ARGS)

lint:
	@bash preprocess.sh --dev --env-only
	@python="$$(bash preprocess.sh --dev --which)" && \
		"$$python" -m ruff check . && \
		"$$python" -m ruff format --check .

clean:
	rm -rf build .pytest_cache .ruff_cache
	find . -name .venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
