"""Readers of traces: what they give for good files, and that each kind of damage is named with its line."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadtest.traces import FORMATS, MAX_LINE_BYTES, TraceError, read_trace
from loadtest.workload import TraceRequest, WorkloadError, block_count

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BURST_2 = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def moon(**changes: object) -> str:
    line: dict[str, object] = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}
    return json.dumps({key: value for key, value in (line | changes).items() if value is not None}) + "\n"


def read(folder: Path, content: str | bytes, name: str | None = None) -> list[TraceRequest]:
    path = folder / "trace"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_trace(path, name))


def test_a_mooncake_line_is_a_request_with_its_blocks(tmp_path: Path) -> None:
    requests = read(tmp_path, moon(timestamp=3000) + moon(timestamp=6500, hash_ids=None))
    assert requests == [TraceRequest(0.0, 600, 5, (0, 1)), TraceRequest(3.5, 600, 5)]


def test_an_azure_row_is_a_request_counted_from_the_first(tmp_path: Path) -> None:
    rows = "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9305900,396,109"
    assert read(tmp_path, AZURE + rows) == [TraceRequest(0.0, 374, 44), TraceRequest(4.25, 396, 109)]


def test_azure_times_may_name_their_zone(tmp_path: Path) -> None:
    rows = "2024-05-10 00:00:00.009930+00:00,374,44\n2024-05-10 00:00:01.009930+00:00,396,109\n"
    assert [request.arrival_s for request in read(tmp_path, AZURE + rows)] == [0.0, 1.0]


def test_a_burstgpt_row_is_a_request_and_its_failed_rows_are_left_out(tmp_path: Path) -> None:
    rows = "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,0,0,0,API log\n118,GPT-4,417,276,693,API log\n"
    assert read(tmp_path, BURST + rows) == [TraceRequest(0.0, 472, 18), TraceRequest(113.0, 417, 276)]


def test_the_newer_burstgpt_columns_give_the_session(tmp_path: Path) -> None:
    rows = "5.5,77,1.2,ChatGPT,472,18,490,Conversation log\n6.5,,0.3,GPT-4,4,2,6,API log\n"
    assert [request.session for request in read(tmp_path, BURST_2 + rows)] == ["77", None]


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    assert len(read(tmp_path, b"\xef\xbb\xbf" + (moon() + "\n" + moon()).encode() + b"\n\n")) == 2


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("", 0, "no known format"),
        ("hello\n", 1, "no known format"),
        (moon() + moon()[:40], 2, "truncated"),
        (moon() + moon(input_length=-1), 2, "input_length"),
        (moon(output_length=0), 1, "output_length"),
        (moon(input_length="600"), 1, "input_length"),
        (moon(input_length=True), 1, "input_length"),
        (moon(input_length=1 << 40), 1, "input_length"),
        (moon(timestamp=float("nan")), 1, "malformed"),
        (moon(timestamp=-1), 1, "timestamp"),
        ('{"timestamp": 1e999, "input_length": 1, "output_length": 1}', 1, "range"),
        (moon(timestamp=None), 1, "timestamp"),
        (moon(hash_ids=[0]), 1, "1 hash ids for 600 tokens"),
        (moon(hash_ids=[0, -1]), 1, "hash_ids"),
        (moon(timestamp=1000) + moon(timestamp=500), 2, "time goes back by 0.5 s"),
        (moon() + "{" + "9" * MAX_LINE_BYTES, 2, "longer than"),
        (moon().encode() + b"\xff\xfe\n", 2, "not UTF-8"),
        (AZURE, 1, "holds no request"),
        ("TIMESTAMP,ContextTokens\n", 1, "lacks GeneratedTokens"),
        (AZURE + "2023-11-16 18:15:46,374\n", 2, "2 cells"),
        (AZURE + "yesterday,374,44\n", 2, "no date"),
        (AZURE + "2023-11-16 18:15:46,-374,44\n", 2, "ContextTokens is no number"),
        (AZURE + "2023-11-16 18:15:46,374,nan\n", 2, "GeneratedTokens is no number"),
        (AZURE + "2023-11-16 18:15:46,374,1_0\n", 2, "GeneratedTokens is no number"),
        (AZURE + "2023-11-16 18:15:46,0,44\n", 2, "ContextTokens is no token count"),
        (AZURE + "2023-11-16 18:15:46,374,4.5\n", 2, "GeneratedTokens is no token count"),
        (AZURE + "2023-11-16 18:15:46,3,4\n2023-11-16 18:15:45,3,4\n", 3, "time goes back by 1 s"),
        (BURST + "5,ChatGPT,472,18,490,Conversation l\n", 2, "Log Type"),
        (BURST + "5,ChatGPT,0,18,18,API log\n", 2, "Request tokens is no token count"),
        (BURST + "inf,ChatGPT,1,18,18,API log\n", 2, "Timestamp is no number"),
        (BURST + "5,ChatGPT,472\n", 2, "3 cells"),
        (BURST + "5,ChatGPT,-472,18,490,API log\n", 2, "Request tokens is no number"),
        (BURST + "-5,ChatGPT,472,18,490,API log\n", 2, "Timestamp is no number"),
        (BURST + "5,a,4,1,5,API log\n4.5,a,4,1,5,API log\n", 3, "time goes back by 0.5 s"),
        (AZURE + "2023-11-16 18:15:46,3,4\n" + "99" * MAX_LINE_BYTES, 3, "longer than"),
        (BURST + "5,a,4,1,5,API log\n" + "99" * MAX_LINE_BYTES, 3, "longer than"),
    ],
)
def test_damage_is_named_with_its_line(tmp_path: Path, content: str | bytes, line: int, problem: str) -> None:
    with pytest.raises(TraceError, match=problem) as caught:
        read(tmp_path, content)
    assert (caught.value.path, caught.value.line) == (tmp_path / "trace", line)
    assert str(caught.value).startswith(f"{tmp_path / 'trace'}:{line}: ")


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_file_is_an_error_in_every_format(tmp_path: Path, name: str) -> None:
    with pytest.raises(TraceError):
        read(tmp_path, "", name)


GOOD = {
    "mooncake": moon(),
    "azure": AZURE + "2023-11-16 18:15:46,3,4\r\n",
    "burstgpt": BURST + "5,ChatGPT,472,18,490,Conversation log\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_line_of_2_gb_is_named_without_being_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / "trace"
    path.write_text(GOOD[name])
    with path.open("r+b") as file:
        file.truncate(2 << 30)
    tracemalloc.start()
    with pytest.raises(TraceError, match="longer than") as caught:
        list(read_trace(path, name))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.line == GOOD[name].count("\n") + 1
    assert peak_bytes < 8 * MAX_LINE_BYTES


def test_a_missing_file_is_a_trace_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        list(read_trace(tmp_path / "nowhere"))


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="mooncake, azure, burstgpt"):
        read_trace(tmp_path, "parquet")


def test_requests_come_before_a_later_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(moon() + "damage\n")
    assert next(read_trace(path)).prompt_tokens == 600


lines = st.lists(
    st.tuples(st.integers(0, 10**7), st.integers(1, 10_000), st.integers(1, 5_000)), min_size=1, max_size=20
).map(lambda rows: sorted(rows, key=lambda row: row[0]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines)
def test_what_was_written_is_what_is_read(tmp_path: Path, rows: list[tuple[int, int, int]]) -> None:
    text = "".join(
        moon(timestamp=ms, input_length=prompt, output_length=output, hash_ids=list(range(block_count(prompt))))
        for ms, prompt, output in rows
    )
    requests = read(tmp_path, text)
    assert [(request.prompt_tokens, request.output_tokens) for request in requests] == [row[1:] for row in rows]
    assert [request.arrival_s for request in requests] == pytest.approx([(row[0] - rows[0][0]) / 1e3 for row in rows])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([("mooncake", moon()), ("azure", AZURE + "2023-11-16 18:15:46,3,4\n"), ("burstgpt", BURST)]),
    st.integers(0, 200),
    st.binary(max_size=30),
)
def test_any_damage_gives_valid_requests_or_a_trace_error(
    tmp_path: Path, good: tuple[str, str], cut: int, garbage: bytes
) -> None:
    name, content = good
    try:
        requests = read(tmp_path, content.encode()[:cut] + garbage, name)
    except TraceError:
        return
    assert requests
    assert all(request.prompt_tokens >= 1 and request.output_tokens >= 1 for request in requests)
