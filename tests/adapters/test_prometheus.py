from __future__ import annotations

import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from adapters.prometheus import Sample, samples
from gateway.core.errors import MalformedEngineData
from tests.adapters.transcripts import VLLM


def read(text, *names):
    return list(samples(text.encode(), names or ("m",)))


@pytest.mark.parametrize(
    ("line", "labels", "value"),
    [
        ("m 1", {}, 1.0),
        ("m{} 1e-3", {}, 0.001),
        ('m{a="1",b="2"} 3.5', {"a": "1", "b": "2"}, 3.5),
        ('m{a="1",} 3', {"a": "1"}, 3.0),
        ('m{a="} 9 #"} 3', {"a": "} 9 #"}, 3.0),
        (r'm{a="q\"s\\n\n."} 3', {"a": 'q"s\\n\n.'}, 3.0),
        ("m +Inf", {}, math.inf),
        ("m 1 1700000000000", {}, 1.0),
        ('m 1 # {trace_id="x"} 0.5 1700000000.1', {}, 1.0),
        ('m{a="1"} 1 1700000000.1 # {} 2', {"a": "1"}, 1.0),
    ],
)
def test_each_form_of_a_line_is_read(line, labels, value):
    assert read(f"# HELP m Text.\n# TYPE m gauge\n{line}\nother 7\n") == [Sample("m", labels, value)]


def test_not_a_number_is_a_value():
    assert math.isnan(read("m NaN\n")[0].value)


def test_names_that_only_begin_alike_are_others():
    assert [sample.value for sample in read("m_total 1\nm 2\nxm 3\n# m 4\n")] == [2.0]


@pytest.mark.parametrize(
    "text",
    ["m 1", "m\t\n", "m x\n", "m 1_0\n", "m{a=1} 1\n", 'm{a="1" 1\n', 'm{a="1"b="2"} 1\n', "m{} 1 2 3\n"],
)
def test_a_wanted_line_that_is_not_well_formed_is_an_error(text):
    with pytest.raises(MalformedEngineData):
        read(text)


def test_a_recorded_page_reads_as_the_reference_parser_reads_it():
    page = (VLLM / "metrics_prefill.txt").read_text()
    reference = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    names = sorted({sample.name for sample in reference})
    expected = sorted((sample.name, sorted(sample.labels.items()), sample.value) for sample in reference)
    assert sorted((found.name, sorted(found.labels.items()), found.value) for found in read(page, *names)) == expected


@given(st.binary() | st.text(st.sampled_from('m{}="\\,#e1 \n'), max_size=30).map(str.encode))
def test_any_bytes_give_samples_or_a_typed_error(body):
    with suppress(MalformedEngineData):
        assert all(sample.name == "m" for sample in samples(body, ["m"]))
