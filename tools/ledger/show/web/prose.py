"""Renders Markdown of the ledger as HTML in which nothing leads outside the page."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path

from ledger.show.web import library
from script import BadInput

SCROLL = '<div class="scroll" tabindex="0" role="region" aria-label="table">'


@cache
def renderer():
    """Return the Markdown renderer: tables as GitHub has them, raw HTML as text, each table in a frame."""
    library.require_packages()
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.add_render_rule("table_open", open_table)
    markdown.add_render_rule("table_close", close_table)
    markdown.add_render_rule("link_open", open_link)
    markdown.add_render_rule("image", show_image)
    return markdown


def open_table(self, tokens, index, options, env) -> str:
    """Begin a table in a frame that scrolls by itself on a narrow screen."""
    return f"{SCROLL}<table>\n"


def close_table(self, tokens, index, options, env) -> str:
    """End a table and its frame."""
    return "</table></div>\n"


def open_link(self, tokens, index, options, env) -> str:
    """Begin a link to an address of the web. One to a file beside the source leads nowhere from a page."""
    token = tokens[index]
    if not str(token.attrGet("href")).startswith(("https://", "http://")):
        token.attrs = {}
    return self.renderToken(tokens, index, options, env)


def show_image(self, tokens, index, options, env) -> str:
    """Leave pictures out: the page draws the curves itself, and shows other pictures where they belong."""
    return ""


def html_of(markdown: str) -> str:
    """Return Markdown as HTML."""
    return renderer().render(markdown)


def picture_address(path: Path) -> str:
    """Return a PNG as an address that holds the picture itself. Raises BadInput if it cannot be read."""
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot read: {error.strerror}") from None
    return f"data:image/png;base64,{base64.b64encode(blob).decode('ascii')}"
