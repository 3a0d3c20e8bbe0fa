"""What real SGLang engines say of themselves, read: load, models and how they were started."""

from __future__ import annotations

import msgspec
import pytest

from adapters.kv_events import parse_server_info
from adapters.sglang.engine import parse_facts, parse_models, parse_report
from gateway.core.errors import MalformedEngineData
from gateway.core.types import Report, Role
from tests.adapters.transcripts import SGLANG


def recorded(name):
    return (SGLANG / name).read_bytes()


def loads(*ranks):
    return msgspec.json.encode({"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0} | rank for rank in ranks]})


def info(**fields):
    return msgspec.json.encode(fields)


def test_a_recorded_idle_load_is_read():
    facts = parse_report(recorded("loads_prefill.json"))
    assert facts.report == Report(0, 0, kv_usage_ratio=0.0, waiting_uncached_tokens=0, gen_tokens_per_s=0.0)
    assert facts.kv_capacity_tokens == 40_960


def test_a_recorded_prefill_engine_that_waits_for_its_decode_engine_says_so():
    assert parse_report(recorded("loads_prefill_waits.json")).report.waiting_count == 1


def test_a_recorded_decode_engine_that_waits_for_its_kv_says_so_and_holds_memory_for_it():
    report = parse_report(recorded("loads_decode_waits.json")).report
    assert (report.running_count, report.waiting_count) == (0, 1)
    assert report.kv_usage_ratio > 0


def test_ranks_add_up_and_usage_is_of_the_whole():
    one = {"num_running_reqs": 2, "num_waiting_reqs": 1, "num_used_tokens": 10, "max_total_num_tokens": 100}
    two = {"num_running_reqs": 3, "num_waiting_reqs": 0, "num_used_tokens": 80, "max_total_num_tokens": 100}
    facts = parse_report(loads(one, two))
    assert (facts.report.running_count, facts.report.waiting_count) == (5, 1)
    assert facts.report.kv_usage_ratio == pytest.approx(0.45)
    assert facts.kv_capacity_tokens == 200


def test_what_was_computed_and_not_yet_handed_over_counts_as_running():
    report = parse_report(loads({"num_running_reqs": 1, "disaggregation": {"prefill_inflight_queue_reqs": 2}})).report
    assert report.running_count == 3


def test_the_recorded_metrics_say_the_same_as_the_loads():
    metrics, told = parse_report(recorded("metrics_prefill.txt")), parse_report(recorded("loads_prefill.json"))
    assert metrics.report.running_count == told.report.running_count
    assert metrics.report.waiting_count == told.report.waiting_count
    assert metrics.kv_capacity_tokens == told.kv_capacity_tokens
    assert metrics.report.prefix_query_tokens > metrics.report.prefix_hit_tokens > 0


def test_of_a_metric_split_by_priority_the_whole_counts_once():
    page = b'sglang:num_running_reqs{priority=""} 3\nsglang:num_running_reqs{priority="1"} 3\nsglang:num_queue_reqs 0\n'
    assert parse_report(page).report.running_count == 3


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{}", b'{"loads":[]}', loads({"num_running_reqs": -1}), loads({"num_running_reqs": 1.5}), b'{"loads":'),
        *(b"sglang:num_running_reqs 1\n", b"sglang:num_running_reqs NaN\nsglang:num_queue_reqs 0\n", b"\xff\n"),
    ],
)
def test_a_report_that_is_none_is_an_error(body):
    with pytest.raises(MalformedEngineData):
        parse_report(body)


def test_a_rank_that_says_nothing_of_its_memory_leaves_the_usage_unknown():
    assert parse_report(loads({"num_used_tokens": 5, "max_total_num_tokens": 10}, {})).report.kv_usage_ratio is None


def test_the_recorded_models_are_read():
    facts = parse_models(recorded("models.json"))
    assert (facts.models, facts.lora_names, facts.max_model_tokens) == (("tiny",), (), 8192)


def test_an_adapter_in_the_model_list_has_a_parent():
    body = b'{"data":[{"id":"m","max_model_len":9},{"id":"sql","parent":"m"}]}'
    assert parse_models(body).lora_names == ("sql",)


@pytest.mark.parametrize(("name", "role"), [("prefill", Role.PREFILL), ("decode", Role.DECODE), ("single", Role.BOTH)])
def test_a_recorded_server_info_tells_role_page_capacity_and_context(name, role):
    facts = parse_facts(recorded(f"server_info_{name}.json"))
    assert facts.role is role
    assert facts.can_serve_alone == (role is Role.BOTH)
    assert (facts.block_tokens, facts.kv_capacity_tokens, facts.max_model_tokens) == (16, 40_960, 8192)
    assert facts.details["dp_size"] == 1


def test_only_a_prefill_engine_tells_where_its_bootstrap_server_is():
    told = {name: parse_facts(recorded(f"server_info_{name}.json")).details for name in ("prefill", "decode", "single")}
    port = msgspec.json.decode(recorded("server_info_prefill.json"))["disaggregation_bootstrap_port"]
    assert {name: details.get("disaggregation_bootstrap_port") for name, details in told.items()} == {
        "prefill": port,
        "decode": None,
        "single": None,
    }


def test_the_capacity_is_that_of_all_ranks():
    facts = parse_facts(info(max_total_num_tokens=1000, dp_size=4))
    assert (facts.kv_capacity_tokens, facts.details["dp_size"]) == (4000, 4)


@pytest.mark.parametrize("body", [b"", b"[]", info(disaggregation_mode="encode"), info(page_size=0), info(dp_size=0)])
def test_a_server_info_that_is_none_is_an_error(body):
    with pytest.raises(MalformedEngineData):
        parse_facts(body)


def test_a_recorded_server_info_names_where_kv_events_are_published():
    (source,) = parse_server_info(recorded("server_info_prefill.json"), engine_id="p", host="10.0.0.5")
    told = msgspec.json.decode(recorded("server_info_prefill.json"))["kv_events"]
    assert source.endpoint == f"tcp://127.0.0.1:{told['endpoint_port_base']}"
    assert source.replay_endpoint == f"tcp://127.0.0.1:{told['replay_endpoint_port_base']}"
    assert parse_server_info(recorded("server_info_decode.json"), engine_id="d", host="10.0.0.5") == ()
