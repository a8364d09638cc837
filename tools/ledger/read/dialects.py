"""Reads logs of the published parameter-golf scripts into the facts of this ledger's own.

Three dialects: `step:1/9 train_loss:1.0` (early, the script's source at the head), `1/9 train_loss: 1.0` with
a block of settings (second), and the second with adaptation lines such as `ttp:` (phased).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from ledger.files import read_text
from ledger.read.runlog import SEPARATOR, VERSIONS, RunLog, Step, read_run_line
from script import BadInput

MAX_LINE = 1000  # no figure lies beyond this many characters
PYTHON = re.compile(r"^(import|from) \w+", re.MULTILINE)
SETTING = re.compile(r"  (\w+): (.*)")
STEP = re.compile(
    r"(\d+)/(\d+) (train|val)_loss: (\S+)(?: val_bpb: (\S+))?(?: train_time: ([\d.]+)m tok/s: (\d+))?"
)
SCORE = re.compile(
    r"(?!step:|\d+/|diagnostic|pre-quant)(.*?)\s*\bval_loss: ?(\S+) val_bpb: ?(\S+)"
    r"(?:.*?eval_time: ?(\d+)ms)?",
    re.IGNORECASE,
)
FACTS = {  # (first word of this ledger's own line, key): where the dialects print it
    ("final_score", "seed"): re.compile(r"seed: ?(\d+)$"),
    ("final_score", "bytes_raw"): re.compile(r"Code size \(uncompressed\): (\d+) bytes"),
    ("final_score", "bytes_wrapped"): re.compile(r"Code size \(compressed\): (\d+) bytes"),
    ("data", "val_tokens"): re.compile(r"(?:val_loader:.*\b|val_)tokens: ?(\d+)"),
    ("machine", "world_size"): re.compile(r"world_size: ?(\d+)"),
    ("machine", "device"): re.compile(r"\|\s+\d+\s+NVIDIA (\S+(?: \S+)*)"),
    ("phase_times", "eval_s"): re.compile(r"total_eval_time: ?([\d.]+)s"),
}
HESSIANS = re.compile(r"gptq:.*\bhessians?\b.*\bin ([\d.]+) ?s", re.IGNORECASE)
UNTIMED = re.compile(r"gptq\b(?!-lite).*(calibrat|hessian)", re.IGNORECASE)
DEFAULT_BATCH = 786_432  # tokens a step where the settings do not say
SEED_IN_NAME = re.compile(r"seed_?(\d+)")


class Score(NamedTuple):
    """One score line, as text. eval_ms is None when the line has no time."""

    label: str
    loss: str
    bpb: str
    eval_ms: str | None


def parse_published_log(path: Path) -> RunLog:
    """Return the content of a log of any dialect, as the facts of this ledger's logs.

    final_score: metric, val_loss, val_bpb, seed, steps, train_time, bytes_raw, bytes_wrapped; phase_times:
    calibrate_s, untimed (the last line of a calibration without its time), eval_s. Some may be missing.
    Raises BadInput if the run is not finished.
    """
    run = RunLog(path)
    scores: list[Score] = []
    try:
        for line in run_lines(read_text(path), run):
            read_line(run, line, scores)
        finish(run, scores)
    except (ValueError, OverflowError) as error:
        raise BadInput(f"{path}: a figure cannot be read: {str(error)[:80]}") from None
    return run


def run_lines(text: str, run: RunLog) -> list[str]:
    """Return the lines of the run itself. Settings and a dumped source go to `run`.

    The source is full of format strings, which must not be read as results.
    """
    lines: list[str] = []
    *heads, last = re.split(rf"^{SEPARATOR}\r?$\n?", text, flags=re.MULTILINE)
    for section in heads:
        rest = without_settings(section, run)
        if PYTHON.search("\n".join(rest)):
            run.source = "\n".join(rest).strip("\n")
        else:
            lines += rest
    lines += without_settings(last, run)
    return [line[:MAX_LINE] for line in lines]


def without_settings(section: str, run: RunLog) -> list[str]:
    """Return the lines of a section. Those of a block of settings go to the config of `run` instead."""
    rest = []
    in_settings = False
    for line in section.splitlines():
        match = SETTING.fullmatch(line) if in_settings else None
        in_settings = bool(match) or line == "Hyperparameters:"
        if match:
            run.config[match[1]] = match[2]
        elif not in_settings:
            rest.append(line)
    return rest


def read_line(run: RunLog, line: str, scores: list[Score]) -> None:
    """Add the content of one run line to `run`, and a score line to `scores`."""
    if match := STEP.match(line):
        read_step(run, match)
        return

    read_run_line(run, line)
    if match := SCORE.match(line):
        scores.append(Score(*match.groups()))

    times = run.facts.setdefault("phase_times", {})
    if match := HESSIANS.match(line):
        times["calibrate_s"] = str(float(times.get("calibrate_s", 0)) + float(match[1]))
    elif UNTIMED.match(line):
        times["untimed"] = line

    for (head, key), pattern in FACTS.items():
        if match := pattern.match(line):
            run.facts.setdefault(head, {})[key] = match[1]
    for name, pattern in VERSIONS.items():
        if match := pattern.match(line):
            run.versions[name] = match[1]


def read_step(run: RunLog, match: re.Match) -> None:
    """Add a step line of the second dialect. Its clock is in tenths of minutes; a val line has no clock."""
    step, total, kind, loss, bpb, minutes, speed = match.groups()
    before_ms = run.steps[-1].time_ms if run.steps else 0
    batch = int(run.config.get("train_batch_tokens", DEFAULT_BATCH))
    run.steps.append(
        Step(
            step=int(step),
            total=int(total),
            kind=kind,
            loss=float(loss),
            bpb=float(bpb) if bpb else None,
            time_ms=round(60_000 * float(minutes)) if minutes else before_ms,
            step_avg_ms=1000 * batch / max(int(speed), 1) if speed else 0.0,
        )
    )


def finish(run: RunLog, scores: list[Score]) -> None:
    """Add seed, steps, time and score to a run whose lines are read.

    Raises BadInput naming what a finished log has and this one lacks.
    """
    final = run.facts.setdefault("final_score", {})
    if "world_size" in run.config:
        run.facts.setdefault("machine", {}).setdefault("world_size", run.config["world_size"])
    named = SEED_IN_NAME.search(run.path.stem)
    final.setdefault("seed", run.config.get("seed") or (named[1] if named else ""))
    add_steps(run, final)

    lacks = []
    if not scores:
        lacks.append("score")
    if not {"artifact", "total"} <= set(run.sizes):
        lacks.append("size")
    if not final["seed"]:
        lacks.append("seed")
    if lacks:
        raise BadInput(f"{run.path}: no {' and no '.join(lacks)}: not finished, or in an unknown dialect")

    add_score(run, scores)
    run.count("final_score", "seed")
    run.number("final_score", "val_loss")
    run.number("final_score", "val_bpb")


def add_steps(run: RunLog, final: dict[str, str]) -> None:
    """Add steps and train_time to `final`, from stopping_early or else from the last step line."""
    if {"step", "train_time"} <= set(run.stopped):
        final["steps"] = run.stopped["step"].split("/")[0]
        final["train_time"] = run.stopped["train_time"]
    elif run.steps and run.steps[-1].step == run.steps[-1].total:
        final["steps"] = str(run.steps[-1].step)
        if run.steps[-1].step_avg_ms:  # a val line of the second dialect has no clock
            final["train_time"] = str(run.steps[-1].time_ms)


def add_score(run: RunLog, scores: list[Score]) -> None:
    """Add the last score to final_score, under the label of the first line that has its figures.

    A label reprinted for an old grader repeats the figures of the line that earned them.
    """
    final = run.facts["final_score"]
    last = scores[-1]
    final["metric"] = next(
        score.label for score in scores if (score.loss, score.bpb) == (last.loss, last.bpb)
    )
    final["val_loss"] = last.loss
    final["val_bpb"] = last.bpb

    label = final["metric"].removesuffix("_exact")
    timed = [score.eval_ms for score in scores if score.eval_ms and score.label == label]
    if timed:
        times = run.facts.setdefault("phase_times", {})
        times.setdefault("eval_s", str(int(timed[-1]) / 1000))
