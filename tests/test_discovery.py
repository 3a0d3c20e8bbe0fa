import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway.config import Config, load
from gateway.core.events import EngineFound, EngineLost
from gateway.core.types import Engine, Role
from gateway.discovery import Directory, FileSource, difference, merge, resolve_name, static_engines

STATIC = '[[engines]]\nurl = "http://10.0.0.1:8000"\n'
DNS = '[[engines]]\nurl = "dns://pods:9000"\npool = "b"\napi_key = "k"\n'


class Zone:
    """A resolver whose answer can be changed; an exception as the answer is raised."""

    def __init__(self, answer: Sequence[str] | OSError = ()) -> None:
        self.answer = answer

    async def __call__(self, name: str, port: int) -> Sequence[str]:
        assert (name, port) == ("pods", 9000)
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


def engine(id: str, **facts: object) -> Engine:
    return Engine(id=id, url=f"http://{id}", role=Role.BOTH, **facts)


def with_file(path: Path) -> Config:
    return load(STATIC + f'[discovery]\nfile = "{path}"', {})


def ids(events: list[EngineFound | EngineLost]) -> list[str]:
    return [f"+{e.engine.id}" if isinstance(e, EngineFound) else f"-{e.engine_id}" for e in events]


def test_the_difference_names_what_left_then_what_came_or_changed():
    old = [engine("a:1"), engine("b:1"), engine("c:1")]
    new = [engine("d:1"), engine("b:1", pool="other"), engine("c:1")]
    assert ids(difference(old, new)) == ["-a:1", "+d:1", "+b:1"]


def test_there_is_no_difference_between_equal_lists():
    assert difference([engine("a:1"), engine("b:1")], [engine("b:1"), engine("a:1")]) == []


def test_static_engines_carry_their_settings_and_leave_names_to_dns():
    (found,) = static_engines(load(STATIC + 'role = "both"\npool = "x"\nconnector = "mooncake"\n' + DNS, {}))
    expected = Engine(
        id="10.0.0.1:8000",
        url="http://10.0.0.1:8000",
        role=Role.BOTH,
        pool="x",
        connector="mooncake",
        max_in_flight=256,
    )
    assert found == expected


def test_of_two_engines_with_one_id_or_url_the_first_stays():
    config = load(STATIC + 'id = "x"\n[[engines]]\nurl = "http://10.0.0.2:8000"\n', {})
    same_url = load(STATIC, {}).engines
    same_id = load('[[engines]]\nurl = "http://10.0.0.3:8000"\nid = "x"\n', {}).engines
    assert {i: s.url for i, s in merge([config.engines, same_url, same_id]).items()} == {
        "x": "http://10.0.0.1:8000",
        "10.0.0.2:8000": "http://10.0.0.2:8000",
    }


async def test_the_first_look_finds_everything_and_the_next_nothing():
    directory = Directory(load(STATIC, {}), {})
    assert ids(await directory.poll()) == ["+10.0.0.1:8000"]
    assert await directory.poll() == []


async def test_a_name_becomes_one_engine_per_address_with_the_entrys_settings():
    zone = Zone(["10.1.0.2", "10.1.0.1", "10.1.0.2", "fd00::1"])
    directory = Directory(load(DNS, {}), {}, resolver=zone)
    assert ids(await directory.poll()) == ["+10.1.0.1:9000", "+10.1.0.2:9000", "+[fd00::1]:9000"]
    settings = directory.settings["10.1.0.1:9000"]
    assert (settings.url, settings.pool, settings.api_key.reveal()) == ("http://10.1.0.1:9000", "b", "k")


async def test_engines_come_and_go_with_the_addresses():
    zone = Zone(["10.1.0.1", "10.1.0.2"])
    directory = Directory(load(DNS, {}), {}, resolver=zone)
    await directory.poll()
    zone.answer = ["10.1.0.2", "10.1.0.3"]
    assert ids(await directory.poll()) == ["-10.1.0.1:9000", "+10.1.0.3:9000"]
    assert "10.1.0.1:9000" not in directory.settings


async def test_a_failing_name_keeps_its_engines_and_is_told_once():
    zone = Zone(["10.1.0.1"])
    directory = Directory(load(STATIC + DNS, {}), {}, resolver=zone)
    await directory.poll()
    zone.answer = OSError("no answer")
    with capture_logs() as logs:
        assert [await directory.poll(), await directory.poll()] == [[], []]
    assert [(log["source"], log["reason"]) for log in logs] == [("dns://pods:9000", "no answer")]


async def test_a_name_that_never_resolves_does_not_hold_the_others_up():
    async def never(name: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return ()

    config = load(STATIC + DNS + "[discovery]\ntimeout_s = 0.001", {})
    assert ids(await Directory(config, {}, resolver=never).poll()) == ["+10.0.0.1:8000"]


async def test_a_file_is_followed(tmp_path):
    path = tmp_path / "engines.toml"
    path.write_text('[[engines]]\nurl = "http://10.0.0.2:1"')
    directory = Directory(with_file(path), {})
    assert ids(await directory.poll()) == ["+10.0.0.1:8000", "+10.0.0.2:1"]
    path.write_text('[[engines]]\nurl = "http://10.0.0.33:1"')
    assert ids(await directory.poll()) == ["-10.0.0.2:1", "+10.0.0.33:1"]


@pytest.mark.parametrize("broken", ["[[engines", '[[engines]]\nurl = "dns://pods:1"', "engines = 3", None])
async def test_a_broken_or_missing_file_keeps_its_engines(tmp_path, broken):
    path = tmp_path / "engines.toml"
    path.write_text('[[engines]]\nurl = "http://10.0.0.2:1"')
    directory = Directory(with_file(path), {})
    await directory.poll()
    path.unlink() if broken is None else path.write_text(broken)
    with capture_logs() as logs:
        assert await directory.poll() == []
    assert logs[0]["source"] == str(path)


async def test_a_file_is_read_again_only_when_it_changed(tmp_path):
    path = tmp_path / "engines.json"
    path.write_text('{"engines": [{"url": "http://a:1"}]}')
    stat = path.stat()
    source = FileSource(str(path), {}, max_in_flight=1)
    first = await source()
    path.write_text('{"engines": [{"url": "http://b:1"}]}')
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert await source() is first
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert [settings.id for settings in await source()] == ["b:1"]


async def test_following_begins_with_all_engines_and_goes_on_with_differences(tmp_path):
    path = tmp_path / "engines.toml"
    path.write_text("engines = []")
    config = load(STATIC + f'[discovery]\nfile = "{path}"\npoll_s = 0.001', {})
    events = Directory(config, {}).follow()
    assert ids([await anext(events)]) == ["+10.0.0.1:8000"]
    path.write_text('[[engines]]\nurl = "http://10.0.0.2:1"')
    assert ids([await anext(events)]) == ["+10.0.0.2:1"]
    await events.aclose()


async def test_the_systems_resolver_gives_one_family_only():
    assert await resolve_name("127.0.0.1", 80) == ["127.0.0.1"]
    assert await resolve_name("::1", 80) == ["::1"]
