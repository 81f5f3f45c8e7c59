# `make demo` on a fresh checkout installs everything and runs the quickstart; `make` lists the rest.

# The first interpreter that the lock file covers; another one: make PYTHON=/path/to/python3.12
COVERED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(COVERED)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
PACKAGES := flows tasks modalities infra
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help .venv demo test test-faults test-all lint lock clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

.venv: $(INSTALLED) ## install the locked dependencies and this checkout (about 7 GB with CUDA)

# The stamp is written last, so an interrupted install is taken up again.
$(INSTALLED): requirements.lock pyproject.toml
	@$(or $(PYTHON),false) -c '$(COVERED)' \
		|| { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=/path/to/it" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(INSTALLED) ## search SmolLM2-135M for its best slope and write a report
	$(BIN)/sparseramp search flows/specs/quickstart.toml

# Two files at a time, in the order of their names: those of commands, the longest, come first.
test: $(INSTALLED) ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" \
		-n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Results add up in runs/faults.jsonl: each call does what is left of a seed's points in its time.
SEED ?= 0
KILL = $(BIN)/python -m tests.faults.kill --seed $(SEED)
test-faults: $(INSTALLED) ## kill, hang and spoil whole searches, at most 40 minutes (SEED=1: others)
	$(BIN)/python -m tests.faults.hostile
	$(KILL) --seconds 400
	$(KILL) --points random --count 450 --seconds 400
	$(KILL) --fault term --step 9 --seconds 60
	$(KILL) --fault hang --step 9 --seconds 60
	$(KILL) --fault corrupt --step 3 --seconds 120
	$(KILL) --command study --points chain --seconds 120
	$(KILL) --cluster ray --points chain --seconds 500
	$(KILL) --cluster ray --points random --count 50 --seconds 300
	$(BIN)/python -m pytest -m slow -k "not smollm2" tests/faults tests/infra/test_services.py $(PYTEST_ARGS)

test-all: $(INSTALLED) ## all tests, those on real models and GPUs included
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# pip before 23.3 takes a pin of name[extra] for that alone, and a pin of name for that alone,
# so what is wanted both ways is written both ways.
lock: $(BIN)/uv ## resolve pyproject.toml again; versions move only where they must
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
		--generate-hashes --no-strip-extras --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" --quiet --output-file requirements.lock
	awk '/^[a-z0-9]/ { printf "%s", bare; bare = ""; extra = /\[/ } \
		extra { line = $$0; sub(/\[.*\]/, "", line); bare = bare line "\n" } \
		{ print } END { printf "%s", bare }' requirements.lock > .venv/requirements.lock
	mv .venv/requirements.lock requirements.lock
	$(BIN)/uv pip compile infra/deploy/cluster.in --constraint requirements.lock --universal \
		--python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
		$$(sed -n 's/^\([a-z0-9.-]*\)==.*/--no-emit-package=\1/p' requirements.lock) \
		--custom-compile-command "make lock" --quiet --output-file infra/deploy/cluster.lock

$(BIN)/uv:
	$(MAKE) $(INSTALLED)

clean: ## remove the environment and caches; runs stay
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
