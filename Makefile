# The front doors: demo, test, lint, bench; chaos runs as long as asked. Each makes the environment if need be.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEEDS := 10000
JOB := deployments/jobs/digits-3-regions.yaml

.PHONY: demo test lint bench chaos env

env: $(VENV)/.made

$(VENV)/.made: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "geotrain needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: env  ## one model, three regions, on this machine
	@test -d data/digits || $(BIN)/geotrain data digits --regions 3 --skew 0.5
	$(BIN)/geotrain run $(JOB)

test: env  ## every test
	$(BIN)/python -m pytest -q --durations=10

lint: env  ## ruff, mypy strict, the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet . || ($(BIN)/ruff format --diff .; false)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_layers.py

chaos: env  ## faults in real processes, then the core in virtual time: make chaos SEEDS=100000; the seed of a failure replays it
	$(BIN)/python -m pytest -q -m "chaos or not chaos" tests/chaos/test_processes.py tests/chaos/test_changes.py tests/chaos/test_stores.py tests/chaos/test_matrix.py
	$(BIN)/python -m tests.chaos --seeds $(SEEDS)

bench: env  ## every measurement, one after the other; results in bench/results
	for measurement in overhead startup strategies core scale prediction wan checkpoint recovery goodput convergence reproduction figures; do \
		$(BIN)/python -m bench.$$measurement || exit 1; \
	done
