"""Reads logs of the published parameter-golf scripts into the facts of this ledger's own.

Three dialects: `step:1/9 train_loss:1.0` (early, the script's source at the head), `1/9 train_loss: 1.0` with
a block of settings (second), and the second with adaptation lines such as `ttp:` (phased).
"""
from __future__ import annotations

import re
from pathlib import Path

from ledger.runlog import SEPARATOR, VERSIONS, BadInput, Run, Step, read_run_line, read_text

MAX_LINE = 1000                         # what lies beyond is never a figure
PYTHON = re.compile(r"^(import|from) \w+", re.MULTILINE)
SETTING = re.compile(r"  (\w+): (.*)")
STEP = re.compile(r"(\d+)/(\d+) (train|val)_loss: (\S+)(?: val_bpb: (\S+))?"
                  r"(?: train_time: ([\d.]+)m tok/s: (\d+))?")
SCORE = re.compile(r"(?!step:|\d+/|diagnostic|pre-quant)(.*?)\s*\bval_loss: ?(\S+) val_bpb: ?(\S+)"
                   r"(?:.*?eval_time: ?(\d+)ms)?", re.IGNORECASE)
LINES = {("final_score", "seed"): r"seed: ?(\d+)$",
         ("final_score", "bytes_raw"): r"Code size \(uncompressed\): (\d+) bytes",
         ("final_score", "bytes_wrapped"): r"Code size \(compressed\): (\d+) bytes",
         ("data", "val_tokens"): r"(?:val_loader:.*\b|val_)tokens: ?(\d+)",
         ("machine", "world_size"): r"world_size: ?(\d+)",
         ("machine", "device"): r"\|\s+\d+\s+NVIDIA (\S+(?: \S+)*)",
         ("phase_times", "eval_s"): r"total_eval_time: ?([\d.]+)s"}
LINES = {place: re.compile(pattern) for place, pattern in LINES.items()}
HESSIANS = re.compile(r"gptq:.*\bhessians?\b.*\bin ([\d.]+) ?s", re.IGNORECASE)
UNTIMED = re.compile(r"gptq\b(?!-lite).*(calibrat|hessian)", re.IGNORECASE)


def run_lines(text: str, run: Run) -> list[str]:
    """The lines of the run itself. Settings and a dumped source, full of format strings, go into `run`."""
    lines: list[str] = []
    *heads, last = re.split(rf"^{SEPARATOR}\r?$\n?", text, flags=re.MULTILINE)
    for number, section in enumerate([*heads, last]):
        rest, in_settings = [], False
        for line in section.splitlines():
            match = SETTING.fullmatch(line) if in_settings else None
            in_settings = bool(match) or line == "Hyperparameters:"
            if match:
                run.config[match[1]] = match[2]
            elif not in_settings:
                rest.append(line)
        if number < len(heads) and PYTHON.search("\n".join(rest)):
            run.source = "\n".join(rest).strip("\n")
        else:
            lines += [line[:MAX_LINE] for line in rest]
    return lines


def read_step(run: Run, match: re.Match) -> None:
    """Adds a step line of the second dialect; its clock is in tenths of minutes, a val line has none."""
    step, total, kind, loss, bpb, minutes, speed = match.groups()
    before = run.steps[-1].time_ms if run.steps else 0
    batch = int(run.config.get("train_batch_tokens", 786_432))
    run.steps.append(Step(int(step), int(total), kind, float(loss), float(bpb) if bpb else None,
                          round(60_000 * float(minutes)) if minutes else before,
                          1000 * batch / max(int(speed), 1) if speed else 0.0))


def read_line(run: Run, line: str, scores: list[tuple]) -> None:
    """Adds what one run line says to `run`, and a score line to `scores`: label, loss, bpb, eval ms."""
    if match := STEP.match(line):
        read_step(run, match)
        return
    read_run_line(run, line)
    if match := SCORE.match(line):
        scores.append(match.groups())
    times = run.facts.setdefault("phase_times", {})
    if match := HESSIANS.match(line):
        times["calibrate_s"] = str(float(times.get("calibrate_s", 0)) + float(match[1]))
    elif UNTIMED.match(line):
        times["untimed"] = line
    for (head, key), pattern in LINES.items():
        if match := pattern.match(line):
            run.facts.setdefault(head, {})[key] = match[1]
    for name, pattern in VERSIONS.items():
        if match := pattern.match(line):
            run.versions[name] = match[1]


def finish(run: Run, scores: list[tuple]) -> None:
    """Seed, steps, time and score of a log whose lines are read. BadInput says what a finished one has."""
    final, times = (run.facts.setdefault(head, {}) for head in ("final_score", "phase_times"))
    if "world_size" in run.config:
        run.facts.setdefault("machine", {}).setdefault("world_size", run.config["world_size"])
    named = re.search(r"seed_?(\d+)", run.path.stem)
    final.setdefault("seed", run.config.get("seed") or (named[1] if named else ""))
    if {"step", "train_time"} <= set(run.stopped):
        final["steps"], final["train_time"] = run.stopped["step"].split("/")[0], run.stopped["train_time"]
    elif run.steps and run.steps[-1].step == run.steps[-1].total:
        final["steps"] = str(run.steps[-1].step)
        if run.steps[-1].step_avg_ms:           # a val line of the second dialect has no clock
            final["train_time"] = str(run.steps[-1].time_ms)
    lacks = [what for what, there in (("score", scores), ("size", {"artifact", "total"} <= set(run.sizes)),
                                      ("seed", final["seed"])) if not there]
    if lacks:
        raise BadInput(f"{run.path}: no {' and no '.join(lacks)}: not finished, or of an unknown dialect")
    _, loss, bpb, _ = scores[-1]
    # A label reprinted for an old grader repeats the figures of the line that earned them.
    final["metric"] = next(label for label, *figures, _ in scores if figures == [loss, bpb])
    final.update(val_loss=loss, val_bpb=bpb)
    timed = [ms for label, *_, ms in scores if ms and label == final["metric"].removesuffix("_exact")]
    if timed:
        times.setdefault("eval_s", str(int(timed[-1]) / 1000))
    run.seed, run.number("final_score", "val_loss"), run.number("final_score", "val_bpb")


def parse(path: Path) -> Run:
    """What a log of any dialect says, as the facts of this ledger's logs. BadInput when it is not finished.

    final_score: metric, val_loss, val_bpb, seed, steps, train_time, bytes_raw, bytes_wrapped; phase_times:
    calibrate_s, untimed (the last line of a calibration, without its time), eval_s. Some may be missing.
    """
    run, scores = Run(path), []
    try:
        for line in run_lines(read_text(path), run):
            read_line(run, line, scores)
        finish(run, scores)
    except (ValueError, OverflowError) as error:
        raise BadInput(f"{path}: a figure cannot be read: {str(error)[:80]}") from None
    return run
