"""Which templates are given content parts, by the rules of vLLM (its own tests use templates of these shapes)."""

import pytest

from gateway.content_format import ContentFormat
from gateway.template_sandbox import CompiledTemplate

LOOP = "{% for message in messages %}BODY{% endfor %}"
MACRO = "{% macro show(content) %}{% for item in content %}{{ item.text }}{% endfor %}{% endmacro %}"

ALIASED = "{% set a = messages %}{% set b = a[1:] %}{% for m in b %}{% for c in m.content %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "form"),
    [
        (LOOP.replace("BODY", "{{ message.content }}"), "string"),
        (LOOP.replace("BODY", "{% for c in message['content'] %}{% endfor %}"), "openai"),
        (LOOP.replace("BODY", "{% for c in message.content | list %}{% endfor %}"), "openai"),
        (LOOP.replace("BODY", "{% for c in message.content[1:] %}{% endfor %}"), "openai"),
        (LOOP.replace("BODY", "{% for c in content %}{% endfor %}"), "openai"),
        (LOOP.replace("BODY", "{% for c in message.tool_calls %}{% endfor %}"), "string"),
        ("{% set rest = messages[1:] %}" + LOOP.replace("messages", "rest").replace("BODY", "{{ message }}"), "string"),
        (ALIASED, "openai"),
        (MACRO + LOOP.replace("BODY", "{{ show(message.content) }}"), "openai"),
        (MACRO + LOOP.replace("BODY", "{{ show(content=message['content']) }}"), "openai"),
        (MACRO + LOOP.replace("BODY", "{{ show(message.name) }}"), "string"),
        ("{% for i, message in messages %}{% for c in message.content %}{% endfor %}{% endfor %}", "string"),
        ("{% set a = messages %}{% set messages = a %}{{ messages }}", "string"),
    ],
)  # fmt: skip
def test_a_template_that_loops_over_content_is_given_parts(source: str, form: str) -> None:
    assert CompiledTemplate(source, limit_chars=1000).content_format is ContentFormat(form)
