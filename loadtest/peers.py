"""Other proxies that `sluice bench relay --start NAME` can start, each as its own documentation says.

    smg          .venv-peers/smg/bin/smg launch --worker-urls URL... --policy round_robin
                 with hand-off: --pd-disaggregation --prefill URL ... --decode URL ...
    vllm-router  .venv-peers/vllm-router/bin/vllm-router --worker-urls URL... --policy round_robin
                 with hand-off: --vllm-pd-disaggregation --prefill URL ... --decode URL ...
    litellm      .venv-peers/litellm/bin/litellm --config FILE: one model group of all engines
    aiohttp      python -m loadtest.plain_proxy: what one would write in an afternoon
    floor        python -m loadtest.byte_pump: uvloop and httptools, and nothing done

`make peers` installs the first three from PyPI at fixed versions, each into an environment of its own. The Rust routers
run with round robin, which is their cheapest: no tokens, no index, no prediction.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.processes import free_port, python

ENVIRONMENTS = Path(".venv-peers")


@dataclass(frozen=True, slots=True)
class Upstreams:
    """Where the engines are."""

    both: tuple[str, ...]
    prefill: tuple[str, ...]
    decode: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Peer:
    """How a proxy is started on a port, without and (where it can) with hand-off."""

    command: Callable[[int, Upstreams, Path], list[str]]
    hand_off: Callable[[int, Upstreams, Path], list[str]] | None = None
    program: Path | None = None
    """What `make peers` installs; None: it is ours."""
    rate_ratio: float = 1.0
    """Share of the bench's rate that it is offered: a proxy near its limit has no first-token time to speak of."""

    @property
    def is_installed(self) -> bool:
        return self.program is None or self.program.exists()


def _program(name: str) -> Path:
    return ENVIRONMENTS / name / "bin" / name


def _pairs(upstreams: Upstreams) -> list[str]:
    """`--prefill` and `--decode` flags."""
    prefills = [word for url in upstreams.prefill for word in ("--prefill", url)]
    return prefills + [word for url in upstreams.decode for word in ("--decode", url)]


def _smg(port: int, upstreams: Upstreams, folder: Path) -> list[str]:
    return [*_smg_base(port), "--worker-urls", *upstreams.both]


def _smg_hand_off(port: int, upstreams: Upstreams, folder: Path) -> list[str]:
    return [*_smg_base(port), "--pd-disaggregation", *_pairs(upstreams)]


def _smg_base(port: int) -> list[str]:
    quiet = ["--log-level", "error", "--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    return [
        str(_program("smg")),
        "launch",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--policy",
        "round_robin",
        *quiet,
    ]


def _vllm_router(port: int, upstreams: Upstreams, folder: Path) -> list[str]:
    return [*_vllm_router_base(port), "--worker-urls", *upstreams.both]


def _vllm_router_hand_off(port: int, upstreams: Upstreams, folder: Path) -> list[str]:
    return [*_vllm_router_base(port), "--vllm-pd-disaggregation", *_pairs(upstreams)]


def _vllm_router_base(port: int) -> list[str]:
    quiet = ["--log-level", "error", "--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    return [str(_program("vllm-router")), "--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin", *quiet]


def _litellm(port: int, upstreams: Upstreams, folder: Path) -> list[str]:
    models = [
        {
            "model_name": "emulated",
            "litellm_params": {"model": "openai/emulated", "api_base": f"{url}/v1", "api_key": "none"},
        }
        for url in upstreams.both
    ]
    file = folder / "litellm.yaml"
    # Without a key it starts only when told that this is meant; with one, every client would have to send it.
    general = {"dangerously_permit_weak_or_unset_master_key": True}
    file.write_text(json.dumps({"model_list": models, "general_settings": general}))  # JSON is YAML
    return [str(_program("litellm")), "--config", str(file), "--host", "127.0.0.1", "--port", str(port)]


def _ours(module: str) -> Callable[[int, Upstreams, Path], list[str]]:
    def command(port: int, upstreams: Upstreams, folder: Path) -> list[str]:
        engines = [word for url in upstreams.both for word in ("--engine", url)]
        return python(module, "--port", str(port), *engines)

    return command


PEERS: dict[str, Peer] = {
    "smg": Peer(_smg, _smg_hand_off, _program("smg")),
    "vllm-router": Peer(_vllm_router, _vllm_router_hand_off, _program("vllm-router")),
    "litellm": Peer(_litellm, program=_program("litellm"), rate_ratio=0.15),
    "aiohttp": Peer(_ours("loadtest.plain_proxy")),
    "floor": Peer(_ours("loadtest.byte_pump")),
}
"""By the name that `--start` takes."""


def missing(names: Sequence[str]) -> list[str]:
    """Those of the peers that are not installed."""
    return [name for name in names if not PEERS[name].is_installed]
