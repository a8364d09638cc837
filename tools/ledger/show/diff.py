"""Compares two submissions: settings first, then source by section, without changes of comments."""

from __future__ import annotations

import ast
import difflib
import io
import os
import re
import shutil
import signal
import subprocess
import tokenize
from html import escape
from pathlib import Path
from typing import NamedTuple

from ledger.files import read_json, read_text
from ledger.read.runlog import config_value, parse_log

ABSENT = "(absent)"
CONTEXT = 3  # unchanged lines shown around a change


class Side(NamedTuple):
    """One of the two submissions. Its config is None when only a script is known."""

    config: dict[str, object] | None
    source: str


def load_side(target: Path) -> Side:
    """Return config and source of a record folder, a log or a .py file."""
    if target.is_dir():
        path = target / "config.json"
        config = read_json(path) if path.exists() else None
        return Side(config, read_text(target / "train_gpt.py"))
    if target.suffix == ".py":
        return Side(None, read_text(target))

    run = parse_log(target)
    return Side({key: config_value(value) for key, value in run.config.items()}, run.source)


def config_diff(a: dict | None, b: dict | None) -> list[str]:
    """Return lines `key: old -> new`, in which a key that only one side has shows as `(absent)`."""
    if a is None or b is None:
        return ["config: not compared, a bare script does not say how it was run"]

    keys = sorted(set(a) | set(b))
    changed = [key for key in keys if a.get(key, ABSENT) != b.get(key, ABSENT)]
    lines = [f"config: {len(changed)} of {len(keys)} values differ"]
    return lines + [f"  {key}: {a.get(key, ABSENT)} -> {b.get(key, ABSENT)}" for key in changed]


# ---- source, by section --------------------------------------------------------------------------


def without_comments(source: str) -> list[str]:
    """Return the source's lines with comments and docstrings blanked; unchanged when it does not parse."""
    lines = source.splitlines()
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError):
        return lines

    view = list(lines)
    for token in tokens:
        if token.type == tokenize.COMMENT:
            line, column = token.start
            view[line - 1] = lines[line - 1][:column]

    for node in ast.walk(tree):
        docstring = docstring_of(node)
        if docstring and lines[docstring.lineno - 1].lstrip().startswith(('"', "'", "r")):
            count = docstring.end_lineno - docstring.lineno + 1
            view[docstring.lineno - 1 : docstring.end_lineno] = [""] * count
    return [line.rstrip() for line in view]


def docstring_of(node: ast.AST) -> ast.Expr | None:
    """Return the docstring expression of a module, class or function; None for anything else."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if not isinstance(node, owners) or not node.body:
        return None

    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
        return first
    return None


class Section(NamedTuple):
    """The lines of a source under one banner."""

    lines: list[str]
    view: list[str]  # the same lines without comments and docstrings
    start: int  # index of the first one in its file


NO_SECTION = Section([], [], 0)


def sections(source: str) -> dict[str, Section]:
    """Return the sections of a source by banner title. Lines before the first banner are `head`."""
    lines = source.splitlines()
    view = without_comments(source)
    starts = [("head", 0)]
    for i in range(len(lines) - 1):
        title = re.match(r"# \d+\. ([^:]+)", lines[i + 1])
        if title and re.match(r"# -{20,}$", lines[i]):
            starts.append((title[1].strip(), i))

    ends = [start for _, start in starts[1:]] + [len(lines)]
    return {
        title: Section(lines[start:end], view[start:end], start) for (title, start), end in zip(starts, ends)
    }


class Change(NamedTuple):
    """Lines a_start..a_end of one side that became b_start..b_end of the other."""

    a_start: int
    a_end: int
    b_start: int
    b_end: int

    @property
    def size(self) -> int:
        """The number of lines that the change touches."""
        return max(self.a_end - self.a_start, self.b_end - self.b_start)


def changes(a: list[str], b: list[str]) -> list[Change]:
    """Return every run of lines that differs."""
    opcodes = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return [Change(*bounds) for kind, *bounds in opcodes if kind != "equal"]


def code_changes(a: list[str], b: list[str]) -> list[Change]:
    """Return the changes between two views, without the blank lines at their ends."""
    trimmed = [
        Change(*trim(a, change.a_start, change.a_end), *trim(b, change.b_start, change.b_end))
        for change in changes(a, b)
    ]
    return [change for change in trimmed if change.size > 0]


def trim(view: list[str], start: int, end: int) -> tuple[int, int]:
    """Return the range without blank lines at its ends."""
    while start < end and not view[start]:
        start += 1
    while start < end and not view[end - 1]:
        end -= 1
    return start, end


class SectionDiff(NamedTuple):
    """The difference of one section: unified lines, and the number of lines changed only in comments."""

    title: str
    lines: list[str]
    comment_only: int

    def count(self, sign: str) -> int:
        """Return the number of lines that begin with `+` or `-`."""
        return sum(line[0] == sign for line in self.lines)


def section_diff(title: str, a: Section, b: Section) -> SectionDiff:
    """Return the difference of one section of two sources, under `title`."""
    shown = code_changes(a.view, b.view)
    touched = sum(change.size for change in changes(a.lines, b.lines))
    comment_only = max(0, touched - sum(change.size for change in shown))

    out: list[str] = []
    previous: int | None = None  # where the change before ends in a
    for change in shown:
        if previous is None or change.a_start - previous > 2 * CONTEXT:
            if previous is not None:
                out += [" " + line for line in a.lines[previous : previous + CONTEXT]]
            out.append(f"@@ line {a.start + change.a_start + 1} -> {b.start + change.b_start + 1} @@")
            out += [" " + line for line in a.lines[max(0, change.a_start - CONTEXT) : change.a_start]]
        else:
            out += [" " + line for line in a.lines[previous : change.a_start]]
        out += ["-" + line for line in a.lines[change.a_start : change.a_end]]
        out += ["+" + line for line in b.lines[change.b_start : change.b_end]]
        previous = change.a_end

    if previous is not None:
        out += [" " + line for line in a.lines[previous : previous + CONTEXT]]
    return SectionDiff(title, out, comment_only)


def section_diffs(a: str, b: str) -> list[SectionDiff]:
    """Return the difference of every banner section that differs, in the order of b's sections."""
    sections_a = sections(a)
    sections_b = sections(b)
    titles = list(sections_b) + [title for title in sections_a if title not in sections_b]

    found = []
    for title in titles:
        heading = title
        if title not in sections_b:
            heading += " (removed)"
        elif title not in sections_a:
            heading += " (new section)"
        of_a = sections_a.get(title, NO_SECTION)
        found.append(section_diff(heading, of_a, sections_b.get(title, NO_SECTION)))
    return [diff for diff in found if diff.lines or diff.comment_only]


def diff_total(diffs: list[SectionDiff]) -> str:
    """Return the line that counts what differs in two sources."""
    added = sum(diff.count("+") for diff in diffs)
    removed = sum(diff.count("-") for diff in diffs)
    comment_only = sum(diff.comment_only for diff in diffs)
    return f"source: +{added} -{removed} lines, {comment_only} more differ in comments only"


def source_stat(diffs: list[SectionDiff]) -> list[str]:
    """Return the total and a line per section: lines added, lines removed, lines changed in comments only."""
    width = max((len(diff.title) for diff in diffs), default=0)
    rows = [
        f"  {diff.title:<{width}} {'+' + str(diff.count('+')):>6} {'-' + str(diff.count('-')):>6}"
        f" {diff.comment_only:>6} in comments"
        for diff in diffs
    ]
    return [diff_total(diffs), *rows]


def source_diff(diffs: list[SectionDiff]) -> list[str]:
    """Return a unified diff by banner section. Changes of comments and docstrings are counted, not shown."""
    out: list[str] = []
    for diff in diffs:
        note = f", {diff.comment_only} comment-only lines not shown" if diff.comment_only else ""
        out += [f"== {diff.title}: +{diff.count('+')} -{diff.count('-')}{note}", *diff.lines]
    return [diff_total(diffs), *out]


# ---- output --------------------------------------------------------------------------------------


def colored(lines: list[str]) -> list[str]:
    """Return the lines with ANSI colors for a terminal: removed red, added green, headings bold."""
    codes = {"-": "31", "+": "32", "@": "36", "=": "1"}
    return [f"\x1b[{codes[line[0]]}m{line}\x1b[0m" if line[:1] in codes else line for line in lines]


def show_in_pager(text: str) -> bool:
    """Show a text in $PAGER, else less or more, and return whether there was one. PAGER=cat prints it all."""
    command = os.environ.get("PAGER") or next(filter(shutil.which, ("less", "more")), "")
    if not command:
        return False

    env = {"LESS": "FRX", **os.environ}  # F: a text of one screen is printed; R: colors; X: it stays there
    before = signal.signal(signal.SIGINT, lambda number, frame: None)  # Ctrl-C is the pager's
    pager = subprocess.run(command, shell=True, input=text, text=True, env=env)
    signal.signal(signal.SIGINT, before)
    return pager.returncode not in (126, 127)  # the shell's words for a program that does not run


def html_diff(a: str, b: str, names: tuple[str, str], head: list[str]) -> str:
    """Return a page with the lines of `head` and both sources side by side under their names."""
    page = difflib.HtmlDiff(wrapcolumn=90).make_file(
        a.splitlines(), b.splitlines(), *names, context=True, numlines=4
    )
    listing = "<pre>" + escape("\n".join(head)) + "</pre>"
    return re.sub(r"(<body[^>]*>)", lambda match: match[1] + listing, page, count=1)
