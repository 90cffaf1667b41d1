# The environment is made once from requirements.lock; `make` then does what its targets say.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: run test lab notebooks help bench
help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, this is {v.major}.{v.minor}: set PYTHON=/path/to/python")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $(READY)

run: $(READY)    ## Iterative RPO with the default profile, a few minutes on two cores
	$(BIN)/python -m irpo_utils run --profile cpu --out runs/cpu

test: $(READY)   ## all tests
	$(BIN)/python -m pytest

lab: $(READY)    ## JupyterLab in the notebooks folder
	$(BIN)/jupyter lab notebooks

notebooks: $(READY)  ## remake and execute all notebooks from notebooks/source
	$(BIN)/python scripts/make_notebooks.py

bench: $(READY)  ## our stages against generate and TRL, side by side, about 20 minutes on two idle cores
	$(BIN)/python -m irpo_utils bench
