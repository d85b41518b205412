# make demo and make test need nothing but Python 3.11 or later: the environment is made in .venv,
# and made again only where pyproject.toml or constraints.txt has changed.
.DEFAULT_GOAL := help
.PHONY: help demo test nano clean

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
NANO := outputs/nano

help:
	@echo 'make demo    online RL on the nano model, with a table before and after (python run.py)'
	@echo 'make test    the tests, with style, types and import contracts'
	@echo 'make nano    train the nano model anew and put it in experiments/nano/base'
	@echo 'make clean   remove caches and the environment; outputs/ stays'

demo: $(STAMP)
	$(RUN) run.py

test: $(STAMP)
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Its parts go on where an earlier, interrupted `make nano` stopped.
nano: $(STAMP)
	$(RUN) run.py experiment=nano/autoencoder run.dir=$(NANO)/autoencoder resume=auto
	$(RUN) run.py experiment=nano/spelling run.dir=$(NANO)/spelling resume=auto
	$(RUN) run.py experiment=nano/base run.dir=$(NANO)/base resume=auto
	rm -rf experiments/nano/base
	cp -R $(NANO)/base/export experiments/nano/base

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# parity: packages that tests compare ours with, where nothing else finds them: torchvision from PyPI
# does not fit every torch, and beside one that it does not fit it breaks what imports it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or later is needed: make PYTHON=python3.12 …' >&2; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(RUN) -m pip install --quiet --no-deps --target $(VENV)/parity lpips==0.1.4 torchvision==0.28.0
	@touch $@
