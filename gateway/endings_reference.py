"""The table of endings in Markdown, made of `adapters/endings.py`.

`python -m gateway.endings_reference` prints it, with `--write README.md` it goes between that file's two markers; a
test keeps both the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

from adapters.endings import ENDINGS

HEAD = "| when | what happens | the request | the prefill engine's blocks are freed by |\n| --- | --- | --- | --- |\n"


def render() -> str:
    """One row per state and event."""
    return HEAD + "".join(
        f"| {state} | {event} | {ending.outcome} | {ending.release} |\n"
        for state, cells in ENDINGS.items()
        for event, ending in cells.items()
    )


def insert(text: str) -> str:
    """The document with the table between its two markers."""
    begin, rest = text.split("<!-- endings:", 1)
    head, rest = rest.split("-->", 1)
    end = rest[rest.index("<!-- /endings -->") :]
    return f"{begin}<!-- endings:{head}-->\n\n{render()}\n{end}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        document = Path(sys.argv[2])
        document.write_text(insert(document.read_text()))
    else:
        sys.stdout.write(render())
