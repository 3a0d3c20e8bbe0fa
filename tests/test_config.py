import ast
import math
import re
from pathlib import Path
from typing import get_origin

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import fields, replace

from gateway import config as config_module
from gateway import config_reference
from gateway import tenants as tenants_module
from gateway.config import Config, from_flags, load, load_engines, render
from gateway.core.errors import ConfigError
from gateway.core.types import Role
from gateway.toml import Secret

PAIR = """
[[engines]]
url = "http://10.0.0.1:8000"
role = "prefill"
[[engines]]
url = "http://10.0.0.2:8000"
role = "decode"
"""


def engine(lines: str = "", url: str = "http://10.0.0.9:8000") -> str:
    return f'[[engines]]\nurl = "{url}"\n{lines}\n'


def message(text: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, environ or {})
    return caught.value.message


# ---- what is documented ----------------------------------------------------------------------------------------------


def documented_fields() -> list[tuple[str, str, str]]:
    """(class, field, docstring) of every annotated field of the settings."""
    found = []
    texts = [Path(module.__file__).read_text() for module in (config_module, tenants_module)]
    for kind in [node for text in texts for node in ast.parse(text).body]:
        if isinstance(kind, ast.ClassDef):
            for node, after in zip(kind.body, [*kind.body[1:], None], strict=True):
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    found.append((kind.name, node.target.id, str(after.value.value) if is_text else ""))
    return found


@pytest.mark.parametrize(("kind", "name", "text"), documented_fields())
def test_every_field_has_a_docstring_with_its_unit_or_what_it_takes(kind, name, text):
    unit = r"[Ss]econds|bytes|characters|count|[Rr]equests|[Cc]onnections|[Bb]locks|port"
    choice = r"one of|One of|true or false|path|Path|File|URL|endpoint|prefill, decode|units and ranges|`\[|interface"
    assert re.search(f"{unit}|{choice}", text), f"{kind}.{name}"


def test_every_number_has_a_range_on_both_sides():
    for _, kind in config_reference.tables():
        for field in fields(kind):
            if re.search(r"\b(int|float)\b", str(field.type)):
                assert re.search(r"g[et]=.*l[et]=", str(field.type)), field.name


# ---- what loads ------------------------------------------------------------------------------------------------------


def test_an_empty_text_is_all_defaults():
    assert load("", {}) == Config()


def test_an_engine_gets_a_normal_url_an_id_and_the_common_limit():
    (settings,) = load(engine(url="HTTP://Gpu-7/") + "[admission]\nmax_in_flight_per_engine = 9", {}).engines
    assert (settings.url, settings.id, settings.max_in_flight) == ("http://gpu-7:80", "gpu-7:80", 9)


def test_an_engines_own_limit_wins():
    (settings,) = load(engine("max_in_flight = 3"), {}).engines
    assert settings.max_in_flight == 3


def test_an_integer_is_taken_for_a_duration():
    assert load("[watch]\ntimeout_s = 3", {}).watch.timeout_s == 3.0


def test_environment_variables_are_filled_in():
    (settings,) = load(engine('api_key = "${KEY}"', "http://${HOST}:1"), {"KEY": "k", "HOST": "h"}).engines
    assert settings.url == "http://h:1"
    assert settings.api_key == Secret("k")


def test_a_plug_ins_own_settings_pass_through_with_variables_filled_in():
    text = '[policy]\nname = "mine:Policy"\n[policy.settings]\nweights = [1, 2.5, "${W}"]\ninner = { deep = true }'
    assert load(text, {"W": "x"}).policy.settings == {"weights": [1, 2.5, "x"], "inner": {"deep": True}}


def test_a_doubled_dollar_is_a_literal():
    assert load('[journal]\npath = "$${A}/$$b/$c"', {}).journal.path == "${A}/$$b/$c"


def test_one_role_is_enough_where_a_file_may_bring_the_other():
    assert load(engine('role = "prefill"') + '[discovery]\nfile = "e.toml"', {}).engines[0].role is Role.PREFILL


def test_loading_what_was_resolved_changes_nothing():
    config = load(PAIR + engine(url="dns://pods.svc:8000"), {})
    assert load(render(config), {}) == config


# ---- what is refused -------------------------------------------------------------------------------------------------

HORRORS = [
    ("[server]\nport = 70000", "server.port: expected an integer, 0 <= value <= 65535, got 70000"),
    ("[server]\nport = -1", "server.port: expected an integer, 0 <= value <= 65535, got -1"),
    ("[server]\nport = true", "server.port: expected an integer, 0 <= value <= 65535, got true"),
    ('[server]\nport = "80"', 'server.port: expected an integer, 0 <= value <= 65535, got "80"'),
    ("[server]\nport = 80.0", "server.port: expected an integer, 0 <= value <= 65535, got 80.0"),
    (f"[server]\nport = 0x{'f' * 5000}", "server.port: expected an integer, 0 <= value <= 65535, got an integer of"),
    (f"[server]\nport = {'9' * 5000}", "not TOML: "),
    ("[watch]\ntimeout_s = nan", "watch.timeout_s: expected a number, 0 < value <= 86400, got nan"),
    ("[watch]\ntimeout_s = inf", "watch.timeout_s: expected a number, 0 < value <= 86400, got inf"),
    ("[watch]\ntimeout_s = 0", "watch.timeout_s: expected a number, 0 < value <= 86400, got 0"),
    (f"[watch]\ntimeout_s = 0x{'f' * 500}", "watch.timeout_s: expected a number, 0 < value <= 86400, got an integer"),
    ("[watch]\ntimeout_s = false", "watch.timeout_s: expected a number, 0 < value <= 86400, got false"),
    ("[watch]\ntimeout_s = 1979-05-27", "watch.timeout_s: expected a number, 0 < value <= 86400, got 1979-05-27"),
    ("[engine_client]\nkeepalive_s = 5", "engine_client.keepalive_s: expected a number, 0 < value < 5, got 5"),
    ("[engine_client]\nconnect_timeout_s = 90", "engine_client.connect_timeout_s: 90.0 is over first_event_timeout_s"),
    ("[watch]\nreport_stale_s = 0.5", "watch.report_stale_s: 0.5 must be over report_interval_s (0.5)"),
    ("[server]\nhost = ''", "server.host: expected a string of 1 to 256 characters"),
    (
        "[server]\nprot = 1",
        "server.prot: unknown key; did you mean port? [server] knows backlog, body_timeout_s, ",
    ),
    ("[severs]", "severs: unknown key; did you mean server? the top level knows admission, "),
    ('["a\\nb"]', '"a\\nb": unknown key; the top level knows '),
    ("server = 1", "server: expected a table, got 1"),
    ("engines = 1", "engines: expected [[engines]] tables, at most 10000, got 1"),
    ("[engines]", "engines: expected [[engines]] tables, at most 10000, got a table"),
    ("engines = [1]", "engines[0]: expected a table, got 1"),
    ("[[engines]]", "engines[0].url: missing; expected a string of 1 to 300 characters"),
    (engine("rol = 1"), "engines[0].rol: unknown key; did you mean role?"),
    (engine('role = "Prefill"'), 'engines[0].role: expected one of prefill, decode, both, got "Prefill"'),
    (engine('id = "a b"'), "engines[0].id: expected at most 280 letters, digits"),
    (engine('id = "a\\n"'), "engines[0].id: expected at most 280 letters, digits"),
    (engine('kv_events_endpoint = "host:1"'), "engines[0].kv_events_endpoint: expected a ZMQ endpoint such as tcp://"),
    (engine('metrics_url = "host/metrics"'), "engines[0].metrics_url: expected an http or https URL, got"),
    (engine("max_in_flight = 0"), "engines[0].max_in_flight: expected an integer, 1 <= value <= 1000000, got 0"),
    (engine() + engine(), "engines[1].url: http://10.0.0.9:8000 is engines[0].url already"),
    (engine('id = "x"', "http://a") + engine('id = "x"', "http://b"), "engines[1].id: x is engines[0].id already"),
    (engine('id = "b:80"', "http://a") + engine(url="http://b"), "engines[1].id: b:80 is engines[0].id already"),
    (engine(url="http://localhost:8000"), "engines[0].url: http://localhost:8000 is where the gateway itself listens"),
    (
        "[server]\nhost = 'gw'\n" + engine(url="http://GW:8000"),
        "engines[0].url: http://gw:8000 is where the gateway itself listens",
    ),
    (engine('role = "prefill"'), 'engines: pool "default" has prefill engines only; add one of role decode or both'),
    (
        PAIR + engine('role = "decode"\npool = "b"'),
        'engines: pool "b" has decode engines only; add one of role prefill or both',
    ),
    (engine('id = "mine"', "dns://pods:8000"), "engines[0].id: a dns:// URL stands for many engines"),
    (engine('metrics_url = "http://a/metrics"', "dns://pods:1"), "engines[0]: a dns:// URL stands for many engines"),
    ('[log]\nlevel = "loud"', 'log.level: expected one of debug, info, warning, error, got "loud"'),
    ("[policy]\nsettings = 3", "policy.settings: expected a table, got 3"),
    ("[policy.settings]\nx = nan", "policy.settings.x: expected a string, boolean, finite 64-bit number, list or"),
    ("[policy.settings]\nx = [0x8000000000000000]", "policy.settings.x[0]: expected a string, boolean, finite 64-bit"),
    (f"[policy.settings]\n{'a.' * 5000}b = 1", "policy.settings.a.a.a.a.a.a.a.a.a: nested deeper than 8 levels"),
    (f"a = {'[' * 5000}", "not TOML that can be read: nested too deeply"),
    ("[server", "not TOML: Expected ']' at the end of a table declaration (at end of document)"),
    ("[server]\nport = 1\nport = 2\n", "not TOML: Cannot overwrite a value (at line 3, column 9)"),
    ('[journal]\npath = "${NOPE}"', "journal.path: the environment variable NOPE is not set"),
    (
        '[journal]\npath = "${no such}"',
        "journal.path: expected ${NAME} with a variable's name, or $${ for a literal ${",
    ),
    ('[journal]\npath = "${A"', "journal.path: expected ${NAME} with a variable's name, or $${ for a literal ${"),
    ('[policy.settings]\nx = ["${NOPE}"]', "policy.settings.x[0]: the environment variable NOPE is not set"),
]


@pytest.mark.parametrize(("text", "start"), HORRORS, ids=range(len(HORRORS)))
def test_a_bad_setting_is_refused_with_its_path_and_what_is_allowed(text, start):
    assert message(text).startswith(start)
    assert "\n" not in message(text)


def loaded(text: str, environ: dict[str, str]) -> Config | str:
    """The settings, or the message of the refusal; any other exception passes through."""
    try:
        return load(text, environ)
    except ConfigError as error:
        return error.message


@given(st.text())
@example('engines = [{url="http://[::1%a]:1"}]')
@example("[policy.settings]\nx = 1979-05-27T07:32:00Z")
def test_any_text_is_settings_or_a_refusal_in_words(text):
    assert loaded(text, {})


TABLES = [field for field in fields(Config) if get_origin(field.type) is not tuple]
keys = st.sampled_from([(table.name, field.name) for table in TABLES for field in fields(table.type)])
values = st.sampled_from(
    ["0", "1", "-1", "2.5", "nan", "-inf", "true", '""', '"${A}"', "[]", "{}", "[[1]]", "07:32:00", "{ a = { b = 1 } }"]
)


@given(keys, values)
def test_any_value_anywhere_is_settings_or_a_refusal_that_names_the_key(key, value):
    result = loaded(f"[{key[0]}]\n{key[1]} = {value}", {"A": "a\nb"})
    if isinstance(result, str):
        assert result.startswith(key[0])
        assert key[1] in result
    else:
        assert load(render(result), {}) == result


# ---- secrets ---------------------------------------------------------------------------------------------------------


def test_a_secret_is_neither_printed_nor_rendered():
    config = load(engine('api_key = "hunter2"'), {})
    assert "hunter2" not in f"{config} {config!r} {render(config)}"
    assert 'api_key = "***"' in render(config)
    assert config.engines[0].api_key.reveal() == "hunter2"


@pytest.mark.parametrize("secret", ["hunter2\n", "hunter2 ", "", "hünter2", "hunter2" * 1000])
def test_a_secret_that_cannot_be_a_header_is_refused_without_showing_it(secret):
    refusal = message(engine('api_key = "${KEY}"'), {"KEY": secret})
    assert refusal == "engines[0].api_key: expected 1 to 4096 visible ASCII characters, got another value"


def test_a_refusal_shows_a_value_as_it_was_written_not_what_the_variable_holds():
    assert message('[log]\nlevel = "${LEVEL}"', {"LEVEL": "hunter2"}).endswith('got "${LEVEL}"')


# ---- the round trip --------------------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20) | st.sampled_from(["${", "$${A}"])
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
free = st.recursive(words | numbers, lambda inner: st.lists(inner) | st.dictionaries(words, inner), max_leaves=6)


@given(st.dictionaries(words, free, max_size=4), words, st.floats(0.6, 86_400), st.integers(1, 65_535))
def test_what_is_rendered_loads_to_the_same_settings(settings, path, stale_s, port):
    config = load(engine(url=f"https://[2001:DB8::{port:x}]:{port}"), {})
    config = replace(
        config,
        policy=replace(config.policy, settings=settings),
        journal=replace(config.journal, path=path),
        watch=replace(config.watch, report_stale_s=stale_s),
    )
    assert load(render(config), {}) == config


def test_render_prints_every_setting():
    text = render(load(PAIR + '[[models]]\nname = "m"\n[[tenants]]\nname = "t"\n', {}))
    for name, kind in config_reference.tables():
        assert name in text
        for field in fields(kind):
            assert re.search(rf"^(# )?{field.name}(:| =) ", text, re.MULTILINE), field.name


# ---- flags and discovery files ---------------------------------------------------------------------------------------


def test_flags_alone_make_a_config():
    config = from_flags(prefill_urls=["http://p:1"], decode_urls=["http://d:1"], engine_urls=["http://e:1"], port=0)
    assert [(e.id, e.role) for e in config.engines] == [("p:1", "prefill"), ("d:1", "decode"), ("e:1", "both")]
    assert config.server.port == 0


def test_flags_win_over_the_file_and_leave_the_rest():
    base = load(PAIR + "[server]\nhost = '0.0.0.0'\nport = 1", {})
    config = from_flags(engine_urls=["http://e:1"], port=2, log_format="json", journal="j", base=base)
    assert [e.url for e in config.engines] == ["http://e:1"]
    assert (config.server.host, config.server.port) == ("0.0.0.0", 2)
    assert (config.log.format, config.journal.path) == ("json", "j")


def test_without_engine_flags_the_files_engines_stay():
    assert from_flags(port=2, base=load(PAIR, {})).engines == load(PAIR, {}).engines


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        ({"port": 65_536}, "--port: expected an integer, 0 <= value <= 65535, got 65536"),
        ({"engine_urls": ["gpu:8000"]}, "--engine: expected http://host:port"),
        ({"prefill_urls": ["http://p"]}, 'engines: pool "default" has prefill engines only'),
        ({"engine_urls": ["http://e", "http://e:80"]}, "engines[1].url: http://e:80 is engines[0].url already"),
        ({"log_format": "xml"}, "--log-format: expected one of console, json, auto"),
    ],
)
def test_bad_flags_are_refused_by_name(flags, start):
    with pytest.raises(ConfigError) as caught:
        from_flags(**flags)
    assert caught.value.message.startswith(start)


def test_a_discovery_file_may_be_toml_or_json():
    from_toml = load_engines(PAIR, {}, max_in_flight=7)
    rows = '{"url": "http://10.0.0.1:8000", "role": "prefill"}, {"url": "http://10.0.0.2:8000", "role": "decode"}'
    assert load_engines(f'{{"engines": [{rows}]}}', {}, max_in_flight=7, is_json=True) == from_toml
    assert [settings.max_in_flight for settings in from_toml] == [7, 7]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"engines": {}}', "[" * 5000, '{"engines": [{"url": 1}]}'])
def test_a_broken_json_file_is_a_config_error(text):
    with pytest.raises(ConfigError):
        load_engines(text, {}, max_in_flight=1, is_json=True)


def test_durations_are_finite_however_they_are_written():
    assert all(math.isfinite(load(f"[watch]\ntimeout_s = {n}", {}).watch.timeout_s) for n in ("1e0", "1_0", "0x10"))


# ---- tenants and bounds ----------------------------------------------------------------------------------------------

KEY_HASH = "ab" * 32


def test_the_bounds_of_flags_win_over_the_file():
    base = load(PAIR + "[slo]\nttft_s = 9.0\ntbt_s = 0.2", {})
    config = from_flags(slo_ttft_ms=1500.0, base=base)
    assert (config.slo.ttft_s, config.slo.tbt_s) == (1.5, 0.2)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e12, math.nan])
def test_a_bound_that_makes_no_sense_is_refused_by_its_flag(value):
    with pytest.raises(ConfigError, match="--slo-tbt-ms"):
        from_flags(engine_urls=["http://e:1"], slo_tbt_ms=value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[tenants]]\nname = "a b"', "tenants[0].name: expected 1 to 128 letters"),
        ('[[tenants]]\nname = "a"\n[[tenants]]\nname = "a"', 'tenants[1].name: "a" is tenants[0].name already'),
        ('[[models]]\nname = "a"\n[[models]]\nname = "a"', 'models[1].name: "a" is models[0].name already'),
        (
            f'[[tenants]]\nname = "a"\nkey_hashes = ["{KEY_HASH}"]\n'
            f'[[tenants]]\nname = "b"\nkey_hashes = ["{KEY_HASH}"]',
            "tenants[1].key_hashes: a key of tenants[0] is here again",
        ),
        ('[[tenants]]\nname = "a"\nmax_priority = 3', "tenants[0].max_priority: is over slo.max_priority (2)"),
        ('[[tenants]]\nname = "a"\nweight = 0', "tenants[0].weight: expected a number"),
        ("[slo]\ndefault_priority = 3", "slo.default_priority: is over slo.max_priority (2)"),
        ("[slo]\nttft_s = -1", "slo.ttft_s: expected a number"),
        ('[auth]\ntenant_header = "x-tenant"', "auth.trusted_networks: missing"),
        ('[auth]\ntenant_header = "x tenant"', "auth.tenant_header: expected the name of a header"),
        ('[auth]\ntrusted_networks = "10.0.0.0/8"', "auth.trusted_networks: expected a list"),
    ],
)
def test_tenants_that_contradict_are_refused(text, said):
    assert message(text).startswith(said)


def test_a_key_where_its_hash_belongs_is_refused_without_showing_it():
    said = message('[[tenants]]\nname = "a"\nkey_hashes = ["sk-hunter2"]')
    assert said == "tenants[0].key_hashes: expected the 64 digits that `sluice hash-key` prints"


def test_a_list_of_secrets_is_not_shown_either():
    assert "hunter2" not in message('[[tenants]]\nname = "a"\nkey_hashes = ["sk hunter2"]')
