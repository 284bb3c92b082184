# make demo   train four methods on real digits with 40 % wrong labels, three seeds, and show the comparison
# make test   the tests (half an hour on two cores, nearly all compilation); make test-slow adds the long ones
# make lint   ruff, check and format
# make benchmarks   hypergradients beside other libraries (hours; those that cannot be installed are reported)
# make endurance   kills training runs 100 times at random moments; all must end as if nothing had happened (ten minutes)
# Every target makes what it needs in .venv first. Another interpreter: make PYTHON=python3.12 demo
PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin
OUT ?= out/demo
STAMP := $(VENV)/.installed

export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.3

.PHONY: demo test test-slow lint format wheel benchmarks check-peers endurance clean help
help:
	@sed -n 's/^# //p' Makefile | head -n 6

$(STAMP): requirements.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "auxjax needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Making the environment in $(VENV) (once; some minutes on a slow line) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[experiments,test]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m experiments.compare digits_noise --methods stl,stl+dev,equal,arml,jtds --seeds 0,1,2 --out $(OUT)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' -q

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

wheel: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# The peers live in an environment of their own. One that does not install is left out, and the benchmark says so.
$(PEERS)/.installed: benchmarks/hypergradients/peers/requirements.txt requirements.txt setup.cfg
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[experiments]'
	@grep -v '^#' benchmarks/hypergradients/peers/requirements.txt | while read -r peer; do \
	  $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check "$$peer" || echo "$$peer is left out"; done
	@touch $@

benchmarks: $(PEERS)/.installed
	$(PEERS)/bin/python -m benchmarks.hypergradients --out out/hypergradients

check-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m benchmarks.hypergradients.peers.check

endurance: $(STAMP)
	$(BIN)/python -m benchmarks.studies.endurance --out out/endurance.json

clean:
	rm -rf $(VENV) $(PEERS) .cache build dist *.egg-info
