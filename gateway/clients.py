"""Numbers that tell clients apart, and nothing else of them: their addresses, hashed with a key that nobody keeps."""

from __future__ import annotations

import secrets
from hashlib import blake2b


class Clients:
    """Gives the same number to the same address as long as the process lives."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(16)

    def number(self, address: str | None) -> int | None:
        """53 bits, so that JSON keeps it whole; None for an address that is not known."""
        if address is None:
            return None
        return int.from_bytes(blake2b(address.encode(), digest_size=8, key=self._key).digest()) >> 11
