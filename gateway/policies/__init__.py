"""Policies: which feasible pair. Pure plug-ins; to add one: one file, one line in the table, one test file.

Ours are in this folder. The rules of other routers, for comparison on the same engines and traces, are in `load`,
`prefix` and `prediction`, after what each of them looks at first.
"""

from __future__ import annotations

from gateway.core.interfaces import Policy
from gateway.policies.least_work import LeastWork
from gateway.policies.load.expected_wait import ExpectedWait
from gateway.policies.load.least_loaded import LeastLoaded
from gateway.policies.load.power_of_two import PowerOfTwo
from gateway.policies.load.random import Random
from gateway.policies.load.round_robin import RoundRobin
from gateway.policies.prediction.llm_d_predicted_latency import LlmDPredictedLatency
from gateway.policies.prediction.llumnix_slo import LlumnixSlo
from gateway.policies.prediction.mooncake_global import MooncakeGlobal
from gateway.policies.prediction.mooncake_local import MooncakeLocal
from gateway.policies.prediction.preble_e2 import PrebleE2
from gateway.policies.prediction.xllm_slo_aware import XllmSloAware
from gateway.policies.prefix.aibrix_prefix_cache import AibrixPrefixCache
from gateway.policies.prefix.dynamo_kv import DynamoKv
from gateway.policies.prefix.llm_d_sticky import LlmDSticky
from gateway.policies.prefix.prefix_hash import PrefixHash
from gateway.policies.prefix.production_stack_load_aware import ProductionStackLoadAware
from gateway.policies.prefix.sglang_cache_aware import SglangCacheAware
from gateway.policies.prefix.smg_cache_aware import SmgCacheAware
from gateway.policies.prefix_affinity import PrefixAffinity
from gateway.policies.sluice import Sluice

POLICIES: dict[str, type[Policy]] = {
    "sluice": Sluice,
    "least_work": LeastWork,
    "prefix_affinity": PrefixAffinity,
    "random": Random,
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "power_of_two": PowerOfTwo,
    "expected_wait": ExpectedWait,
    "sglang_cache_aware": SglangCacheAware,
    "smg_cache_aware": SmgCacheAware,
    "prefix_hash": PrefixHash,
    "dynamo_kv": DynamoKv,
    "llm_d_sticky": LlmDSticky,
    "llm_d_predicted_latency": LlmDPredictedLatency,
    "production_stack_load_aware": ProductionStackLoadAware,
    "aibrix_prefix_cache": AibrixPrefixCache,
    "xllm_slo_aware": XllmSloAware,
    "llumnix_slo": LlumnixSlo,
    "preble_e2": PrebleE2,
    "mooncake_local": MooncakeLocal,
    "mooncake_global": MooncakeGlobal,
}
