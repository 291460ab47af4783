# Two commands: `make demo` and `make test`. Each is a few plain commands; without make, copy them from here or from the README.
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= runs/demo
JOBS   ?= 2
BIN     = $(VENV)/bin
PINS    = -c constraints.txt
SPEC    = settings.ini setup.py pyproject.toml constraints.txt

.PHONY: help demo test lab clean

help:                  ## what can be made
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */make \1	/'
	@echo 'PYTHON=python3.12 chooses the Python, VENV=folder the environment, JOBS=4 the number of test processes.'

demo: $(VENV)/.demo    ## train on the synthetic city, map a whole scene, write a report (runs/demo/report.html)
	$(BIN)/rs-mtl train plain --data city --out $(OUT) --resume
	$(BIN)/rs-mtl predict $(OUT)
	$(BIN)/rs-mtl report $(OUT)

test: $(VENV)/.all     ## all tests: notebooks, properties, faults, packaging, style
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lab: $(VENV)/.all      ## the notebooks, in JupyterLab
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) index.ipynb

clean:                 ## remove what tools leave behind; .venv and runs/ stay
	rm -rf build dist *.egg-info _proc _docs .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find rs_mtl nbs tests tools \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# The environment, made once. A second run finds these marks and starts at once; they grow old when what is required changes.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "rs_mtl needs Python 3.11 or newer; `$(PYTHON) --version 2>&1` was found. Try: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo 'This Python cannot make environments (no venv or ensurepip). On Debian or Ubuntu: apt install python3-venv' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.python $(SPEC)
	$(BIN)/python -m pip install $(PINS) -e '.[notebooks]'
	@touch $@

$(VENV)/.all: $(VENV)/.python $(SPEC)
	$(BIN)/python -m pip install $(PINS) -e '.[notebooks,maps,dev]'
	@touch $@ $(VENV)/.demo
