# make demo   set up .venv, then run two methods on four emulated boards and compare them
# make test   set up .venv with the developers' tools, then every check
# make docs   build the documentation site into site/ (open site/index.html), with every warning an error
# make lock   write the locks from pyproject.toml, of nodes too (keeps versions that still fit; delete a lock to renew it)
# make schema write the JSON Schemas of inventory and experiment files from the code
# make clean  remove .venv and caches

PYTHON ?= python3
TORCH := 2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A hash for every file; no resolver: the lock is complete.  torch comes from its own index and stands apart.
INSTALL_LOCKED := $(PIP) install -qq --no-deps --require-hashes

# The variable silences what its makers say about other programs of theirs.
BUILD_DOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Tests that measure or disturb real processes run one after the other, in two rows: those on hosts of a virtual lab, and
# those on this machine, a virtual one among them.  All others run side by side before.
LOCAL := slow or cgroup or jtop or sshd
LOCAL_LOG := $(VENV)/local-tests.log

.DEFAULT_GOAL := help
.PHONY: help demo test check check-lab check-local docs lock schema clean

help:
	@sed -n 's/^# make /  make /p' Makefile

demo: $(VENV)/.data-ready
	$(BIN)/testbed run-method lora
	$(BIN)/testbed run-method fedpruner
	$(BIN)/testbed report

test: $(VENV)/.test-ready
	@$(MAKE) --no-print-directory check

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BUILD_DOCS)
	$(BIN)/python -m pytest -m "beside or not (lab or $(LOCAL) or vm)" -n auto
	@$(MAKE) --no-print-directory --jobs=2 --keep-going check-lab check-local; code=$$?; cat $(LOCAL_LOG); exit $$code

check-lab:
	$(BIN)/python -m pytest -m "lab and not (beside or vm)"

check-local:
	$(BIN)/python -m pytest -m "vm or ($(LOCAL)) and not (beside or lab)" >$(LOCAL_LOG) 2>&1

$(VENV)/.python: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: the controller needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	       "name another one: make demo PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
	  || { echo "make: $(PYTHON) cannot make virtual environments; install its venv package" \
	       "(Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.locked: $(VENV)/.python requirements.lock
	@echo "installing the locked versions into $(VENV) …"
	@$(INSTALL_LOCKED) -r requirements.lock
	@touch $@

# The CPU wheel where its index can be reached (quarter of the size, no CUDA libraries), else the plain one.
$(VENV)/.torch: $(VENV)/.locked
	@if $(BIN)/python -c 'import sys, torch; sys.exit(torch.__version__.split("+")[0] != "$(TORCH)")' 2>/dev/null; then :; \
	elif echo "installing torch $(TORCH), the CPU wheel …" && $(PIP) install -qq --no-deps --timeout 10 --retries 1 \
	  --index-url $(TORCH_CPU_INDEX) torch==$(TORCH) 2>/dev/null; then :; \
	else echo "the index of CPU wheels cannot be reached; installing the plain torch $(TORCH) …"; \
	  $(PIP) install -qq torch==$(TORCH); fi
	@$(BIN)/python -c 'import torch; print("torch", torch.__version__)'
	@touch $@

$(VENV)/.demo-ready: $(VENV)/.torch pyproject.toml
	@$(PIP) install -qq --no-deps --editable .
	@touch $@

# What is made once and cached: the corpus, the model's blocks, what an empty trainer takes here.
$(VENV)/.data-ready: $(VENV)/.demo-ready
	@$(BIN)/testbed run-method lora --dry-run >/dev/null
	@touch $@

$(VENV)/.test-ready: $(VENV)/.demo-ready requirements-dev.lock
	@echo "installing the developers' tools into $(VENV) …"
	@$(INSTALL_LOCKED) -r requirements-dev.lock
	@touch $@

LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-package torch \
  --custom-compile-command "make lock" --extra controller
# What a node needs without torch, with the controller's versions where its Python is as new.
NODE_LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-emit-package torch \
  --no-annotate --custom-compile-command "make lock" --constraint $(VENV)/node-constraints.txt

docs: $(VENV)/.test-ready
	$(BUILD_DOCS)
	@echo "the site is in site/: open site/index.html"

lock: $(VENV)/.test-ready
	$(LOCK) pyproject.toml --output-file requirements.lock
	$(LOCK) --extra dev --constraint requirements.lock pyproject.toml --output-file requirements-dev.lock
	@sed -n "s/^\([a-z0-9._-]*==[^ ]*\) ; \(.*\) \\\\$$/\1 ; python_full_version >= '3.11' and (\2)/p" requirements.lock \
	  > $(VENV)/node-constraints.txt
	echo pip | $(NODE_LOCK) pyproject.toml - --output-file inventory/node-requirements.lock

schema: $(VENV)/.test-ready
	$(BIN)/python tests/test_schema.py

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
