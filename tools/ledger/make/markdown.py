"""Markdown tables, and the blocks of a page that a command rewrites."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from script import BadInput

RULES = {"l": "---", "r": "---:"}


def one_line(text: object) -> str:
    """Return the text with every run of blanks and control characters as one blank."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def cell(text: object) -> str:
    """Return the text on one line with its pipes escaped, so that it fits in one cell."""
    return one_line(text).replace("|", "\\|")


def row(cells: Iterable[str]) -> str:
    """Return one line of a table."""
    return f"| {' | '.join(cells)} |"


def table(head: list[str], rows: Iterable[Iterable[str]], align: str | None = None) -> list[str]:
    """Return the lines of a table.

    align: `l` or `r` for every column; by default the first is left and the others, numbers, are right.
    """
    if align is None:
        align = "l" + "r" * (len(head) - 1)

    rule = "|".join(RULES[side] for side in align)
    return [row(head), f"|{rule}|", *map(row, rows)]


class Block(NamedTuple):
    """The part of a page between two marker lines. A command rewrites it; the rest is written by hand."""

    start: str
    end: str

    def begins_in(self, page: str) -> bool:
        """Return whether the page has the first marker."""
        return self.start in page

    def replaced(self, page: str, text: str, path: Path) -> str:
        """Return the page with `text` between the markers.

        Raises BadInput, naming `path`, unless each marker is there once and in order.
        """
        once_each = page.count(self.start) == 1 and page.count(self.end) == 1
        if not once_each or page.index(self.start) > page.index(self.end):
            raise BadInput(f"{path}: needs the line {self.start} and below it {self.end}, once each")

        before = page[: page.index(self.start)]
        after = page[page.index(self.end) :]
        return f"{before}{self.start}\n{text}{after}"


def block(name: str) -> Block:
    """Return the block of this name: `<!-- NAME:start -->` to `<!-- NAME:end -->`."""
    return Block(f"<!-- {name}:start -->", f"<!-- {name}:end -->")
