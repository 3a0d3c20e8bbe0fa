import io
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from gateway.cli import COMMANDS, imported, main, serve_config
from gateway.config import load
from gateway.core.errors import ConfigError

GOOD = '[[engines]]\nurl = "http://10.0.0.1:8000"\napi_key = "hunter2"\n'


@pytest.fixture
def good_file(tmp_path: Path) -> str:
    path = tmp_path / "sluice.toml"
    path.write_text(GOOD)
    return str(path)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "gateway", *words], capture_output=True, text=True, check=False)


def test_help_lists_every_command_and_imports_none_of_them():
    listing = "import sys; from gateway.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert not {"numpy", "msgspec", "aiohttp", "gateway.config"} & set(done.stdout.split())


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path):
    done = run("check-config", str(tmp_path / "none.toml"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"sluice: {tmp_path}/none.toml: cannot be read: No such file or directory\n"


def test_a_reader_that_leaves_is_no_error_of_ours(good_file):
    command = f"{sys.executable} -m gateway check-config {good_file} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize("flag", [[], ["--config"]])
def test_check_config_prints_what_loads_again(good_file, capsys, flag):
    assert main(["check-config", *flag, good_file]) == 0
    printed = capsys.readouterr().out
    assert "hunter2" not in printed
    assert load(printed, {}).engines[0].url == "http://10.0.0.1:8000"


@pytest.mark.parametrize("words", [["version"], ["--version"]])
def test_the_version_is_printed(words, capsys):
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("sluice")


@pytest.mark.parametrize("words", [[], ["serv"], ["check-config"], ["serve", "--port", "x"], ["version", "x"]])
def test_a_wrong_command_line_exits_with_2(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "usage: sluice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "start"),
    [
        (b"[server]\nport = \xff", "not UTF-8 at byte 16"),
        (b"[server]\nport =", "not TOML: Invalid value (at end of document)"),
        (b"[server]\nport = 0\nx", "not TOML: Expected '=' after a key in a key/value pair (at end of document)"),
        (b"[server]\nprot = 0", "server.prot: unknown key; did you mean port?"),
        (b"#" * (4 * 2**20 + 1), "larger than 4194304 bytes"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, capsys, content, start):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    assert main(["check-config", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"sluice: {path}: {start}")


@pytest.mark.parametrize("path", ["/", "\0", ""])
def test_a_path_that_is_no_file_is_refused(path, capsys):
    assert main(["serve", "--config", path]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_the_environment_fills_the_file(tmp_path, monkeypatch):
    path = tmp_path / "sluice.toml"
    path.write_text('[[engines]]\nurl = "${SLUICE_TEST_URL}"')
    monkeypatch.setenv("SLUICE_TEST_URL", "http://10.0.0.7:1")
    assert serve_config(["--config", str(path)]).engines[0].id == "10.0.0.7:1"


def test_serve_takes_engines_from_repeated_flags():
    words = ["--prefill", "http://a:1", "--prefill", "http://b:1", "--decode", "http://c:1", "--port", "9"]
    config = serve_config(words)
    assert [f"{engine.role} {engine.id}" for engine in config.engines] == ["prefill a:1", "prefill b:1", "decode c:1"]
    assert config.server.port == 9


def test_serve_flags_win_over_the_file(good_file):
    config = serve_config(["--config", good_file, "--host", "::1", "--log-format", "json", "--journal", "j.jsonl"])
    assert (config.server.host, config.log.format, config.journal.path) == ("::1", "json", "j.jsonl")
    assert config.engines[0].id == "10.0.0.1:8000"


def test_serve_without_engines_says_how_to_name_some(capsys):
    assert main(["serve"]) == 2
    assert "--prefill URL and --decode URL" in capsys.readouterr().err


def test_serve_starts_without_engines_when_a_file_may_bring_them(tmp_path):
    path = tmp_path / "sluice.toml"
    path.write_text('[discovery]\nfile = "engines.toml"')
    assert serve_config(["--config", str(path)]).engines == ()


def test_a_row_hands_the_rest_of_the_words_on_and_its_result_is_the_exit_code(monkeypatch):
    monkeypatch.setitem(COMMANDS, "count", ("count the words", "builtins:len"))
    assert main(["count", "--help", "x"]) == 2


def interrupt(words: list[str]) -> int:
    raise KeyboardInterrupt


def refuse(words: list[str]) -> int:
    raise ConfigError("journal.path: is a directory")


@pytest.mark.parametrize(("function", "code", "said"), [(interrupt, 130, ""), (refuse, 2, "sluice: journal.path: is")])
def test_how_a_command_ends_becomes_the_exit_code(monkeypatch, capsys, function, code, said):
    monkeypatch.setitem(COMMANDS, "it", ("", f"{function.__module__}:{function.__name__}"))
    assert main(["it"]) == code
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_row_names_something_that_can_be_called(name):
    assert callable(imported(COMMANDS[name][1]))


def test_a_key_is_hashed_from_standard_input_and_a_new_one_is_printed_with_its_hash(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("sk-1\n"))
    assert main(["hash-key"]) == 0
    assert capsys.readouterr().out.strip() == sha256(b"sk-1").hexdigest()
    assert main(["hash-key", "--new"]) == 0
    key, printed = capsys.readouterr().out.split()
    assert printed == sha256(key.encode()).hexdigest()


def test_no_key_is_a_user_error(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["hash-key"]) == 2
    assert "expected a key" in capsys.readouterr().err
