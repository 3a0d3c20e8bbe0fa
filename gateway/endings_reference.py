"""The table of endings in Markdown, made of `adapters/endings.py`.

`python -m gateway.endings_reference` prints it, with `--write README.md` it goes between that file's two markers; a
test keeps both the same.
"""

from __future__ import annotations

import sys

from adapters.endings import ENDINGS
from gateway.readme_tables import main

HEAD = "| when | what happens | the request | the prefill engine's blocks are freed by |\n| --- | --- | --- | --- |\n"


def render() -> str:
    """One row per state and event."""
    return HEAD + "".join(
        f"| {state} | {event} | {ending.outcome} | {ending.release} |\n"
        for state, cells in ENDINGS.items()
        for event, ending in cells.items()
    )


if __name__ == "__main__":
    main(sys.argv[1:], "endings", render())
