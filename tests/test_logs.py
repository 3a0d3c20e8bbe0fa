from __future__ import annotations

import json

import structlog

from gateway import handlers, logs
from gateway.config import LogFormat, LogLevel, LogSettings


def test_json_is_one_object_per_line_with_level_and_time(capsys):
    logs.configure(LogSettings(format=LogFormat.JSON))
    structlog.get_logger("x").info("engine up", engine="e1")
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["engine"], line["level"]) == ("engine up", "e1", "info")
    assert line["timestamp"].endswith("Z")


def test_a_person_reads_plain_lines(capsys):
    logs.configure(LogSettings(format=LogFormat.CONSOLE))
    structlog.get_logger("x").info("engine up", engine="e1")
    said = capsys.readouterr().err
    assert "engine up" in said
    assert not said.startswith("{")


def test_auto_is_json_where_nobody_watches(capsys):
    logs.configure(LogSettings(format=LogFormat.AUTO))
    structlog.get_logger("x").info("engine up")
    assert json.loads(capsys.readouterr().err)["event"] == "engine up"


def test_lines_below_the_level_are_not_written(capsys):
    logs.configure(LogSettings(format=LogFormat.JSON, level=LogLevel.WARNING))
    structlog.get_logger("x").info("engine up")
    assert capsys.readouterr().err == ""


def test_a_failure_in_json_keeps_its_traceback_on_one_line(capsys):
    logs.configure(LogSettings(format=LogFormat.JSON))
    try:
        raise KeyError("x")
    except KeyError:
        structlog.get_logger("x").exception("unexpected failure")
    (line,) = capsys.readouterr().err.splitlines()
    assert "Traceback" in json.loads(line)["exception"]


def test_no_line_is_made_up_for_a_level_that_is_not_logged(monkeypatch):
    made = []
    monkeypatch.setattr(handlers, "log_line", lambda record: made.append(record) or {"status": 200})
    for level in (LogLevel.WARNING, LogLevel.INFO):
        logs.configure(LogSettings(format=LogFormat.JSON, level=level))
        handlers.log_record(level)
    assert made == [LogLevel.INFO]
