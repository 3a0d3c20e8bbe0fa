"""Engine addresses in one normal form, so that two spellings of one engine are one engine."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from gateway.core.errors import ConfigError

DNS_SCHEME = "dns"
"""`dns://name:port` stands for every address the name resolves to, spoken to in plain HTTP."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
# Names as resolvers take them, underscore included: container networks hand such names out.
_HOST = re.compile(r"[a-z0-9_]([a-z0-9._-]{0,252}[a-z0-9_.])?")


@dataclass(frozen=True, slots=True)
class Address:
    """Where an engine answers; 1 <= port <= 65535, `host` in lower case and without brackets."""

    scheme: str
    host: str
    port: int

    @property
    def netloc(self) -> str:
        """`host:port`, an IPv6 host in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """`scheme://host:port`, without a slash at the end."""
        return f"{self.scheme}://{self.netloc}"


def parse_address(url: str, path: str) -> Address:
    """The address that `url` names. Raises ConfigError starting with `path`, and never repeats a password."""
    if re.search(r"[^!-~]", url):
        raise ConfigError(f"{path}: a URL has no spaces, control or non-ASCII characters (write IDNs as xn--...)")
    if "@" in url:
        raise ConfigError(f"{path}: user and password do not belong in a URL; use api_key")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{path}: not a URL: {error}") from None
    _refuse_extras(parts, path)
    port = _DEFAULT_PORTS.get(parts.scheme) if port is None else port
    if not port:
        raise ConfigError(f"{path}: expected a port, 1 <= port <= 65535, as in {parts.scheme}://host:8000")
    return Address(parts.scheme, _parse_host(parts, path), port)


def _refuse_extras(parts: SplitResult, path: str) -> None:
    if parts.scheme not in (*_DEFAULT_PORTS, DNS_SCHEME):
        raise ConfigError(f"{path}: expected http://host:port, https://host:port or {DNS_SCHEME}://name:port")
    if parts.path not in ("", "/"):
        raise ConfigError(f"{path}: expected the engine's root, without the path {parts.path}")
    if parts.query or parts.fragment:
        raise ConfigError(f"{path}: expected the engine's root, without ? or #")


def _parse_host(parts: SplitResult, path: str) -> str:
    host = parts.hostname or ""
    if "[" in parts.netloc:
        if "%" in host:
            raise ConfigError(f"{path}: an address with a zone (%) is not supported")
        try:
            return str(ipaddress.IPv6Address(host))
        except ValueError as error:
            raise ConfigError(f"{path}: not an IPv6 address: {error}") from None
    if not _HOST.fullmatch(host):
        raise ConfigError(f"{path}: expected a host name of letters, digits, dots and dashes, got {host!r}")
    return host
