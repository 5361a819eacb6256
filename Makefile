# Every target sets up what it needs: a machine with Python 3.11 to 3.13, make and git is enough.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test nightly chaos check fast lint protocol bench clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 8

demo: $(INSTALLED)  ## train a world model through Ray in minutes, then judge it: PASSED or FAILED
	$(BIN)/worldflux-dist train configs/demo.yaml --run-dir runs/demo

test: lint  ## what CI runs: format, lint, types, import rules, all tests but nightly and chaos
	$(BIN)/pytest -n 2 --dist loadfile -m "not chaos and not nightly"

nightly: $(INSTALLED)  ## toy tasks learned to the end on three nodes, after deaths and restarts
	$(BIN)/pytest -m nightly -rA

chaos: $(INSTALLED)  ## nodes and processes killed for twenty minutes
	$(BIN)/pytest -m chaos -rA

check: $(INSTALLED)  ## under a minute: all of lint beside the fast tests
	@$(MAKE) --no-print-directory -j2 lint fast

fast: $(INSTALLED)  ## the fast tests
	$(BIN)/pytest -q -m "not ray and not learning and not slow and not chaos and not nightly"

lint: $(INSTALLED)  ## format, lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

protocol: $(INSTALLED)  ## compile serve/*.proto
	cd worldflux_dist/serve && ../../$(BIN)/python -m grpc_tools.protoc -I . \
		--descriptor_set_out=protocol.binpb imagination.proto open_inference.proto

bench: $(INSTALLED)  ## the throughput of each part, next to peers and limits
	set -e; for script in benchmarks/systems/*.py; do echo "== $$script, $$(date +%H:%M)"; $(BIN)/python $$script; done

clean:  ## remove the virtual environment and every cache; runs/ stays
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	rm -rf .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
		echo "$(PYTHON) is not Python 3.11 to 3.13: name one, e.g. make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
