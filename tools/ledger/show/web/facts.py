"""What the page of the ledger is made from: records with their logs and claims, sweeps, measurements."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ledger import stats
from ledger.files import read_json, read_text, sha256_file
from ledger.folders import log_files, logs_of, measurement_folders, record_folders, sweep_folders
from ledger.make.ladder import Idea, find_ideas
from ledger.make.record_folder import NOTES
from ledger.make.sweep_table import read_runs
from ledger.prove.claims import Finding, Verdict
from ledger.read.runlog import RunLog, parse_log
from ledger.show.board import read_submission, score_of
from ledger.tracks import target_of
from progress import Progress
from script import BadInput

Examine = Callable[[Path], list[Finding]]
AUDIT_LINE = re.compile(
    r"audit (T\d+) ([^:]+): (ok|FAIL) \((.*)\) \[[\d.]+ s\]$"
)  # as tools/audit.py logs it
OF_THE_LEDGER = ("sweeps", "directions", "plans")  # folders of records/ with parts of their own, or none


@dataclass(frozen=True)
class AuditVerdict:
    """The outcome of one test of the auditor on one artifact of a record."""

    file: str
    test: str
    title: str
    result: str  # ok | FAIL
    evidence: str


@dataclass(frozen=True)
class Entry:
    """A record or non-record."""

    folder: Path
    sub: dict
    runs: list[RunLog]  # by seed
    config: dict[str, object]
    notes: str  # Markdown, as it stands below the notes line
    findings: list[Finding]  # [] if nothing was proved
    audits: list[AuditVerdict]

    @property
    def key(self) -> str:
        """The entry's name in the ledger, as `parent` in a submission.json has it."""
        return f"{self.sub['track']}/{self.folder.name}"

    @property
    def anchor(self) -> str:
        """The entry's name in the addresses of a page."""
        return anchor_of(self.key)

    @property
    def is_race(self) -> bool:
        """Whether the entry belongs to a track with a target loss."""
        return target_of(self.sub["track"]) is not None

    @property
    def is_verified(self) -> bool:
        """Whether this is a record of which every claim was examined and none failed."""
        return self.sub["record"] and bool(self.findings) and not self.failed

    @property
    def failed(self) -> list[Finding]:
        """The claims that do not hold."""
        return [finding for finding in self.findings if finding.verdict == Verdict.FAIL]


@dataclass(frozen=True)
class Sweep:
    """A sweep: its table.json, its runs and its claims."""

    folder: Path
    table: dict
    runs: list[RunLog]
    findings: list[Finding]


@dataclass(frozen=True)
class Pictures:
    """A folder of records/KIND/ that holds pictures and pages: a measurement, a timeline."""

    kind: str
    folder: Path
    page: str  # Markdown, "" if there is none
    pictures: list[Path]


@dataclass(frozen=True)
class Ledger:
    """All that the page shows."""

    root: Path
    sha256: str
    files: int
    entries: list[Entry]
    sweeps: list[Sweep]
    ideas: list[Idea]  # those trained at two budgets or more
    pictures: list[Pictures]


def anchor_of(key: str) -> str:
    """Return a name in the ledger as an HTML id."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", key)


# ---- reading -------------------------------------------------------------------------------------


def ledger_files(records: Path) -> list[Path]:
    """Return every file of records/, by path, without hidden files and compiled Python."""
    found = []
    for path in records.rglob("*"):
        parts = path.relative_to(records).parts
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in parts):
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(records).as_posix().encode())


def ledger_hash(records: Path) -> str:
    """Return the sha256 of what `sha256sum` prints for the files of records/, in the order of their paths."""
    total = hashlib.sha256()
    for path in ledger_files(records):
        total.update(f"{sha256_file(path)}  {path.relative_to(records).as_posix()}\n".encode())
    return total.hexdigest()


def read_ledger(root: Path, examine: Examine | None, progress: Progress) -> Ledger:
    """Read the ledger of a repository. Raises BadInput if it has no records or a file of it is damaged.

    examine: proves the claims of a folder; without it nothing is called verified. progress: is told how far
    it is, for proving imports the script of each record.
    """
    records = root / "records"
    folders = record_folders(records)
    sweeps = sweep_folders(records)
    if not folders and not sweeps:
        raise BadInput(f"{records}: no record and no sweep to show; ./run.sh record new makes one")

    def findings(folder: Path) -> list[Finding]:
        return [] if examine is None else examine(folder)

    progress.begin(f"site: {'reading' if examine is None else 'proving'}")
    entries = [read_entry(folder, findings(folder)) for folder in progress.each(folders, "records")]
    return Ledger(
        root=root,
        sha256=ledger_hash(records),
        files=len(ledger_files(records)),
        entries=entries,
        sweeps=[
            Sweep(folder, read_json(folder / "table.json"), read_runs(folder), findings(folder))
            for folder in progress.each(sweeps, "sweeps")
        ],
        ideas=find_ideas(records),
        pictures=[*direction_pictures(records), *other_pictures(records)],
    )


def read_entry(folder: Path, findings: list[Finding]) -> Entry:
    """Return a record folder. Raises BadInput naming a file that cannot be read."""
    runs = [parse_log(log) for log in logs_of(folder)]
    _, _, notes = read_text(folder / "README.md").partition(NOTES)
    return Entry(
        folder=folder,
        sub=read_submission(folder),
        runs=sorted(runs, key=lambda run: run.seed),
        config=read_json(folder / "config.json"),
        notes=notes.strip(),
        findings=findings,
        audits=read_audits(folder),
    )


def read_audits(folder: Path) -> list[AuditVerdict]:
    """Return the verdicts of the auditor in the files audit*.txt of a record, [] if it holds none."""
    found = []
    for path in log_files(folder):
        if path.name.startswith("audit"):
            matches = filter(None, map(AUDIT_LINE.match, read_text(path).splitlines()))
            found += [AuditVerdict(path.name, *match.groups()) for match in matches]
    return found


def direction_pictures(records: Path) -> list[Pictures]:
    """Return the measurements of the directions and step rules."""
    return [
        Pictures("directions", folder, read_text(folder / "tables.md"), sorted(folder.glob("*.png")))
        for folder in measurement_folders(records)
    ]


def other_pictures(records: Path) -> list[Pictures]:
    """Return the folders of records/KIND/ of any other kind that hold a picture, such as timelines."""
    found = []
    for folder in sorted(records.glob("[!.]*/[!.]*")):
        kind = folder.parent.name
        pictures = sorted(folder.glob("*.png"))
        if folder.is_dir() and pictures and kind not in OF_THE_LEDGER and not kind.startswith("track_"):
            page = folder / "README.md"
            found.append(Pictures(kind, folder, read_text(page) if page.is_file() else "", pictures))
    return found


# ---- comparisons ---------------------------------------------------------------------------------


def same_text(a: Entry, b: Entry) -> bool:
    """Return whether two entries of a track were scored on the same text, in the same windows.

    A text is known by its bytes, as in the ladder: two vocabularies of one text compare.
    """
    keys = ("val_bytes", "track")
    return all(a.sub[key] == b.sub[key] for key in keys) and score_of(a.sub) == score_of(b.sub)


def scores(entry: Entry) -> list[float]:
    """Return the bits per byte of an entry's seeds."""
    return [result["val_bpb"] for result in entry.sub["seed_results"].values()]


def welch_pairs(entries: list[Entry]) -> dict[str, dict[str, float]]:
    """Return Welch's test of val_bpb for every comparable pair; key "A B" holds B minus A.

    Races are decided by steps or time, not by bits per byte, and are left out.
    """
    found = {}
    scored = [entry for entry in entries if not entry.is_race]
    for a in scored:
        for b in scored:
            test = stats.welch(scores(a), scores(b)) if a is not b and same_text(a, b) else None
            if test is not None:
                low, high = test.interval()
                found[f"{a.key} {b.key}"] = {
                    "diff": round(test.diff, 6),
                    "low": round(low, 6),
                    "high": round(high, 6),
                    "p": float(f"{test.p_two_sided():.3g}"),
                }
    return found


def effect_of(row: dict, base: dict) -> dict[str, object]:
    """Return the difference of a sweep's row to the baseline with the 95 % interval of the paired test.

    The interval, of the seeds that both rows have, is None below two of them.
    """
    a = base["val_bpb_by_seed"]
    b = row["val_bpb_by_seed"]
    shared = sorted(set(a) & set(b), key=int)
    test = stats.paired([a[seed] for seed in shared], [b[seed] for seed in shared])
    low, high = (None, None) if test is None else test.interval()
    return {
        "name": row["name"],
        "seeds": len(shared),
        "diff": row["versus"]["diff"],
        "low": None if low is None else round(low, 6),
        "high": None if high is None else round(high, 6),
        "paired_p": row["versus"]["paired_p"],
        "welch_p": row["versus"]["welch_p"],
    }


def effects(table: dict) -> list[dict[str, object]]:
    """Return the differences of all rows of a sweep to its baseline, best first; [] without a baseline."""
    base = next((row for row in table["rows"] if row["name"] == table["baseline"]), None)
    if base is None:
        return []
    return [effect_of(row, base) for row in table["rows"] if row["versus"] is not None]
