"""What a person looks at: loss curves, the history of a track, and the difference between two submissions."""
from __future__ import annotations

import ast
import difflib
import io
import json
import os
import re
import tokenize
from html import escape
from pathlib import Path

from ledger.runlog import BadInput, Run, parse_log, read_text, typed


def write_atomic(path: Path, data: str | bytes) -> None:
    """Writes the whole file or nothing: a temporary neighbour, then a rename. BadInput names the path."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(f"{path}: cannot write: {error.strerror}") from None


# ---- pictures ------------------------------------------------------------------------------------

def pyplot():
    """matplotlib.pyplot without a display; BadInput when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("plots need matplotlib: pip install matplotlib, or run ./run.sh once") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
                         "axes.spines.right": False, "legend.frameon": False})
    return plt


def save(plt, figure, out: Path) -> None:
    """Writes the figure as PNG, all of it or nothing."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})      # same input, same file
    plt.close(figure)
    write_atomic(out, buffer.getvalue())


def logs_of(target: Path) -> list[Path]:
    """The log itself, or those of a folder (or of its logs/), .txt or .txt.gz. BadInput if none."""
    if target.is_file():
        return [target]
    where = target / "logs" if (target / "logs").is_dir() else target
    found = [*where.glob("*.txt"), *where.glob("*.txt.gz")]
    logs = sorted(path for path in found if path.name != "requirements.txt")
    if not logs:
        raise BadInput(f"{target}: no such log, and no folder with logs/*.txt")
    return logs


def label_of(log: Path) -> str:
    """What the legend calls a run: folder and seed in a record, else the file's name."""
    folder = log.parent.parent.name
    return f"{folder} {log.stem}" if log.parent.name == "logs" and re.match(r"\d{4}-", folder) else log.stem


def plot_runs(logs: list[Path], out: Path) -> None:
    """Train loss and val bpb, each against step and against time; one colour per run, unfinished ones too."""
    runs = [parse_log(log) for log in logs]
    for run in runs:
        if not any(s.step > 0 for s in run.steps):
            raise BadInput(f"{run.path}: no step: lines yet, nothing to plot")
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex="col", sharey="row", layout="constrained")
    for index, run in enumerate(runs):
        style = {"color": f"C{index % 10}", "linewidth": 1.2, "label": label_of(run.path)}
        train = [s for s in run.steps if s.kind == "train"]
        val = [s for s in run.steps if s.kind == "val" and s.bpb is not None]
        val = val[1:] if len(val) > 2 else val          # the untrained model would flatten the rest
        for column, x in enumerate((lambda s: s.step, lambda s: s.time_ms / 1000)):
            axes[0][column].plot([x(s) for s in train], [s.loss for s in train], **style)
            axes[1][column].plot([x(s) for s in val], [s.bpb for s in val], marker=".", **style)
    axes[0][0].set_ylabel("train loss (nats per token)")
    axes[1][0].set_ylabel("val bpb (bits per byte)")
    axes[1][0].set_xlabel("step")
    axes[1][1].set_xlabel("training time (s)")
    axes[0][1].legend(fontsize=8)
    save(plt, figure, out)


def plot_history(tracks: dict[str, list[dict]], out: Path) -> None:
    """Records over time, one panel per track: {track: submissions}; the step line is the best so far."""
    plt = pyplot()
    from datetime import date
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    figure, axes = plt.subplots(len(tracks), 1, figsize=(9, 3.4 * len(tracks)), squeeze=False,
                                layout="constrained")
    for axis, (track, submissions) in zip(axes[:, 0], tracks.items()):
        rows = sorted(submissions, key=lambda sub: (sub["date"], -sub["val_bpb"], sub["name"]))
        days = [date.fromisoformat(sub["date"]) for sub in rows]
        bpb = [sub["val_bpb"] for sub in rows]
        best = [min(bpb[:i + 1]) for i in range(len(bpb))]
        spread = [sub["val_bpb_std"] or 0.0 for sub in rows]
        axis.errorbar(days, bpb, yerr=spread, fmt="o", markersize=4, capsize=2)
        axis.step(days, best, where="post", color="C0", alpha=0.5)
        for day, sub in zip(days, rows):
            axis.annotate(sub["name"], (day, sub["val_bpb"]), (5, 4), textcoords="offset points", fontsize=8)
        axis.set_title(track, loc="left")
        axis.set_ylabel("val bpb")
        axis.margins(0.15)
        locator = AutoDateLocator(minticks=1, maxticks=8)
        axis.xaxis.set_major_locator(locator)
        axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    save(plt, figure, out)


# ---- differences ---------------------------------------------------------------------------------

def load_side(target: Path) -> tuple[dict[str, object] | None, str]:
    """(resolved config or None when unknown, source) of a record folder, a log or a .py file."""
    if target.is_dir():
        config = target / "config.json"
        return json.loads(read_text(config)) if config.exists() else None, read_text(target / "train_gpt.py")
    if target.suffix == ".py":
        return None, read_text(target)
    run: Run = parse_log(target)
    return {key: typed(value) for key, value in run.config.items()}, run.source


def config_diff(a: dict | None, b: dict | None) -> list[str]:
    """Lines `key: old -> new`; a key only one side has shows as `(absent)`."""
    if a is None or b is None:
        return ["config: not compared, a bare script does not say how it was run"]
    absent = "(absent)"
    changed = [(key, a.get(key, absent), b.get(key, absent)) for key in sorted(set(a) | set(b))
               if a.get(key, absent) != b.get(key, absent)]
    return [f"config: {len(changed)} of {len(set(a) | set(b))} values differ"] + \
           [f"  {key}: {old} -> {new}" for key, old, new in changed]


def code_view(source: str) -> list[str]:
    """The source's lines with comments and docstrings blanked; unchanged when it does not parse."""
    lines = source.splitlines()
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError):
        return lines
    view = list(lines)
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start
            view[row - 1] = lines[row - 1][:column]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            own_line = lines[first.lineno - 1].lstrip().startswith(('"', "'", "r"))
            text = getattr(first.value, "value", None) if isinstance(first, ast.Expr) else None
            if own_line and isinstance(text, str):
                view[first.lineno - 1:first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return [line.rstrip() for line in view]


def sections(source: str) -> dict[str, tuple[int, int]]:
    """Banner title -> (first, last + 1) line index. Lines before the first banner belong to 'head'."""
    lines = source.splitlines()
    starts = [("head", 0)]
    for i in range(len(lines) - 1):
        if re.match(r"# -{20,}$", lines[i]) and (match := re.match(r"# \d+\. ([^:]+)", lines[i + 1])):
            starts.append((match[1].strip(), i))
    ends = [start for _, start in starts[1:]] + [len(lines)]
    return {title: (start, end) for (title, start), end in zip(starts, ends)}


def changes(a: list[str], b: list[str]) -> list[tuple[int, int, int, int]]:
    """(a_start, a_end, b_start, b_end) of every run of lines that differs."""
    codes = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return [code[1:] for code in codes if code[0] != "equal"]


def trimmed(view: list[str], start: int, end: int) -> tuple[int, int]:
    """The range without blank lines at its ends."""
    while start < end and not view[start]:
        start += 1
    while start < end and not view[end - 1]:
        end -= 1
    return start, end


def section_diff(a: tuple, b: tuple) -> tuple[list[str], int, int, int]:
    """(unified lines, added, removed, lines changed only in comments) of one section of two sources.

    Each side is (lines, the same lines as code_view gives them, index of the first in its file).
    """
    (raw_a, view_a, a0), (raw_b, view_b, b0) = a, b
    real = [trimmed(view_a, i, j) + trimmed(view_b, k, m) for i, j, k, m in changes(view_a, view_b)]
    real = [code for code in real if code[0] < code[1] or code[2] < code[3]]
    touched, shown = (sum(max(j - i, m - k) for i, j, k, m in codes)
                      for codes in (changes(raw_a, raw_b), real))
    folded = max(0, touched - shown)
    out: list[str] = []
    context, previous = 3, None
    for i, j, k, m in real:
        lead = min(context, i if previous is None else i - previous)
        if previous is None or i - previous > 2 * context:
            out += [" " + line for line in raw_a[previous:previous + context]] if previous is not None else []
            out.append(f"@@ line {a0 + i + 1} -> {b0 + k + 1} @@")
            out += [" " + line for line in raw_a[i - lead:i]]
        else:
            out += [" " + line for line in raw_a[previous:i]]
        out += ["-" + line for line in raw_a[i:j]] + ["+" + line for line in raw_b[k:m]]
        previous = j
    if previous is not None:
        out += [" " + line for line in raw_a[previous:previous + context]]
    return out, sum(line[0] == "+" for line in out), sum(line[0] == "-" for line in out), folded


def source_diff(a: str, b: str) -> list[str]:
    """Unified diff grouped by banner section, changes of comments and docstrings counted instead of shown."""
    def side(source: str) -> dict[str, tuple]:
        lines, view = source.splitlines(), code_view(source)
        return {title: (lines[i:j], view[i:j], i) for title, (i, j) in sections(source).items()}

    sections_a, sections_b, nothing = side(a), side(b), ([], [], 0)
    titles = list(sections_b) + [title for title in sections_a if title not in sections_b]
    out, added, removed, comments = [], 0, 0, 0
    for title in titles:
        before, after = sections_a.get(title, nothing), sections_b.get(title, nothing)
        lines, plus, minus, folded = section_diff(before, after)
        added, removed, comments = added + plus, removed + minus, comments + folded
        if lines or folded:
            only = " (new section)" if title not in sections_a else ""
            only = " (removed)" if title not in sections_b else only
            note = f", {folded} comment-only lines not shown" if folded else ""
            out += [f"== {title}{only}: +{plus} -{minus}{note}", *lines]
    return [f"source: +{added} -{removed} lines, {comments} more differ in comments only"] + out


def colored(lines: list[str]) -> list[str]:
    """ANSI colours for a terminal: removed red, added green, headings bold."""
    codes = {"-": "31", "+": "32", "@": "36", "=": "1"}
    return [f"\x1b[{codes[line[0]]}m{line}\x1b[0m" if line[:1] in codes else line for line in lines]


def html_diff(a: str, b: str, name_a: str, name_b: str, head: list[str]) -> str:
    """A page with the config differences and both sources side by side."""
    page = difflib.HtmlDiff(wrapcolumn=90).make_file(a.splitlines(), b.splitlines(), name_a, name_b,
                                                     context=True, numlines=4)
    listing = "<pre>" + escape("\n".join(head)) + "</pre>"
    return re.sub(r"(<body[^>]*>)", lambda match: match[1] + listing, page, count=1)
