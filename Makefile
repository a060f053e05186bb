# Each target sets up .venv by itself the first time.
MANIFESTS ?= -f deployments/local.yaml -f deployments/tiny-moe.yaml
EXPERTMESH := .venv/bin/expertmesh

.DEFAULT_GOAL := help
.PHONY: help setup demo up test test-fast lint fmt bench bench-gateway chart dashboards model clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## create .venv and install everything (the other targets do this themselves)
	@scripts/setup.sh

demo: setup ## serve the tiny model, stream an answer, scale up and down, show the cost
	@$(EXPERTMESH) demo $(MANIFESTS)

up: setup ## the same system, staying up until Ctrl-C
	@$(EXPERTMESH) up $(MANIFESTS)

test: setup ## all tests
	@scripts/test.sh all

test-fast: setup ## the tests that need no Ray, vLLM or server; seconds
	@scripts/test.sh fast

lint: setup ## ruff, mypy strict, import-linter
	@scripts/lint.sh

fmt: setup ## format and mend, then lint
	@scripts/lint.sh fix

bench: setup ## the benchmarks of the whole system; prints tables
	@.venv/bin/python -m benchmarks.first_light

bench-gateway: setup ## the gateway alone on one core; with PEERS=1 beside other gateways
	@$(if $(PEERS),scripts/install-bench-peers.sh)
	@.venv/bin/python -m benchmarks.gateway $(if $(PEERS),--peers)

chart: setup ## regenerate the chart's schema and reference, lint all profiles, render the defaults
	@scripts/install-tools.sh
	@.venv/bin/python -m helm.generate_schema
	@.venv/bin/python -m helm.generate_reference
	@for values in helm/expertmesh/values.yaml helm/expertmesh/profiles/*.yaml; do \
	  .venv/bin/helm lint --strict helm/expertmesh --values "$$values" || exit 1; done
	@.venv/bin/helm template expertmesh helm/expertmesh

dashboards: setup ## generate the dashboards' JSON
	@.venv/bin/python -m dashboards.build

model: setup ## train the tiny model again (about 20 minutes)
	@.venv/bin/python models/train_tiny_qwen3_moe.py

clean: ## remove .venv and the local state
	rm -rf .venv .expertmesh
