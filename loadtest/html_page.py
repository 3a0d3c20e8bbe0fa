"""A self-contained HTML page: headings, text, tables and plots, readable in the light and in the dark. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1360px;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.15rem .7rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}
.plots{display:flex;flex-wrap:wrap;gap:1.5rem}
svg{font:11px system-ui,sans-serif;max-width:100%;height:auto;background:#fff;border:1px solid #e4e4e4}
svg .title{font-size:13px;font-weight:600}
svg .grid{stroke:#e4e4e4;stroke-width:1}
pre{white-space:pre-wrap}
@media (prefers-color-scheme:dark){body{color:#ddd;background:#16181c}th,td{border-color:#333}}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document."""
    return "\n".join(
        (
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *parts,
            "</body></html>",
            "",
        )
    )


def heading(text: str) -> str:
    """The title of a section."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    """Running text."""
    return f"<p>{escape(text)}</p>"


def preformatted(text: str) -> str:
    """Text that keeps its line breaks."""
    return f"<pre>{escape(text)}</pre>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column names its row."""
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def plots(charts: Iterable[str]) -> str:
    """SVG elements side by side."""
    return '<div class="plots">' + "".join(charts) + "</div>"
