# Every target makes and fills .venv first where that is needed (jobs/bootstrap.py).
PYTHON ?= python3# makes .venv; 3.11 or newer
DATA ?=# make quickstart DATA=FOLDER: raw data in any of the known formats
BUNDLES ?= artifacts/synthetic/bundles# make serve BUNDLES=FOLDER: where jobs.publish put them
ONCE ?=# make quickstart ONCE=1: end after the answer
QUICK ?=# make bench-serving QUICK=1, bench-training, chaos: try the harness, in minutes
BIN := .venv/bin
# load is a library; the others have targets of their own, or want to be told what to measure.
BENCHMARKS = $(filter-out $(addprefix benchmarks/,load.py serving.py chaos.py models.py ranking.py cuts.py polishing.py training.py finetuning.py distillation.py mfu.py),$(wildcard benchmarks/[a-z]*.py))
# The quickstart's bundle only where it is asked for: these two make one of their own.
MEASURE = $(if $(filter-out 0 no false,$(QUICK)),--quick) \
  $(if $(filter-out file default undefined,$(origin BUNDLES)),--bundles "$(BUNDLES)")

.DEFAULT_GOAL := help
.PHONY: help install quickstart check docs test browser promtool screenshots bench bench-serving bench-ranking recbole bench-training bench-finetuning chaos serve

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s%s\n", $$1, $$2}' Makefile

install: ## make .venv with the pinned dependencies, or say why not
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: no $(PYTHON): install Python 3.11 or newer, or name it with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) jobs/bootstrap.py

quickstart: install ## the whole path on a data set, up to an endpoint (DATA=FOLDER, ONCE=1)
	@$(BIN)/python -m jobs.quickstart \
	  $(if $(DATA),--data "$(DATA)") $(if $(filter-out 0 no false,$(ONCE)),--once)

check: install ## style, types, import directions, docs and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/test_docs.py tests/test_layout.py

docs: install ## rewrite the generated tables in docs/
	@$(BIN)/python -m tests.test_docs

test: install ## the whole test suite; the page is left out where there is no chromium
	$(BIN)/pytest

browser: ## install Debian's chromium, in which the page is tested
	@command -v chromium >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || { \
	    echo "error: no chromium: install it, on Debian with sudo apt-get install chromium" >&2; exit 1; }; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -qq -y --no-install-recommends chromium fonts-liberation >/dev/null; }

promtool: install ## Debian's promtool into .venv, with which the alarms are tested (20 MB)
	@command -v promtool >/dev/null || [ -x $(BIN)/promtool ] || { \
	  command -v apt-get >/dev/null || { echo "error: no promtool: install Prometheus" >&2; exit 1; }; \
	  set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; cd "$$folder"; \
	  get() { apt-get -qq -o APT::Sandbox::User=root download prometheus; }; \
	  get 2>/dev/null || { apt-get update -qq; get; }; \
	  dpkg-deb -x prometheus_*.deb .; mv usr/bin/promtool "$(CURDIR)/$(BIN)/"; }

screenshots: install browser ## take the pictures of the page in docs/images again
	SCREENSHOTS=docs/images $(BIN)/pytest -q $(addprefix tests/serve_apps/web/,test_page.py test_people.py)

bench: install ## the small benchmarks; each prints its figures
	@set -e; for file in $(BENCHMARKS); do \
	  name=$$(basename $$file .py); echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done

bench-serving: install ## the endpoint beside its peers, hours (QUICK=1: whether it works; BUNDLES=FOLDER)
	@$(BIN)/python -m benchmarks.serving $(MEASURE)

bench-ranking: install ## every source, fusion and peer on DATA=FOLDER, from raw files, with intervals
	@$(BIN)/python -m benchmarks.ranking --data "$(or $(DATA),$(error make bench-ranking needs DATA=FOLDER))"

recbole: install ## RecBole for bench-ranking, in a folder of its own: it wants old packages
	@$(BIN)/pip install -q --no-deps --upgrade --target artifacts/recbole -r benchmarks/peers/recbole.txt

bench-training: install ## the training engine beside plain trainers, half an hour (QUICK=1, DATA=FOLDER)
	@$(BIN)/python -m benchmarks.training \
	  $(if $(filter-out 0 no false,$(QUICK)),--quick) $(if $(DATA),--data "$(DATA)")

bench-finetuning: install ## what fine-tuning brings on DATA=FOLDER, with intervals (QUICK=1)
	@$(BIN)/python -m benchmarks.finetuning $(if $(filter-out 0 no false,$(QUICK)),--quick) \
	  --data "$(or $(DATA),$(error make bench-finetuning needs DATA=FOLDER))"

chaos: install ## faults under load: what users notice (QUICK=1, BUNDLES=FOLDER)
	@$(BIN)/python -m benchmarks.chaos $(MEASURE)

serve: install ## the endpoint on this machine: the quickstart's bundle, or BUNDLES=FOLDER
	@$(BIN)/python -m serve_apps.run --bundles "$(BUNDLES)"
