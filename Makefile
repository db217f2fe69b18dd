# Needs Python 3.11 or newer and nothing else: each target makes the environment it uses.
#   PYTHON=python3.12   the interpreter for the environment (found by itself otherwise)
#   EXTRAS=dev,peers    what to install for everything but the demo
#   VENV=.venv-peers    where
#   ARGS="-k wheel"     more arguments for pytest
#   JAX=0.7.0           `make test` runs the numerics alone, with this version of JAX (newest: with the newest) in .venv-jax-0.7.0

ifdef JAX
VENV ?= .venv-jax-$(JAX)
EXTRAS ?= numerics,linalg
TESTS ?= tests/numerics
PYTHONS := python3.13 python3.12  # the newest versions of JAX do not run with 3.11
endif
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= dev
TESTS ?= tests
JOBS ?= 2
RECENT = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(PYTHONS) python3.11 python3 python3.12 python3.13; do \
            $$p -c '$(RECENT)' 2>/dev/null && echo $$p && break; done)
DEV := $(VENV)/.installed-$(EXTRAS)

.PHONY: help demo test docs docs-serve prepare notebook clean
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-demo  ## the quickstart on real data: a report and a picture
	@$(BIN)/python -m ggn_nb.demo

test: $(DEV)  ## every check: notebooks, exports, README, pytest suite, wheel, site; with JAX=0.7.0 the numerics on that version
	@$(BIN)/pytest -n $(JOBS) --dist worksteal -ra --durations 10 $(TESTS) $(ARGS)

docs: $(DEV)  ## build the site into _docs
	@$(BIN)/python .ci/tools.py docs

docs-serve: docs  ## build the site and show it at http://localhost:8000
	@$(BIN)/python -m http.server --directory _docs 8000

prepare: $(DEV)  ## after an edit: clean the notebooks, export, refresh README.md and the sidebar
	@$(BIN)/python .ci/tools.py prepare

notebook: $(DEV)  ## execute NB=nbs/….ipynb (all without NB) and save its outputs; FLAGS="slow gpu" runs those cells too
	@$(BIN)/python .ci/tools.py run --flags "$(FLAGS)" $(NB)

clean:  ## remove the environments and all that was built
	@rm -rf .venv* .pytest_cache _docs _proc build dist *.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "ggn_nb needs Python 3.11 or newer: none was found (set PYTHON=...)"; exit 1; }
	@echo "making an environment in $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(BIN)/python -m pip install --quiet --upgrade pip

# Installed again when the requirements change.
$(VENV)/.installed-%: settings.ini setup.py | $(BIN)/python
	@echo "installing ggn_nb with its extras: $* (once, a minute or two)"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable ".[$*]" $(patsubst %,jax==%,$(filter-out newest,$(JAX)))
	@$(BIN)/python -m pip check
	@touch $@
