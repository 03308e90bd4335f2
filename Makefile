# Each target makes the virtual environment first when it is missing or older than what defines it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test bench lint docs machine

demo: $(READY)
	$(BIN)/smca demo

# In parallel where there is no GPU to share. Each process holds a torch of its own, so not on all of many cores.
test: $(READY)
	$(BIN)/python -m pytest -n $$($(BIN)/python -c "import torch; print(0 if torch.cuda.is_available() else 'auto')") \
		--maxprocesses 8 --durations 15

# The compiled kernels, executed without a GPU: hundreds of cases. Interrupted, it goes on where it was.
machine: $(READY)
	$(BIN)/python tests/machine/hunt.py

bench: $(READY)
	$(BIN)/smca bench

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Warnings are errors: a link to a page, a heading or a name that is not there fails.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install -e ".[docs]" -c constraints.txt
	touch $@

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[triton,model,transformers,export,timm,hub,eval,video,serve,demo,test,dev]" -c constraints.txt
	touch $@
