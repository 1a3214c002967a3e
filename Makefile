# Everything runs in .venv, which is made when missing. PYTHON names the interpreter it is made from (3.11 or newer).
# pip's own settings (PIP_EXTRA_INDEX_URL ...) apply; see README for a CPU-only torch.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo serve test test-clients test-ray-up test-dashboards chaos check proto dashboards clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## Make .venv with ernie, its tests and its tools.

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	touch $@

demo: venv  ## Start a small cluster, ask it about pictures and a clip, stop it.
	$(BIN)/ernie demo

serve: venv  ## Start a cluster and keep it; ARGS="--model DIR ..." are passed on.
	$(BIN)/ernie serve $(ARGS)

test: venv  ## Run all tests; ARGS="-k ..." are passed on.
	$(BIN)/python -m pytest $(ARGS)

chaos: venv  ## Kill and freeze parts under requests; TRIALS=100 SEED=1 FIRST=0 MUTANT=no_resume ARGS=...
	$(BIN)/python -m tests.chaos --trials $(or $(TRIALS),100) --seed $(or $(SEED),1) --first $(or $(FIRST),0) \
		--mutant "$(MUTANT)" $(ARGS)

test-clients: venv  ## Run other people's clients against a cluster; prints a line for each.
	$(BIN)/python -m pip install --quiet --editable '.[test,clients]'
	# Apart: instructor wants a jiter that the present openai does not.
	test -d $(VENV)/instructor || $(BIN)/python -m pip install --quiet --target $(VENV)/instructor 'instructor>=1.17'
	$(BIN)/python -m pytest tests/clients $(ARGS)

test-ray-up: venv  ## Bring up a cluster of namespaces by deploy/README.md (root on Linux; minutes); ARGS="-s" shows it.
	ERNIE_TEST_RAY_UP=1 $(BIN)/python -m pytest tests/deploy -rs $(ARGS)

test-dashboards: venv  ## Ask every panel and alert of a Prometheus that watches a cluster under load (minutes).
	$(BIN)/python -m pytest tests/dashboards -x -rs $(ARGS)

check: venv  ## Lint, types, import rules, protos, stubs, dashboards, links, spelling.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint proto
	$(BIN)/python .ci/stubs.py --check
	$(BIN)/python -m deploy.dashboards.generate --check
	$(BIN)/python .ci/links.py
	$(BIN)/codespell

proto: venv  ## Generate the stubs again.
	$(BIN)/python .ci/stubs.py

dashboards: venv  ## Make Grafana's dashboards again.
	$(BIN)/python -m deploy.dashboards.generate

clean:  ## Remove .venv and caches.
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
