#!/usr/bin/env bash
# A prefill and a decode engine of SGLang on one host with two GPUs, and the gateway in front of them.
#   deploy/engines/sglang-pair.sh MODEL
# `"bind": true` is needed: SGLang connects to concrete addresses by default, and nobody listens there.
set -euo pipefail
model=${1:?usage: $0 MODEL}

engine() { # NAME GPU PORT EVENTS_PORT MODE [FLAGS...]
  CUDA_VISIBLE_DEVICES=$2 python -m sglang.launch_server --model-path "$model" --port "$3" --enable-metrics \
    --enable-cache-report --disaggregation-mode "$5" --disaggregation-transfer-backend mooncake \
    --kv-events-config "{\"publisher\":\"zmq\",\"endpoint\":\"tcp://127.0.0.1:$4\",\"bind\":true,\"topic\":\"kv-events\"}" \
    "${@:6}" >"$1.log" 2>&1 &
}

trap 'kill $(jobs -p)' EXIT
engine prefill 0 8100 5557 prefill --disaggregation-bootstrap-port 8998
engine decode 1 8200 5567 decode
cat >sluice-sglang.toml <<TOML
[[engines]]
url = "http://127.0.0.1:8100"
role = "prefill"
adapter = "sglang"

[[engines]]
url = "http://127.0.0.1:8200"
role = "decode"
adapter = "sglang"
TOML
sluice serve --port 8000 --config sluice-sglang.toml
