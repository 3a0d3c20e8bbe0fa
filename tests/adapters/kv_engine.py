"""A small engine cache that announces what it does in vLLM's words: the counterpart of the code under test."""

import hashlib

import msgspec


class KvEngine:
    """Keeps blocks of `block_tokens`, names them by SHA-256 like SGLang does, and writes messages."""

    def __init__(self, block_tokens=2):
        self.block_tokens = block_tokens
        self.held = {}
        self.messages = []
        self.events = []

    def store(self, tokens, medium="GPU"):
        """Caches the full blocks of a prompt and announces those that are new."""
        parent, new, digest = None, [], b""
        for first in range(0, len(tokens) - self.block_tokens + 1, self.block_tokens):
            page = tokens[first : first + self.block_tokens]
            digest = hashlib.sha256(digest + repr(page).encode()).digest()
            name = int.from_bytes(digest[:8], "big", signed=True)
            if (name, medium) in self.held and not new:
                parent = name
            else:
                new.append((name, page))
            self.held[name, medium] = tuple(tokens[: first + self.block_tokens])
        if new:
            self.events.append(
                {
                    "type": "BlockStored",
                    "block_hashes": [name for name, _ in new],
                    "parent_block_hash": parent,
                    "token_ids": [token for _, page in new for token in page],
                    "block_size": self.block_tokens,
                    "lora_id": None,
                    "medium": medium,
                }
            )

    def remove(self, number):
        """Drops the block announced as the `number`-th still there, if there is one."""
        if self.held:
            name, medium = sorted(self.held)[number % len(self.held)]
            del self.held[name, medium]
            self.events.append({"type": "BlockRemoved", "block_hashes": [name], "medium": medium})

    def clear(self):
        self.held.clear()
        self.events.append({"type": "AllBlocksCleared"})

    def publish(self):
        """Writes what happened since the last time as the next message; its three frames."""
        number = len(self.messages)
        payload = msgspec.msgpack.encode([float(number), self.events, 0])
        self.events = []
        self.messages.append([b"", number.to_bytes(8, "big"), payload])
        return self.messages[-1]

    def replay(self, first, oldest=0):
        """The messages of a replay from `first` on, as far back as `oldest`, and its end."""
        kept = [[b"", *frames] for frames in self.messages[max(first, oldest) :]]
        return [*kept, [b"", b"", b"\xff" * 8, b""]]
