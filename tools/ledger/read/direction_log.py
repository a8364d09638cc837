"""Reads the log of a measurement of the directions and step rules.

tools/lab/directions.py measures and writes log.txt. Everything else in the folder follows from that file:
direction_tables.py makes it and direction_claims.py proves it, both without torch.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from ledger.read.runlog import SEPARATOR, number_or_text
from script import BadInput

PAIR = re.compile(r"(\w+):(\S+)")


def parse(text: str, path: object = "log.txt") -> dict:
    """Return {first word of a line: [its pairs, ...]} of the lines after the separator, with derived figures.

    A note follows ' | ' and becomes the pair `note`. Raises BadInput if the log has no separator or no
    `done` line, that is, when the measurement did not end.
    """
    _, found, body = text.partition(f"\n{SEPARATOR}\n")
    lines = body.splitlines()
    if not found or not lines or not lines[-1].startswith("done "):
        raise BadInput(f"{path}: not the log of a finished measurement; measure again")

    log: dict[str, list] = {}
    for line in lines:
        head, _, note = line.partition(" | ")
        word, _, rest = head.partition(" ")
        row = {key: figure_or_text(value) for key, value in PAIR.findall(rest)}
        if note:
            row["note"] = note
        log.setdefault(word, []).append(row)
    try:
        add_derived_figures(log)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise BadInput(f"{path}: a line lacks a figure ({type(error).__name__}: {error})") from None
    return log


def figure_or_text(text: str) -> object:
    """Return a number, a list of numbers, or the text itself."""
    if "," in text:
        return [figure_or_text(part) for part in text.split(",")]
    return number_or_text(text)


def add_derived_figures(log: dict) -> None:
    """Add to every `time` its GFLOP, its TFLOP/s, and its floors by `bmm` and by `copy` in ms."""
    rates = {(b["share"], b["bank"]): b["tflops"] for b in log.get("bmm", [])}
    copy_gbps = log["copy"][0]["gbps"] if "copy" in log else math.nan
    for row in log.get("time", []):
        work = [w for w in log.get("work", []) if (w["row"], w["share"]) == (row["row"], row["share"])]
        if work and all((w["share"], w["bank"]) in rates for w in work):
            row["gflop"] = round(sum(w["gflop"] for w in work), 3)
            row["tflops"] = round(row["gflop"] / row["median_ms"], 4)
            row["bmm_ms"] = round(sum(w["gflop"] / rates[w["share"], w["bank"]] for w in work), 5)

        moved = [m for m in log.get("moved", []) if (m["part"], m["share"]) == (row["part"], row["share"])]
        if moved and copy_gbps > 0:
            row["memory_ms"] = round(moved[0]["mb"] / copy_gbps, 5)


def names(log: dict, word: str) -> list[str]:
    """Return the rows of ORTHO (`row`) or of STEP_RULES (`rule`), in their order."""
    return [line[word] for line in log.get(word, [])]


class Update(NamedTuple):
    """The subject of a time: a row of ORTHO with a row of STEP_RULES, cautious weight decay or not."""

    row: str
    rule: str
    cautious: int  # 0 or 1


def times(log: dict, part: str, share: str) -> dict[Update, dict[str, dict]]:
    """Return {update: {mode: time}} of one part and share."""
    found: dict[Update, dict[str, dict]] = {}
    for line in log.get("time", []):
        if (line["part"], line["share"]) == (part, share):
            update = Update(line["row"], line["rule"], line["cautious"])
            found.setdefault(update, {})[line["mode"]] = line
    return found


def device_slug(device: str) -> str:
    """Return a device's name inside a folder's name: NVIDIA H100 80GB HBM3 -> H100-80GB-HBM3."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", device.replace("NVIDIA", "")).strip("-") or "unknown"
