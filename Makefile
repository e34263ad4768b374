# warmkv: everything a person or CI runs. `make help` lists it.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# What the GPU kernels are tested with on a CPU, beside .venv: triton's interpreter wants an older numpy.
TRITON := .venv-triton
TRITON_VERSION := 3.6.0
# Where pip finds PyTorch. Empty: pip's own index (the CUDA build on Linux, some GB). For the CPU build give
# PyTorch's CPU index: make setup TORCH_INDEX=URL
TORCH_INDEX ?=

BUF := npx --yes @bufbuild/buf@1.75.0
# The minor version whose wire contract the protos may add to and not break (proto/released).
RELEASED := 0.1

.PHONY: help setup triton demo test check proto release-protos bench bench-peers lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.stamp  ## make .venv from requirements.lock

$(VENV)/.stamp: requirements.lock pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(if $(TORCH_INDEX),$(PY) -m pip install --quiet torch==2.13.0 --index-url $(TORCH_INDEX))
	$(PY) -m pip install --quiet -r requirements.lock
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

triton: $(TRITON)/.stamp-$(TRITON_VERSION)  ## what the tests of the GPU kernels need, in .venv-triton (make test does it)

$(TRITON)/.stamp-$(TRITON_VERSION): | setup
	rm -rf $(TRITON)
	$(PY) -m pip install --quiet --no-deps --target $(TRITON) triton==$(TRITON_VERSION) "numpy>=2,<2.4"
	touch $@

demo: setup  ## see it work: four workers, real chats, three acts (add ARGS="--workers 2")
	$(VENV)/bin/warmkv demo $(ARGS)

test: setup triton  ## every test (add ARGS="-k name")
	$(PY) -m pytest $(ARGS)

check: setup  ## formatting, lint, types, import laws, generated code, protos and what they may not break
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PY) -m deploy.protos --check
	$(PY) -m deploy.reference --check
	@if command -v npx >/dev/null; then cd proto && $(BUF) lint && $(BUF) breaking --against released/$(RELEASED).binpb; \
	else echo "buf lint and buf breaking: skipped, npx is not installed"; fi

proto: setup  ## regenerate the Python stubs from proto/*.proto
	$(PY) -m deploy.protos

release-protos:  ## keep the wire contract of a release: make release-protos RELEASED=0.2
	cd proto && $(BUF) build --exclude-source-info -o released/$(RELEASED).binpb

bench: setup  ## the benchmarks, quickly (python -m bench.NAME for one of them in full)
	for name in reuse overhead e2e meet store faults eviction policies router handover \
		engine disagg kv_quality tensor_parallel; do $(PY) -m bench.$$name --quick || exit 1; done

bench-peers: setup  ## other routers beside ours; installs their wheels into ~/.cache/warmkv (ARGS="--quick")
	$(PY) -m bench.peers $(ARGS)

lock: setup  ## write requirements.lock from what is installed
	$(PY) -m pip freeze --exclude-editable > requirements.lock

clean:  ## remove the environment and caches
	rm -rf $(VENV) $(TRITON) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
