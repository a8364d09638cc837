"""Rewrites the tables of README.md and records/README.md, and the picture of records over time."""

from __future__ import annotations

from pathlib import Path

from ledger.files import read_json, read_text, write_atomic
from ledger.folders import is_date, record_folders, sweep_folders
from ledger.make import direction_tables, markdown, pictures, sweep_table
from ledger.read.schema import schema_errors, submission_schema
from ledger.tracks import TRACKS, target_of
from script import BadInput

BOARD = markdown.block("board")
SWEEPS = markdown.block("sweeps")
HEAD = ["#", "val_bpb", "std", "score", "val_loss", "seeds", "bytes", "what", "date", "by"]
ALIGN = "rrrlrrrlll"
RACE_HEAD = ["#", "steps", "time s", "std", "val_loss", "std", "runs", "p", "margin", "what", "date", "by"]
RACE_ALIGN = "rrrrrrrrrlll"
BEST = 10  # records of a track on the front page
LOSS_NOTE = (  # below the tables of scores
    "val_loss is in nats per token, so it compares runs of one vocabulary only: "
    "a token of a larger vocabulary\nstands for more text."
)


def read_submission(folder: Path) -> dict:
    """Return the submission.json of a record folder. Raises BadInput if it breaks the schema."""
    path = folder / "submission.json"
    sub = read_json(path)
    errors = schema_errors(sub, submission_schema(folder.parent.name))
    if not errors and not is_date(sub["date"]):
        errors = [f"date: {sub['date']} is not a day of this century"]
    if errors:
        raise BadInput(f"{path}: {errors[0]}; ./run.sh record verify {folder.name} says more")
    return sub


def score_of(sub: dict) -> str:
    """Return how the text was scored: sliding, ttt or chunked, the last word of the metric."""
    return sub["metric"].rpartition("_")[2]


def best_first(subs: list[dict]) -> list[dict]:
    """Return the submissions by bpb, races by what their track has least; of equal ones the oldest is first.

    Those that were only scored in disjoint windows come last: the same artifact has a higher bpb there.
    """

    def key(sub: dict) -> tuple:
        if "target" in sub:
            return race_figure(sub), sub["date"], sub["name"]
        return score_of(sub) == "chunked", sub["val_bpb"], sub["date"], sub["name"]

    return sorted(subs, key=key)


def board_table(subs: list[dict], link: str) -> list[str]:
    """Return the table of these submissions, in order; `link` is the path from the page to records/."""
    races = "target" in subs[0]
    cells = race_cells if races else score_cells
    rows = [[str(rank), *cells(sub), *idea_cells(sub, link)] for rank, sub in enumerate(subs, 1)]
    if races:
        return markdown.table(RACE_HEAD, rows, RACE_ALIGN)
    return markdown.table(HEAD, rows, ALIGN)


def idea_cells(sub: dict, link: str) -> list[str]:
    """Return the cells of one submission that say what it is, when it was made and by whom."""
    folder = f"{link}{sub['track']}/{sub['date']}_{sub['name']}"
    what = f"[{sub['name']}]({folder}/)"
    if sub["blurb"]:
        what += f": {markdown.cell(sub['blurb'])}"
    return [what, sub["date"], markdown.cell(sub["author"])]


def score_cells(sub: dict) -> list[str]:
    """Return the cells of the scores of one submission."""
    return [
        f"{sub['val_bpb']:.4f}",
        "-" if sub["val_bpb_std"] is None else f"{sub['val_bpb_std']:.5f}",
        score_of(sub),
        f"{sub['val_loss']:.4f}",
        str(len(sub["seeds"])),
        f"{sub['bytes_total']:,}",
    ]


def race_cells(sub: dict) -> list[str]:
    """Return the cells of the figures of one race."""
    time_std = sub["train_time_ms_std"]
    return [
        f"{sub['steps']:,}",
        f"{sub['train_time_ms'] / 1000:.2f}",
        "-" if time_std is None else f"{time_std / 1000:.2f}",
        f"{sub['val_loss']:.5f}",
        "-" if sub["val_loss_std"] is None else f"{sub['val_loss_std']:.5f}",
        str(len(sub["seeds"])),
        "-" if sub["p_value"] is None else f"{sub['p_value']:.2g}",
        f"{sub['margin']:+.5f}",
    ]


def race_figure(sub: dict) -> float:
    """Return what the track of a race has least: steps, or seconds of training."""
    return sub["steps"] if TRACKS[sub["track"]].target.minimizes == "steps" else sub["train_time_ms"] / 1000


def front_page_text(subs: list[dict]) -> str:
    """Return the board of README.md: the best records of every track."""
    lines: list[str] = []
    for track, records in records_by_track(subs).items():
        lines += [heading(track), "", *board_table(best_first(records)[:BEST], "records/"), ""]

    if any(sub["record"] and has_score(sub) for sub in subs):
        lines += [LOSS_NOTE, ""]
    return "\n".join(lines or ["No records yet.", ""])


def ledger_page_text(subs: list[dict]) -> str:
    """Return the board of records/README.md: all records and non-records of every track."""
    lines: list[str] = []
    for track in TRACKS:
        records = [sub for sub in subs if sub["track"] == track and sub["record"]]
        others = [sub for sub in subs if sub["track"] == track and not sub["record"]]
        if records or others:
            lines += [heading(track), ""]
        if records:
            lines += [*board_table(best_first(records), ""), ""]
        if others:
            lines += ["Non-records:", "", *board_table(best_first(others), ""), ""]

    if any(has_score(sub) for sub in subs):
        lines += [LOSS_NOTE, ""]
    if any(sub["record"] and has_score(sub) for sub in subs):
        lines += ["![records over time](history.png)", ""]
    return "\n".join(lines or ["No records yet.", ""])


def has_score(sub: dict) -> bool:
    """Return whether a submission is judged by its bpb, which races are not."""
    return not target_of(sub["track"])


def heading(track: str) -> str:
    """Return the heading of a track's tables."""
    return f"**{track}** ({TRACKS[track].title})"


def records_by_track(subs: list[dict]) -> dict[str, list[dict]]:
    """Return the records of every track that has some."""
    records = {track: [sub for sub in subs if sub["track"] == track and sub["record"]] for track in TRACKS}
    return {track: found for track, found in records.items() if found}


def rewrite_board(root: Path) -> int:
    """Rewrite both pages and the history picture. All pages are read before one is written."""
    records = root / "records"
    front_page = root / "README.md"
    ledger_page = records / "README.md"
    subs = [read_submission(folder) for folder in record_folders(records)]
    sweeps = sweep_folders(records)

    front = BOARD.replaced(read_text(front_page), front_page_text(subs), front_page)
    ledger = BOARD.replaced(read_text(ledger_page), ledger_page_text(subs), ledger_page)
    ledger = direction_tables.with_block(ledger, records)
    if sweeps or SWEEPS.begins_in(ledger):
        ledger = SWEEPS.replaced(ledger, sweep_table.board(records), ledger_page)

    by_track = records_by_track(subs)
    histories = {track: found for track, found in by_track.items() if not target_of(track)}
    if histories:
        pictures.plot_history(histories, records / "history.png")
    write_atomic(front_page, front)
    write_atomic(ledger_page, ledger)

    count = sum(len(found) for found in by_track.values())
    print(
        f"{len(subs)} folders, {count} records, {len(sweeps)} sweeps: README.md and "
        "records/README.md rewritten"
    )
    return 0
