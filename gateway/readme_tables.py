"""Tables of README.md that are made of the code: each stands between two markers, and a test keeps them the same."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def insert(text: str, name: str, table: str) -> str:
    """The document with the table between `<!-- NAME: ... -->` and `<!-- /NAME -->`. Raises ValueError without them."""
    begin, rest = text.split(f"<!-- {name}:", 1)
    head, rest = rest.split("-->", 1)
    end = rest[rest.index(f"<!-- /{name} -->") :]
    return f"{begin}<!-- {name}:{head}-->\n\n{table}\n{end}"


def main(argv: Sequence[str], name: str, table: str) -> None:
    """Prints the table; with `--write FILE` puts it into that file."""
    if argv[:1] == ["--write"]:
        document = Path(argv[1])
        document.write_text(insert(document.read_text(), name, table))
    else:
        sys.stdout.write(table)
