"""Writes the whole ledger as one page of HTML that needs no network: `./run.sh record site --out DIR`.

The same ledger gives the same bytes: the page names the ledger by its hash, and no hour.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ledger import stats
from ledger.files import write_atomic
from ledger.make import ladder
from ledger.make.record_folder import fact_table, form_of
from ledger.make.seed_table import seed_table
from ledger.make.sweep_table import mean_curve, row_of, runs_at_best_rate, summary, table_lines
from ledger.show import board, diff
from ledger.show.web import library, prose
from ledger.show.web.curves import mean_columns, run_curves
from ledger.show.web.facts import (
    Entry,
    Examine,
    Ledger,
    Pictures,
    Sweep,
    anchor_of,
    effects,
    read_ledger,
    scores,
    welch_pairs,
)
from ledger.tracks import TRACKS
from progress import Progress
from script import BadInput

PAGE = "index.html"
KINDS = {"directions": "Directions and step rules", "timelines": "Timelines of a step"}  # headings


def write_site(root: Path, out: Path, examine: Examine | None, progress: Progress) -> Path:
    """Write the page of a repository's ledger into the folder `out`, and return its path.

    examine: proves the claims of a folder, or None to prove nothing. progress: is told how far it is.
    Raises BadInput if a package is missing or the ledger cannot be read; then nothing is written.
    """
    library.require_packages()
    library.plotly_file()
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out}: is a file; name a folder, in which {PAGE} is written")

    ledger = read_ledger(root, examine, progress)
    page = render(ledger, progress, proved=examine is not None)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot make this folder: {error.strerror}") from None
    write_atomic(out / PAGE, page)
    return out / PAGE


def render(ledger: Ledger, progress: Progress, proved: bool) -> str:
    """Return the page."""
    from markupsafe import Markup

    progress.begin("site: comparing every script with its parent's")
    diffs = source_diffs(progress.each(ledger.entries, "records"), ledger)
    progress.begin("site: filling the page")
    return library.fill(
        "site.html",
        styles=Markup(library.asset("page.css")),
        theme=Markup(library.asset("theme.js")),
        programs=Markup(library.asset("charts.js") + library.asset("site.js")),
        payload=Markup(library.json_for_script(payload(ledger))),
        plotly=Markup(library.packed(library.plotly_file().read_text(encoding="utf-8"))),
        diffs=Markup(library.packed(library.json_for_script(diffs))),
        ledger=ledger,
        proved=proved,
        newest=max((entry.sub["date"] for entry in ledger.entries), default="-"),
        plotly_version=library.plotly_version(),
        tracks=track_views(ledger),
        entries=[entry_view(entry, ledger) for track in TRACKS for entry in in_board_order(ledger, track)],
        sweeps=[sweep_view(sweep) for sweep in ledger.sweeps],
        ladder=[line for line in ladder.lines_of(ledger.ideas) if ledger.ideas and line[:1] != "!"],
        kinds=kind_views(ledger.pictures),
        markdown=lambda text: Markup(prose.html_of(text)),
    )


# ---- tracks --------------------------------------------------------------------------------------


def entries_of(ledger: Ledger, track: str, record: bool) -> list[Entry]:
    """Return the records of a track, or its non-records, best first."""
    found = {
        entry.folder.name: entry
        for entry in ledger.entries
        if entry.sub["track"] == track and entry.sub["record"] is record
    }
    subs = board.best_first([entry.sub for entry in found.values()])
    return [found[f"{sub['date']}_{sub['name']}"] for sub in subs]


def in_board_order(ledger: Ledger, track: str) -> list[Entry]:
    """Return the records and then the non-records of a track, each best first."""
    return [*entries_of(ledger, track, True), *entries_of(ledger, track, False)]


def track_views(ledger: Ledger) -> list[dict]:
    """Return what the page says of every track that has entries."""
    views = []
    for track, limits in TRACKS.items():
        boards = [
            board_view("Records", entries_of(ledger, track, True)),
            board_view("Non-records", entries_of(ledger, track, False)),
        ]
        if any(view["rows"] for view in boards):
            views.append({"name": track, "title": limits.title, "boards": [v for v in boards if v["rows"]]})
    return views


def board_view(title: str, entries: list[Entry]) -> dict:
    """Return a board's head, alignment and rows; the cells are those of records/README.md."""
    races = bool(entries) and entries[0].is_race
    head = board.RACE_HEAD if races else board.HEAD
    align = board.RACE_ALIGN if races else board.ALIGN
    what = head.index("what")
    cells = board.race_cells if races else board.score_cells
    return {
        "title": title,
        "head": list(zip(head[1:what], align[1:what])),
        "rows": [(rank, cells(entry.sub), entry) for rank, entry in enumerate(entries, 1)],
    }


def history(ledger: Ledger, track: str) -> dict:
    """Return the results of a track in the order of their dates, with the figure that decides there."""
    target = TRACKS[track].target
    if target is None:
        unit = "bits per byte"
    else:
        unit = "steps" if target.minimizes == "steps" else "training time (s)"
    rows = []
    for entry in in_board_order(ledger, track):
        sub = entry.sub
        value = board.race_figure(sub) if entry.is_race else sub["val_bpb"]
        rows.append(
            {
                "key": entry.key,
                "anchor": entry.anchor,
                "name": sub["name"],
                "date": sub["date"],
                "value": value,
                "std": None if entry.is_race else sub["val_bpb_std"],
                "record": sub["record"],
                "score": "race" if entry.is_race else board.score_of(sub),
            }
        )
    return {
        "track": track,
        "unit": unit,
        "rows": sorted(rows, key=lambda row: (row["date"], -row["value"], row["name"])),
    }


# ---- entries -------------------------------------------------------------------------------------


def parent_of(entry: Entry, ledger: Ledger) -> Entry | None:
    """Return the entry that this one names as its parent, if the ledger has it."""
    return next((other for other in ledger.entries if other.key == entry.sub["parent"]), None)


def source_key(parent: Entry, entry: Entry) -> str:
    """Return the name of a source diff: entries of one script share it."""
    return f"{parent.sub['train_gpt_sha256'][:16]}-{entry.sub['train_gpt_sha256'][:16]}"


@cache
def cached_section_diffs(a: str, b: str) -> list[diff.SectionDiff]:
    """Return the difference of two sources by section; the same two are compared once."""
    return diff.section_diffs(a, b)


def source_changes(parent: Entry, entry: Entry) -> list[diff.SectionDiff]:
    """Return the source diff of an entry to its parent, by section."""
    return cached_section_diffs(parent.runs[0].source, entry.runs[0].source)


def source_diffs(entries: Iterable[Entry], ledger: Ledger) -> dict[str, list[list[str]]]:
    """Return the lines of every source diff to a parent by section, without empty ones."""
    found = {}
    for entry in entries:
        parent = parent_of(entry, ledger)
        sections = [] if parent is None else source_changes(parent, entry)
        if sections:
            found[source_key(parent, entry)] = [section.lines for section in sections]
    return found


class ChangedSetting(NamedTuple):
    """A knob with its value in a parent and in its child."""

    knob: str
    before: object
    after: object


def setting_changes(parent: Entry, entry: Entry) -> list[ChangedSetting]:
    """Return the settings that both entries have with another value."""
    shared = sorted(set(parent.config) & set(entry.config))
    return [
        ChangedSetting(key, parent.config[key], entry.config[key])
        for key in shared
        if parent.config[key] != entry.config[key]
    ]


def change_view(parent: Entry, entry: Entry) -> dict:
    """Return what changed since the parent: settings, then source by section."""
    sections = source_changes(parent, entry)
    return {
        "parent": parent,
        "settings": setting_changes(parent, entry),
        "younger": sorted(set(entry.config) ^ set(parent.config)),
        "key": source_key(parent, entry),
        "total": diff.diff_total(sections),
        "sections": sections,
    }


class Mark(NamedTuple):
    """The words beside an entry's name, and their class in page.css."""

    text: str
    style: str


def mark_of(entry: Entry) -> Mark:
    """Return the mark of an entry: only a record whose claims were proved is called verified."""
    if entry.failed:
        return Mark(f"{len(entry.failed)} claims fail", "bad")
    if entry.is_verified:
        return Mark("verified record", "good")
    return Mark("record, not verified here" if entry.sub["record"] else "non-record", "plain")


def entry_view(entry: Entry, ledger: Ledger) -> dict:
    """Return what the page says of an entry."""
    sub = entry.sub
    form = form_of(sub["track"])
    parent = parent_of(entry, ledger)
    return {
        "entry": entry,
        "figure": f"{sub['val_loss']:.4f}" if entry.is_race else f"{sub['val_bpb']:.4f}",
        "unit": "nats per token" if entry.is_race else "bits per byte",
        "mark": mark_of(entry),
        "headline": form.headline(entry.runs, sub),
        "facts": "\n".join(fact_table(sub)),
        "seeds": "\n".join(seed_table(form.columns(entry.runs, sub), entry.runs, sub)),
        "legend": " ".join(form.legend(entry.runs)),
        "change": None if parent is None else change_view(parent, entry),
    }


def entry_payload(entry: Entry) -> dict:
    """Return the curves, figures and settings of an entry, for charts and comparisons."""
    results = entry.sub["seed_results"].values()
    return {
        "name": entry.sub["name"],
        "track": entry.sub["track"],
        "date": entry.sub["date"],
        "anchor": entry.anchor,
        "record": entry.sub["record"],
        "text": entry.sub["val_bytes"],
        "vocabulary": entry.sub["tokenizer_sha256"],
        "score": "race" if entry.is_race else board.score_of(entry.sub),
        "figures": {
            "val_bpb": stats.mean(scores(entry)),
            "std": stats.std(scores(entry)),
            "val_loss": entry.sub["val_loss"],
            "seeds": len(entry.runs),
            "steps": stats.mean([result["steps"] for result in results]),
            "step_ms": stats.mean([result["step_avg_ms"] for result in results]),
            "bytes": entry.sub.get("bytes_total"),
        },
        "config": entry.config,
        "runs": [{"name": f"seed {run.seed}", **run_curves(run)} for run in entry.runs],
    }


# ---- sweeps and pictures -------------------------------------------------------------------------


def sweep_view(sweep: Sweep) -> dict:
    """Return what the page says of a sweep."""
    return {
        "name": sweep.folder.name,
        "anchor": anchor_of(f"sweep-{sweep.folder.name}"),
        "summary": summary(sweep.table),
        "baseline": sweep.table["baseline"],
        "effects": effects(sweep.table),
        "tables": "\n".join(table_lines(sweep.table)[2:]),
        "findings": sweep.findings,
        "failed": [finding for finding in sweep.findings if finding.verdict == "fail"],
    }


def sweep_payload(sweep: Sweep) -> dict:
    """Return the effects and mean curves of a sweep, a curve per row at its best rate."""
    runs = []
    for row in sweep.table["rows"]:
        of_row = [run for run in sweep.runs if row_of(run) == row["name"]]
        columns = mean_columns(mean_curve(runs_at_best_rate(of_row)))
        runs.append({"name": row["name"], "val": columns})
    return {"baseline": sweep.table["baseline"], "effects": effects(sweep.table), "runs": runs}


def idea_payload(idea: ladder.Idea) -> dict:
    """Return the effects of an idea by budget, in bits per byte."""
    effects = idea.effects.values()
    return {
        "name": idea.name,
        "budget": [effect.budget for effect in effects],
        "mean": [effect.mean for effect in effects],
        "reach": [effect.reach for effect in effects],
        "seeds": [len(effect.gaps) for effect in effects],
    }


def kind_views(folders: list[Pictures]) -> list[dict]:
    """Return the folders with pictures by kind, in the order of the kinds' names."""
    views = []
    for kind in sorted({pictures.kind for pictures in folders}):
        views.append(
            {
                "anchor": anchor_of(f"kind-{kind}"),
                "heading": KINDS.get(kind, kind.replace("_", " ").capitalize()),
                "folders": [picture_view(pictures) for pictures in folders if pictures.kind == kind],
            }
        )
    return views


def picture_view(pictures: Pictures) -> dict:
    """Return what the page shows of one folder with pictures."""
    return {
        "name": pictures.folder.name,
        "page": re.sub(r"\A# .*\n", "", pictures.page),
        "pictures": [
            (path.stem.replace("_", " "), prose.picture_address(path)) for path in pictures.pictures
        ],
    }


def payload(ledger: Ledger) -> dict:
    """Return all that the programs of the page read, except source diffs."""
    tracks = [track for track in TRACKS if any(entry.sub["track"] == track for entry in ledger.entries)]
    return {
        "histories": [history(ledger, track) for track in tracks],
        "entries": {
            entry.key: entry_payload(entry) for track in tracks for entry in in_board_order(ledger, track)
        },
        "pairs": welch_pairs(ledger.entries),
        "ideas": [idea_payload(idea) for idea in ledger.ideas],
        "sweeps": {sweep.folder.name: sweep_payload(sweep) for sweep in ledger.sweeps},
    }
