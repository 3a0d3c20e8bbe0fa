"""Figures that others published, or that a simulation of ours with known constants gave: what runs are held against.

Source: Mooncake, FAST'25 (figures 5, 9, 10, 15) and arXiv 2407.00079 v3 (table 3); the closed-form reference
simulation with the constants of predictors/profiles/llama3-70b-8xa800-reference.json.
"""

from __future__ import annotations

FIGURE_5_MEAN_TTFT_S = {
    "random": 19.65,
    "least_loaded": 5.27,
    "mooncake_local": 3.58,
    "mooncake_global": 3.07,
}
"""Mean TTFT on the conversation trace, 16 nodes of 8xA800."""

FIGURE_9_HIT_RATIO = {"conversation": 0.40, "toolagent": 0.60, "synthetic": 0.66}
"""Prefix hit ratio of an unlimited cache, read off the plot."""
COUNTED_HIT_RATIO = 0.366
"""Of blocks, counted on the released conversation trace with an unlimited cache."""
THREE_MILLION_SHARE = 0.41
"""Of its maximum that one LRU cache of 3 M tokens reaches on the conversation trace (reference simulation)."""

FIGURE_10 = {"hit_ratio_gain": 2.36, "prefill_time_ratio": 0.52}
"""Global against local cache: at best so many times the hits, and this share of the prefill time."""
REFERENCE_FIGURE_10_GAIN = (1.03, 1.13)
"""Hits of a global pool over those of a scheduler that knows every local cache (reference simulation)."""

OVERLOAD_REJECTED = {"stage": 4183, "early": 3771, "predicted": 3589}
"""Of 23,000 requests replayed at 2x on 8 + 8 instances; the slice, t_d and thresholds are not given."""

SPEEDS = (1.5, 2.0, 2.5, 3.0, 4.0)
SETTING_A = {
    "random": (0.943, 0.922, 0.884, 0.846, 0.773),
    "least_loaded": (0.971, 0.962, 0.923, 0.881, 0.796),
    "mooncake_local": (0.975, 0.974, 0.968, 0.942, 0.879),
    "mooncake_global": (0.975, 0.975, 0.972, 0.958, 0.898),
}
"""8 + 8, TTFT 10 s, TBT 0.1 s, refusing on predicted TTFT: attained at SPEEDS (reference simulation)."""
SETTING_A_OTHERS = {
    "sglang_cache_aware": (0.972, 0.969, 0.959, 0.933, 0.845),
    "dynamo_kv": (0.974, 0.973, 0.964, 0.935, 0.870),
    "llm_d_predicted_latency": (0.961, 0.957, 0.939, 0.906, 0.826),
}
"""The same for routers that others ship."""
SETTING_B = {
    "ttft": (0.933, 0.370, 0.028, 0.022, 0.014),
    "stage": (0.970, 0.927, 0.852, 0.798, 0.716),
    "early": (0.971, 0.927, 0.852, 0.796, 0.685),
    "predicted": (0.970, 0.932, 0.853, 0.773, 0.643),
    "predicted, residual": (0.967, 0.913, 0.845, 0.794, 0.694),
}
"""8 + 2, TTFT 10 s, TBT 0.03 s, global cache aware, best of three margins: attained at SPEEDS (the same simulation)."""
CLAIRVOYANT = {"A": (0.975, 0.975, 0.972, 0.959, 0.903), "B": (0.974, 0.965, 0.932, 0.889, 0.814)}
"""Exact lengths, the dearest requests dropped (reference simulation)."""
FLUID_BOUND = {"A": (1.0, 1.0, 0.991, 0.975, 0.935), "B": (1.0, 1.0, 0.984, 0.958, 0.902)}
"""What the reference simulation counted as the most that any policy could attain."""
TOLERANCE = 0.02
"""What an attained ratio may differ by."""
