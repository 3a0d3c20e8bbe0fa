#!/usr/bin/env bash
# A prefill and a decode engine of vLLM on one host with two GPUs, and the gateway in front of them.
#   deploy/engines/vllm-pair.sh MODEL
# KV events let the gateway know every cached block; the replay endpoint lets it catch up after a pause. `recompute`
# makes a decode engine compute what it could not fetch, where the default fails the request (the gateway retries it).
set -euo pipefail
model=${1:?usage: $0 MODEL}

engine() { # NAME GPU PORT SIDE_CHANNEL_PORT EVENTS_PORT ROLE
  CUDA_VISIBLE_DEVICES=$2 VLLM_NIXL_SIDE_CHANNEL_PORT=$4 vllm serve "$model" --port "$3" --enable-prefix-caching \
    --enable-prompt-tokens-details \
    --kv-transfer-config "{\"kv_connector\":\"NixlConnector\",\"kv_role\":\"$6\",\"kv_load_failure_policy\":\"recompute\"}" \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"tcp://*:$5\",\"replay_endpoint\":\"tcp://*:$(($5 + 1))\"}" \
    >"$1.log" 2>&1 &
}

trap 'kill $(jobs -p)' EXIT
engine prefill 0 8100 5600 5557 kv_producer
engine decode 1 8200 5601 5567 kv_consumer
sluice serve --port 8000 --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
