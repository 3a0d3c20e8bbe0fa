#!/usr/bin/env bash
# Installs SGLang 0.5.23 for the CPU, with Mooncake's TCP transport: bash tests/engines/install_sglang.sh DIRECTORY
# About two minutes and 3.5 GB. Needs Python 3.11 or later (PYTHON names another interpreter than python3).
set -euo pipefail
directory=$1

"${PYTHON:-python3}" -m venv "$directory"
python=$directory/bin/python
"$python" -m pip install --quiet torch==2.13.0
# SGLang's own list of dependencies asks for CUDA builds, so it is left out and what the CPU needs is named below.
# torchvision is imported without a guard; 0.16.2 is the version that imports beside a torch it was not built for.
"$python" -m pip install --quiet --no-deps sglang==0.5.23 torchvision==0.16.2 \
    mooncake-transfer-engine-non-cuda==0.3.13.post1
printf 'torch==2.13.0\ntransformers==5.19.0\n' >"$directory/constraints.txt"
"$python" -m pip install --quiet --constraint "$directory/constraints.txt" \
    aiohttp 'anthropic>=0.20.0' apache-tvm-ffi==0.1.11 blobfile==3.0.0 build compressed-tensors==0.18.0 datasets distro \
    easydict einops fastapi gguf interegular IPython 'llguidance>=1.7.6,<2' 'mistral_common>=1.11.5' msgspec ninja \
    numba==0.65.1 numpy nvidia-ml-py openai==2.8.0 openai-harmony==0.0.4 orjson outlines==0.1.11 packaging \
    partial_json_parser pillow 'prometheus-client>=0.20.0' psutil py-spy pybase64 pydantic 'python-dateutil<3' \
    python-multipart 'pyzmq>=25.1.2' regex requests scipy sentencepiece==0.2.1 setproctitle 'smg-grpc-servicer>=0.9.0' \
    soundfile tiktoken tokenizers tqdm transformers==5.19.0 'uvicorn>=0.51' uvloop watchfiles xgrammar==0.2.7 xxhash \
    zstandard
# Mooncake's library is linked against this one of the system, though TCP needs none of it.
if ! ldconfig -p | grep -q 'libibverbs\.so\.1'; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libibverbs1 >/dev/null
    else
        echo "install_sglang.sh: libibverbs.so.1 is missing; install your system's package (Debian: libibverbs1)" >&2
        exit 1
    fi
fi
"$python" -c 'import sglang, mooncake.engine; print("SGLang", sglang.__version__)'
