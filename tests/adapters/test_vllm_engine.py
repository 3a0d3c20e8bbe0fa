from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.base import Facts
from adapters.vllm.engine import parse_models, parse_report
from gateway.core.errors import MalformedEngineData
from gateway.core.types import Report
from tests.adapters.transcripts import VLLM


def page(*cores, running=1, waiting=2):
    """A metrics page of engine cores (KV usage, block size, blocks)."""
    lines = []
    for number, (usage, size, blocks) in enumerate(cores):
        lines += [
            f'vllm:num_requests_running{{engine="{number}"}} {running}',
            f'vllm:num_requests_waiting{{engine="{number}"}} {waiting}',
            f'vllm:num_requests_waiting_by_reason{{engine="{number}",reason="deferred"}} 99',
            f'vllm:kv_cache_usage_perc{{engine="{number}"}} {usage}',
            f'vllm:cache_config_info{{block_size="{size}",engine="{number}",num_gpu_blocks="{blocks}"}} 1.0',
        ]
    return "\n".join([*lines, ""]).encode()


def test_a_recorded_page_gives_load_and_capacity():
    assert parse_report((VLLM / "metrics_decode.txt").read_bytes()) == Facts(
        report=Report(0, 0, kv_usage_ratio=0.0, prefix_hit_tokens=0, prefix_query_tokens=1245, preemptions=0),
        block_tokens=128,
        kv_capacity_tokens=128 * 5461,
    )


def test_engine_cores_add_up_and_usage_is_weighted_by_capacity():
    facts = parse_report(page((0.5, 16, 300), (0.1, 16, 100)))
    assert (facts.report.running_count, facts.report.waiting_count) == (2, 4)
    assert facts.report.kv_usage_ratio == pytest.approx(0.4)
    assert (facts.block_tokens, facts.kv_capacity_tokens) == (16, 6400)


def test_what_one_core_does_not_say_is_not_known():
    facts = parse_report(page((0.5, 16, 300), (0.1, 16, "None")))
    assert (facts.report.kv_usage_ratio, facts.block_tokens, facts.kv_capacity_tokens) == (pytest.approx(0.3), 16, None)


def test_cores_with_different_blocks_have_no_block_size():
    assert parse_report(page((0, 16, 10), (0, 32, 10))).block_tokens is None


def test_a_usage_that_is_no_number_is_not_known():
    assert parse_report(page(("NaN", 16, 10))).report.kv_usage_ratio is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>\n",
        b"vllm:num_requests_running 1\n",
        page((0, 16, 10), running="NaN"),
        page((0, 16, 10), waiting=-1),
        page((0, 16, 10), (0, 16, 10), running="1e308"),
        page((1.5, 16, 10)),
        page((0, 16, 10))[:-1],
    ],
)
def test_a_page_without_a_sound_load_is_an_error(body):
    with pytest.raises(MalformedEngineData):
        parse_report(body)


def test_recorded_models():
    assert parse_models((VLLM / "models.json").read_bytes()) == Facts(models=("tiny",), max_model_tokens=8192)


def test_adapters_are_models_and_the_base_model_tells_the_limit():
    listed = parse_models(b'{"data":[{"id":"base","max_model_len":100},{"id":"lora","parent":"base"}]}')
    assert listed == Facts(models=("base", "lora"), lora_names=("lora",), max_model_tokens=100)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"data":[{}]}', b'{"data":[{"id":""}]}', b'{"data":null}'])
def test_a_model_list_that_is_not_sound_is_an_error(body):
    with pytest.raises(MalformedEngineData):
        parse_models(body)


@given(st.binary() | st.lists(st.text(st.sampled_from('0129.eNa-"'), max_size=5), min_size=4, max_size=4))
def test_any_bytes_give_facts_or_a_typed_error(body):
    with suppress(MalformedEngineData):
        parse_models(body if isinstance(body, bytes) else b"")
    with suppress(MalformedEngineData):
        found = parse_report(body if isinstance(body, bytes) else page(body[:3], running=body[3]))
        assert found.report.running_count >= 0
