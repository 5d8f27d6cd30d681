.PHONY: install lint test test-all ci

install:  ## An editable install with everything that development needs
	pip install -e ".[dev]"

lint:  ## Format, lint, check types and import layers
	ruff format . && ruff check --fix . && mypy && lint-imports

test:  ## The fast lane: unit tests and one whole run, under 4 minutes on 2 cores
	pytest

test-all:  ## Every lane, the long tests included
	pytest tests -m ""

ci:  ## What a change must pass: all of the above except the long tests, in a new environment
	bash .ci/run
