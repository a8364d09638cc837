"""Proves the claims of a measurement of the directions. direction_tables.py makes its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ledger.files import read_text
from ledger.folders import MEASUREMENT_NAME
from ledger.make.direction_tables import FILES, TITLES, newest, result_text, tables_text, with_block
from ledger.prove.claims import Claim, Finding, Verdict, Wrong, demand, demand_same_lines, prove
from ledger.read.direction_log import Update, device_slug, names, parse
from script import BadInput


@dataclass(frozen=True)
class MeasurementCase:
    """A measurement under examination: its folder and its log, read back."""

    folder: Path
    log: dict


def prove_text(name: str, found: str, want: str) -> str:
    """Prove that two texts are equal; the evidence of a failure names the first line that is not."""
    demand_same_lines(name, found.splitlines(), want.splitlines())
    demand(found == want, f"{name}: line ends differ from those that the log gives")
    return f"{len(want.splitlines())} lines regenerated"


def claim_files(case: MeasurementCase) -> str:
    """Nothing is missing and nothing else is there; the folder is named after date and device."""
    strange = sorted(set(FILES) ^ {path.name for path in case.folder.iterdir()})
    demand(not strange, f"{', '.join(strange)}: missing, or not one of {', '.join(FILES)}")

    machine = case.log["machine"][0]
    match = MEASUREMENT_NAME.match(case.folder.name)
    named = (match[1], match[2]) if match else None
    demand(
        named == (machine["date"], device_slug(machine["note"])),
        f"the log is of {machine['date']} on {machine['note']}, the name says {case.folder.name}",
    )
    return f"{len(FILES)} files, {machine['note']}, {machine['date']}"


class Due(NamedTuple):
    """What a measurement must have a time for, or a reason why not: a part of an update, on some matrices."""

    part: str
    share: str
    update: Update

    def __str__(self) -> str:
        return f"{self.part} {self.share} {' '.join(map(str, self.update))}"


def due_times(log: dict) -> list[Due]:
    """Return all that a measurement must have a time for."""
    rows = names(log, "row")
    due = [Due(part, share, Update(row, "muon", 0)) for part, share in TITLES for row in rows]
    direction = log["config"][0]["ortho"]
    due += [Due("update", "all", Update(direction, rule, 0)) for rule in names(log, "rule")]
    due.append(Due("update", "all", Update(direction, "muon", 1)))
    return due


def claim_rows(case: MeasurementCase) -> str:
    """Every direction and rule has a figure, or a reason why not, wherever one is due."""
    log = case.log
    lines = [*log.get("time", []), *log.get("skip", [])]
    given = set()
    for line in lines:
        update = Update(line.get("row"), line.get("rule"), line.get("cautious"))
        given.add(Due(line.get("part"), line.get("share"), update))
    due = due_times(log)
    for each in due:
        demand(each in given, f"neither a time nor a reason for {each}")

    qualities = log.get("quality", [])
    inputs = {(q["family"], q["shape"]) for q in qualities}
    have = {(q["row"], q["family"], q["shape"]) for q in lines + qualities if "family" in q}
    for row in names(log, "row"):
        for family, shape in sorted(inputs, key=str):
            demand((row, family, shape) in have, f"no quality of {row} {family} {shape}")
    return f"{len(due)} cases, {len(names(log, 'row'))} directions on {len(inputs)} inputs"


def claim_figures(case: MeasurementCase) -> str:
    """Quartiles and singular values are in order, and no cosine exceeds one."""
    times = case.log.get("time", [])
    for row in times:
        demand(
            0 < row["min_ms"] <= row["q1_ms"] <= row["median_ms"] <= row["q3_ms"],
            f"{row['part']} {row['share']} {row['row']} {row['mode']}: quartiles out of order",
        )

    qualities = case.log.get("quality", [])
    for q in qualities:
        in_order = q["smin"] <= q["s05"] <= q["s50"] <= q["s95"] <= q["smax"]
        demand(
            in_order and abs(q["cosine"]) <= 1.0001,
            f"{q['row']} on {q['family']} {q['shape']}: no singular-value band, or no cosine",
        )
    return f"{len(times)} times, {len(qualities)} qualities"


def claim_result(case: MeasurementCase) -> str:
    """result.json follows from log.txt."""
    return prove_text("result.json", read_text(case.folder / "result.json"), result_text(case.log))


def claim_tables(case: MeasurementCase) -> str:
    """tables.md follows from log.txt."""
    return prove_text("tables.md", read_text(case.folder / "tables.md"), tables_text(case.log))


def claim_board(case: MeasurementCase) -> str:
    """The block of records/README.md follows from the newest logs."""
    records = case.folder.parent.parent
    if case.folder not in newest(records).values():
        return "a newer measurement of this device is shown"

    page = read_text(records / "README.md")
    try:
        return prove_text("records/README.md", page, with_block(page, records))
    except Wrong as wrong:
        raise Wrong(f"{wrong}; ./run.sh record board rewrites it") from None


CLAIMS = {
    "files": claim_files,
    "rows": claim_rows,
    "figures": claim_figures,
    "result": claim_result,
    "tables": claim_tables,
    "board": claim_board,
}


def demanding_lines(claim: Claim) -> Claim:
    """Return the claim so that a log without the lines it reads makes it fail."""

    def guarded(case: MeasurementCase) -> str:
        try:
            return claim(case)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise Wrong(f"log.txt lacks a line or a figure ({type(error).__name__}: {error})") from None

    return guarded


def examine_measurement(folder: Path) -> list[Finding]:
    """Return a finding for every claim about a measurement; a single failure when its log cannot be read."""
    try:
        log = parse(read_text(folder / "log.txt"), "log.txt")
    except BadInput as error:
        return [Finding(Verdict.FAIL, "log", str(error))]
    claims = {name: demanding_lines(claim) for name, claim in CLAIMS.items()}
    return prove(MeasurementCase(folder, log), claims)
