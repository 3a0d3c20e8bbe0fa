"""The command `sluice`: a table of subcommands, each imported when it is run, so that `sluice --help` answers at once.

A row of `COMMANDS` hands the words after its name to `module:function(words) -> int`, the exit code. What the user got
wrong is one line on standard error and exit code 2, never a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gateway.core.errors import ConfigError, GatewayError

if TYPE_CHECKING:
    from gateway.config import Config

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("answer requests in front of engines", "gateway.cli:serve"),
    "demo": ("a whole pool on this machine, with load: engines, gateway, client", "loadtest.demo:main"),
    "sim": ("run the scheduler over a trace in virtual time and report", "loadtest.sim_cli:main"),
    "compare": ("simulate policies x speeds x seeds in parallel and report", "loadtest.compare_cli:main"),
    "papers": ("set published tables and figures beside what comes out here", "loadtest.papers:main"),
    "replay": ("send a trace or a generated workload to a gateway and report", "loadtest.replay:main"),
    "fit": ("a profile from measurements, of a file or of a live engine", "loadtest.fit:main"),
    "bench": ("measure a part of Sluice on this machine", "loadtest.bench:main"),
    "replay-journal": ("feed a journal back: what decides otherwise", "gateway.hindsight:replay_journal"),
    "explain": ("one decision of a journal with every pair it looked at", "gateway.hindsight:explain"),
    "hash-key": ("the hash of an API key, as the settings hold it", "gateway.cli:hash_key"),
    "check-config": ("print every setting as a configuration file resolves it", "gateway.cli:check_config"),
    "version": ("print the version", "gateway.cli:version"),
}

USER_ERROR = 2
"""Exit code for what the user got wrong; the same as argparse's own."""
FAILED = 1
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 plus SIGINT."""


def main(words: Sequence[str] | None = None) -> int:
    """The exit code of the command that `words` (default: the command line) name."""
    words = sys.argv[1:] if words is None else words
    try:
        command = _choose(words)
        code = command(words[1:])
        sys.stdout.flush()
    except GatewayError as error:
        print(f"sluice: {error.message}", file=sys.stderr)
        return USER_ERROR if isinstance(error, ConfigError) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`sluice check-config | head`): say nothing, also not while Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _choose(words: Sequence[str]) -> Callable[[Sequence[str]], int]:
    rows = (f"  {name:<16}{summary}" for name, (summary, _) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="sluice",
        usage="sluice [-h] [--version] COMMAND ...",
        description="A request-level gateway for disaggregated LLM serving.",
        epilog="\n".join(("commands:", *rows, "", "sluice COMMAND --help tells more of each.")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("command", metavar="COMMAND", nargs="?", choices=COMMANDS, help="one of those below")
    chosen = parser.parse_args(words[:1])  # the words after it belong to the command
    if chosen.version:
        return version
    if chosen.command is None:
        parser.error("expected a command; sluice --help lists them")
    command: Callable[[Sequence[str]], int] = imported(COMMANDS[chosen.command][1])
    return command


def imported(target: str) -> Any:
    """What `module:name` names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


# ---- commands --------------------------------------------------------------------------------------------------------


def serve(words: Sequence[str]) -> int:
    """Runs the gateway until it is stopped; returns its exit code. Raises ConfigError."""
    config = serve_config(words)  # before the import: a wrong flag is answered at once
    if config.server.workers > 1 and not is_worker(os.environ):
        return int(imported("gateway.workers:serve")(config, words))
    return int(imported("gateway.app:serve")(config))


def is_worker(environ: Mapping[str, str]) -> bool:
    """Whether a supervisor started this process as one of its workers."""
    return bool(imported("gateway.seat:seat_of")(environ))


def serve_config(words: Sequence[str]) -> Config:
    """The settings that the flags of `sluice serve` ask for. Raises ConfigError."""
    from gateway.config import Config, LogFormat, from_flags

    parser = argparse.ArgumentParser(prog="sluice serve", description="Answer requests in front of engines.")
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings; flags win over it")
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default 8000)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that serve the port (default 1)")
    for role, what in (
        ("prefill", "a prefill engine"),
        ("decode", "a decode engine"),
        ("engine", "one that does both"),
    ):
        parser.add_argument(f"--{role}", metavar="URL", action="append", default=[], help=f"{what}; repeatable")
    parser.add_argument("--log-format", choices=[*LogFormat])
    parser.add_argument("--journal", metavar="FILE", help="write every event and decision there")
    parser.add_argument("--slo-ttft-ms", type=float, metavar="MS", help="bound on the first token, where none is asked")
    parser.add_argument("--slo-tbt-ms", type=float, metavar="MS", help="bound on the slowest tenth of token gaps")
    parser.add_argument("--policy", metavar="NAME", help="which feasible pair is chosen (default least_work)")
    parser.add_argument("--admission", metavar="NAME", help="whom to refuse although he could be served (default none)")
    flags = parser.parse_args(words)
    config = from_flags(
        prefill_urls=flags.prefill,
        decode_urls=flags.decode,
        engine_urls=flags.engine,
        host=flags.host,
        port=flags.port,
        workers=flags.workers,
        log_format=flags.log_format,
        journal=flags.journal,
        slo_ttft_ms=flags.slo_ttft_ms,
        slo_tbt_ms=flags.slo_tbt_ms,
        policy=flags.policy,
        admission=flags.admission,
        base=load_file(flags.config) if flags.config is not None else Config(),
    )
    if not config.engines and config.discovery.file is None:
        raise ConfigError("no engines: give --prefill URL and --decode URL, or --engine URL, or [[engines]] in a file")
    return config


def check_config(words: Sequence[str]) -> int:
    """Prints the resolved settings of a file; returns 0. Raises ConfigError."""
    from gateway.config import render

    parser = argparse.ArgumentParser(prog="sluice check-config", description="Print every setting as it resolves.")
    file = parser.add_mutually_exclusive_group(required=True)
    file.add_argument("file", metavar="FILE", nargs="?", help="TOML file of settings")
    file.add_argument("--config", metavar="FILE", help="the same")
    flags = parser.parse_args(words)
    print(render(load_file(flags.config if flags.file is None else flags.file)), end="")
    return 0


def hash_key(words: Sequence[str]) -> int:
    """Prints the hash of a key that is read from standard input, never from the command line; returns 0."""
    import getpass
    import secrets

    from gateway import auth

    parser = argparse.ArgumentParser(prog="sluice hash-key", description="Read an API key, print its SHA-256.")
    parser.add_argument("--new", action="store_true", help="make a key, and print it before its hash")
    flags = parser.parse_args(words)
    if flags.new:
        key = f"sk-{secrets.token_urlsafe(32)}"
        print(key)
    else:
        key = (getpass.getpass("API key: ") if sys.stdin.isatty() else sys.stdin.readline()).strip()
    if not key:
        raise ConfigError("hash-key: expected a key on standard input")
    print(auth.hash_key(key).hex())
    return 0


def version(words: Sequence[str]) -> int:
    """Prints the version of the installed distribution; returns 0."""
    from importlib import metadata

    argparse.ArgumentParser(prog="sluice version", description="Print the version.").parse_args(words)
    try:
        print(f"sluice {metadata.version('sluice')}")
    except metadata.PackageNotFoundError:
        print("sluice, not installed")
    return 0


def load_file(path: str) -> Config:
    """The settings of a TOML file, `${NAME}` filled in from the process's environment. Raises ConfigError."""
    from gateway.config import load
    from gateway.toml import read_text

    text = read_text(path)
    try:
        return load(text, os.environ)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None
