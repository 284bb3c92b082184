# Every target makes what it needs in .venv first. Another interpreter: make PYTHON=python3.12 demo
PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin
OUT ?= out/demo
STAMP := $(VENV)/.installed

export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.3

.PHONY: demo check test test-all test-slow lint types format wheel benchmarks check-peers endurance clean help
.DEFAULT_GOAL := help
help:  ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18
	@sed -n '1s/^# //p' Makefile

$(STAMP): requirements.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "auxjax needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Making the environment in $(VENV) (once; some minutes on a slow line) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[experiments,test]'
	@touch $@

demo: $(STAMP)  ## train seven models on real digits with 40 % wrong labels, three seeds, and compare them (minutes)
	@$(BIN)/python -m experiments.compare digits_noise --methods stl,stl+dev,stl+dev_only,equal,arml,jtds,jtds+keep --seeds 0,1,2 --out $(OUT)

# Nearly all the time of the tests is XLA's: these make it compile in less than half the time what then runs slower, and
# keep even the smallest program, most of which many tests share. `make test-all` compiles as users do, and so does
# `make test XLA_FLAGS=`.
check test: export XLA_FLAGS ?= --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false \
  --xla_cpu_parallel_codegen_split_count=1
check test test-all: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0

check: lint  ## before every commit: lint, and one run of every method and solver (minutes, nearly all compilation)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'check and not slow' -q

test: $(STAMP)  ## the tests except the slow ones (minutes, nearly all compilation)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' -q

test-all: $(STAMP)  ## all tests, slow ones too, and what of auxjax/ they cover
	$(BIN)/python -m pytest -n 2 --dist loadfile -q --cov=auxjax --cov-branch --cov-report=term

test-slow: test-all

lint: types  ## ruff, check and format; the type checker
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(STAMP)  ## the type checker, on auxjax/
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

format: $(STAMP)  ## let ruff mend what it can
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

wheel: $(STAMP)  ## build the wheel in dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# The peers live in an environment of their own. One that does not install is left out, and the benchmark says so.
$(PEERS)/.installed: benchmarks/hypergradients/peers/requirements.txt requirements.txt setup.cfg
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[experiments]'
	@grep -v '^#' benchmarks/hypergradients/peers/requirements.txt | while read -r peer; do \
	  $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check "$$peer" || echo "$$peer is left out"; done
	@touch $@

benchmarks: $(PEERS)/.installed  ## hypergradients beside other libraries (hours; those that do not install are reported)
	$(PEERS)/bin/python -m benchmarks.hypergradients --out out/hypergradients

check-peers: $(PEERS)/.installed  ## the peers' losses and gradients are ours
	$(PEERS)/bin/python -m benchmarks.hypergradients.peers.check

endurance: $(STAMP)  ## kill training runs 100 times at random moments; all must end as if nothing had happened (half an hour on one core)
	$(BIN)/python -m benchmarks.studies.endurance --out out/endurance.json

clean:  ## remove environments, caches and builds
	rm -rf $(VENV) $(PEERS) .cache build dist *.egg-info
