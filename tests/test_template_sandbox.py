"""A chat template renders as under transformers, and cannot run for ever, fill the memory or reach the program."""

from __future__ import annotations

import time

import pytest
from jinja2.exceptions import SecurityError, TemplateError, UndefinedError

from gateway.template_sandbox import CompiledTemplate, RenderBudget, RenderLimit


def render(source: str, *, limit_s: float = 0.05, limit_chars: int = 10_000, **variables: object) -> str:
    template = CompiledTemplate(source, limit_chars=limit_chars)
    return template.render(variables, RenderBudget(limit_s=limit_s, limit_chars=limit_chars))


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for x in xs %}{{ loop.index ~ '/' ~ loop.length }}{{ ',' if not loop.last }}{% endfor %}", "1/2,2/2"),
        ("{% for x in xs %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "1"),
        ("{% generation %}a{{ xs[1] }}{% endgeneration %}", "a2"),
        ("  {% if true %}\n  b\n  {% endif %}\n", "  b\n"),
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ {'b': 2, 'a': 1} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 1,\n "b": 2\n}'),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(1) + m(2) }}{{ missing }}{{ none }}", "[1][2]None"),
        ("{% set ns = namespace(n=0) %}{% for x in xs %}{% set ns.n = ns.n + x %}{% endfor %}{{ ns.n }}", "3"),
        ("{{ '%s-%02d' % ('a', 7) }}{{ '%s' | format(1) }}{{ '{}'.format(2) }}{{ 'ab' * 2 }}", "a-0712abab"),
        ("{% for x in xs recursive %}{{ x if x is number else loop(x) }}{% endfor %}", "12"),
    ],
)
def test_a_template_renders_as_jinja_says(source: str, text: str) -> None:
    assert render(source, xs=[1, 2]) == text


def test_the_clock_and_refusals_are_at_hand() -> None:
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    with pytest.raises(TemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% macro c() %}{{ caller() }}{% endmacro %}"
        "{% for a in range(9999) %}{% for b in range(9999) %}{% call c() %}{% endcall %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_never_ends_is_stopped(source: str) -> None:
    with pytest.raises(RenderLimit, match="time limit"):
        render(source, limit_chars=1_000_000)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{{ 'a' * 1000000000 }}",
        "{{ [1] * 100000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% set ns = namespace(x='ab') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% for a in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}",
        "{% macro m() %}{% for a in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaa' }}{% endfor %}{% endmacro %}{{ m() }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ range(1000000000) | list }}",
    ],
)
def test_a_template_that_builds_without_bound_is_stopped(source: str) -> None:
    with pytest.raises((RenderLimit, SecurityError)) as caught:
        render(source, limit_s=60.0)
    assert "time limit" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ xs.append(1) }}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_a_template_cannot_reach_the_program_or_change_its_values(source: str) -> None:
    with pytest.raises((SecurityError, UndefinedError)):
        render(source, xs=[])


def test_random_filler_text_is_not_to_be_had() -> None:
    with pytest.raises(UndefinedError):
        render("{{ lipsum(n=1) }}")


def test_a_render_that_nobody_waits_for_stops() -> None:
    template = CompiledTemplate("{% for a in range(99999) %}{{ a }}{% endfor %}" * 99, limit_chars=10**9)
    with pytest.raises(RenderLimit, match="nobody waits"):
        template.render({}, RenderBudget(limit_s=60.0, limit_chars=10**9, is_abandoned=lambda: True))


def test_the_variables_a_template_looks_up_are_known() -> None:
    template = CompiledTemplate("{% set a = b %}{{ a ~ c }}{% for d in range(2) %}{% endfor %}", limit_chars=100)
    assert {"b", "c"} <= template.variables
    assert template.variables.isdisjoint({"a", "d", "range"})
