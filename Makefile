# Needs Linux, make and a Python from 3.11 to 3.14. Every target makes .venv first and installs the package there, in
# place; pip's own configuration and environment (indexes, proxies, caches) are honoured.

VENV    := .venv
PYTHON  := $(VENV)/bin/python
STAMP   := $(VENV)/.installed
JOBS    := $(shell nproc 2>/dev/null || echo 1)
# Of the GPU tests: two cores are left for the driver's threads and for NumPy.
GPU_JOBS := $(shell n=$(JOBS); echo $$((n > 3 ? n - 2 : 1)))
# Of the compiler that `make test-dsl` tries.
DSL     := 4.8.0
FLAVOUR := cu12
DSL_VENV = .venv-dsl-$(DSL)-$(FLAVOUR)
PYTHONS := python3 python3.14 python3.13 python3.12 python3.11

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu test-dsl fingerprints lint bench clean

help:
	@echo "make demo      run the first example (without a Hopper GPU: compile it and compute it in NumPy)"
	@echo "make test      run every test that this machine can run"
	@echo "make test-gpu  compile every kernel, run the GPU tests, fail without a Hopper GPU, write tests/gpu_record.json"
	@echo "make test-dsl DSL=4.8.0 FLAVOUR=cu13  compile with another release or flavour of the CuTe DSL, and compare"
	@echo "make fingerprints  compile every kernel and record its code in tests/support/fingerprints.json"
	@echo "make lint      ruff, and the types of all but the kernels"
	@echo "make bench     time the prefill suite; ARGS=\"--suite varlen --peers fa3\" chooses, narrows or extends"
	@echo "make clean     remove .venv and what builds and tests leave behind"

# $(call make_venv,FOLDER): a virtual environment of the first Python that will do.
define make_venv
	@python=; for candidate in $(PYTHONS); do \
	    if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then \
	        python=$$candidate; break; \
	    fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "fa3_cute needs a Python from 3.11 to 3.14; tried: $(PYTHONS)" >&2; exit 1; \
	fi; \
	$$python -m venv $(1) || { \
	    echo "$$python cannot make a virtual environment; on Debian and Ubuntu, install python3-venv" >&2; exit 1; }
endef

# Made again only when pyproject.toml changes: the package is installed in place, its sources need no reinstall.
$(STAMP): pyproject.toml
	$(call make_venv,$(VENV))
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	@touch $@

demo: $(STAMP)
	$(PYTHON) examples/01_fp16_causal_prefill.py

# Side by side, by files: tests of a file share what is compiled or started once. Folder after folder: files of many
# tests, which would come first, are not those that take long.
test: $(STAMP)
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The cache is filled first, by many processes: the tests compile one kernel at a time. What does not compile there fails
# again where a test needs it.
test-gpu: export OPENBLAS_NUM_THREADS = 1
test-gpu: $(STAMP)
	-$(PYTHON) -m fa3_cute compile --all --jobs $(JOBS)
	FA3_CUTE_REQUIRE_GPU=1 $(PYTHON) -m pytest -m gpu -n $(GPU_JOBS) --dist worksteal --gpu-record tests/gpu_record.json

# In an environment of its own. The covering selection must compile clean, and to the code on record where that was made
# with the same flavour; doctor says which one is in use.
test-dsl: $(DSL_VENV)/.installed
	-$(DSL_VENV)/bin/python -m fa3_cute doctor
	$(DSL_VENV)/bin/python -m pytest -rs tests/kernels/test_configs.py tests/runtime/test_compiler.py

$(DSL_VENV)/.installed: pyproject.toml
	$(call make_venv,$(DSL_VENV))
	$(DSL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]' \
	    'nvidia-cutlass-dsl[$(FLAVOUR:cu12=)]==$(DSL)'
	@touch $@

fingerprints: $(STAMP)
	$(PYTHON) tests/support/fingerprints.py

lint: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m basedpyright

bench: $(STAMP)
	$(PYTHON) -m fa3_cute bench --suite prefill $(ARGS)

clean:
	rm -rf $(VENV) .venv-dsl-* dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
