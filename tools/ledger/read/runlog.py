"""Reads one training log of train_gpt.py.

A log is: the script's source, a line of 100 `=`, versions and hardware, a line of 100 `=`, the resolved
config, run lines, and last, once, `final_score`. The source holds every format string too, so nothing before
the second separator is read as a result.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ledger.files import read_text, sha256
from script import BadInput

SEPARATOR = "=" * 100

STEP = re.compile(
    r"step:(\d+)/(\d+) (train|val)_loss:(\S+)(?: val_bpb:(\S+))? train_time:(\d+)ms step_avg:([\d.]+)ms$"
)
SIZES = {
    "artifact": re.compile(r"Serialized model \S+: (\d{1,18}) bytes"),
    "code": re.compile(r"Code size: (\d{1,18}) bytes"),
    "total": re.compile(r"Total submission size \S+: (\d{1,18}) bytes"),
    "peak": re.compile(r"peak memory allocated: (\d{1,18}) MiB"),
}
VERSIONS = {
    "python": re.compile(r"Running Python (\S+)"),
    "torch": re.compile(r"Running PyTorch (\S+)"),
    "cuda": re.compile(r"Running PyTorch \S+ compiled for CUDA (\S+)"),
    "triton": re.compile(r"Running Triton version (\S+)"),
}
PAIR = re.compile(r"(\w+):(.*?)(?=\s\w+:|$)")
RESUMED = re.compile(r"resumed step:(\d{1,18}) ")
SOURCE_HASH = re.compile(r"train_gpt\.py sha256:([0-9a-f]{64})\n")
FACT_LINES = ("machine", "data", "compute", "phase_times")  # first words; holds_facts knows the others


@dataclass(frozen=True)
class Step:
    """One `step:` line. Time is training time on the clock in ms; bpb is None on train_loss lines."""

    step: int
    total: int
    kind: str  # train | val
    loss: float  # nats per token
    bpb: float | None
    time_ms: int
    step_avg_ms: float


@dataclass
class RunLog:
    """The content of one log. Mappings hold its text; `number` reads a figure out of them."""

    path: Path
    source: str = ""
    versions: dict[str, str] = field(default_factory=dict)  # python, torch, cuda, triton
    config: dict[str, str] = field(default_factory=dict)
    preset: str = ""
    facts: dict[str, dict[str, str]] = field(default_factory=dict)  # first word of a line -> its pairs
    steps: list[Step] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)  # step: lines of another form
    reports: dict[str, dict[str, str]] = field(default_factory=dict)  # split -> pairs
    sizes: dict[str, int] = field(default_factory=dict)  # artifact, code, total (bytes), peak (MiB)
    stopped: dict[str, str] = field(default_factory=dict)  # the stopping_early line
    resumed: list[str] = field(default_factory=list)  # `resumed step:N` lines: continued after a kill
    over_cap: bool = False
    final_scores: int = 0
    late: str = ""  # the line that reports a compilation while the clock ran
    trailing: str = ""  # the first line after final_score, if there is one

    def has(self, line: str, key: str) -> bool:
        """Return whether the log has a line starting with `line` that holds `key:`."""
        return key in self.facts.get(line, {})

    def text(self, line: str, key: str) -> str:
        """Return the value of `key` in the line starting with `line`. Raises BadInput if it is absent."""
        if not self.has(line, key):
            raise BadInput(
                f"{self.path}: no '{line}' line with {key}: (the run did not finish, or "
                "another script wrote it); give finished logs"
            )
        return self.facts[line][key]

    def number(self, line: str, key: str) -> float:
        """Return a finite figure (a trailing `ms` is dropped). Raises BadInput naming file, line and key."""
        value = self.text(line, key)
        try:
            figure = float(value.removesuffix("ms"))
        except ValueError:
            raise BadInput(f"{self.path}: {line} {key}:{value[:40]} is not a number") from None

        if not math.isfinite(figure):
            raise BadInput(f"{self.path}: {line} {key}:{value[:40]} is not finite: the run diverged")
        return figure

    def count(self, line: str, key: str) -> int:
        """Return a whole, non-negative figure (bytes, steps, ms)."""
        figure = self.number(line, key)
        if figure != int(figure) or figure < 0:
            raise BadInput(f"{self.path}: {line} {key}:{self.text(line, key)} is not a whole number")
        return int(figure)

    def size(self, key: str) -> int:
        """Return the bytes (MiB for `peak`) of a size line. Raises BadInput if the log lacks it."""
        if key not in self.sizes:
            raise BadInput(f"{self.path}: no line gives the {key} size: the run did not finish")
        return self.sizes[key]

    @property
    def seed(self) -> int:
        """The seed that final_score names."""
        return self.count("final_score", "seed")

    @property
    def hardware(self) -> str:
        """Processes and device, such as `8 x NVIDIA H100 80GB HBM3`."""
        return f"{self.text('machine', 'world_size')} x {self.text('machine', 'device')}"

    @property
    def weights_format(self) -> str:
        """The format of the shipped weights, such as `int6`: it prefixes the roundtrip lines."""
        for key in self.facts:
            if key.endswith("_roundtrip_exact"):
                return key.split("_")[1]
        return "int6"


def pairs(line: str) -> dict[str, str]:
    """Return the pairs of a line: `a:1 device:NVIDIA H100` -> {a: 1, device: NVIDIA H100}."""
    return {key: value.strip() for key, value in PAIR.findall(line)}


def config_value(text: str) -> object:
    """Return a config value as JSON would hold it: bool, None, int, float, else the text itself."""
    plain = {"True": True, "False": False, "None": None}
    return plain[text] if text in plain else number_or_text(text)


def number_or_text(text: str) -> int | float | str:
    """Return the text as an int, else as a float, else as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


# ---- the parts of a log --------------------------------------------------------------------------


class LogParts(NamedTuple):
    """The parts of a log: the source, ending in exactly one newline, and the lines of the two others."""

    source: str
    environment: list[str]
    run: list[str]


def split_log(path: Path) -> LogParts:
    """Return the parts of a log.

    Raises BadInput if the file is not a training log.
    """
    parts = re.split(rf"^{SEPARATOR}\r?$\n?", read_text(path), maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or not parts[1].startswith("Running Python"):
        raise BadInput(
            f"{path}: not a training log: it needs two lines of 100 '=', the first one followed "
            "by 'Running Python'; pass the file train_gpt.py wrote"
        )

    source, environment, run = parts
    return LogParts(source.rstrip("\n") + "\n", environment.splitlines(), run.splitlines())


def named_source(path: Path, head: str) -> str:
    """Return the source of a log from its head, which holds the source or, in a sweep, only its hash.

    With a hash, the source is the train_gpt.py of the log's folder. Raises BadInput if that file is
    missing or has another hash.
    """
    match = SOURCE_HASH.fullmatch(head)
    if match is None:
        return head

    script = path.parent.parent / "train_gpt.py"
    source = read_text(script)
    if sha256(source) != match[1]:
        raise BadInput(
            f"{path}: was written by a train_gpt.py of sha256 {match[1][:16]}, {script} "
            f"has {sha256(source)[:16]}"
        )
    return source


def parse_log(path: Path) -> RunLog:
    """Return the content of a log, finished or not. Unknown lines are ignored.

    Raises BadInput if the file is not a log.
    """
    parts = split_log(path)
    run = RunLog(path, named_source(path, parts.source))
    for name, pattern in VERSIONS.items():
        found = [match[1] for match in map(pattern.match, parts.environment) if match]
        run.versions[name] = found[0] if found else "none"

    in_config = False
    for line in parts.run:
        if run.final_scores and line.strip() and not line.startswith("final_score "):
            run.trailing = run.trailing or line

        if in_config and line.startswith("  "):
            name, _, value = line[2:].partition(":")
            run.config[name] = value.strip()
        else:
            in_config = line == "config:"
            read_run_line(run, line)
    return run


def read_run_line(run: RunLog, line: str) -> None:
    """Add the content of one line after the config to `run`."""
    head, _, rest = line.partition(" ")
    if line.startswith("step:"):
        read_step(run, line)
    elif holds_facts(head, rest):
        run.facts.setdefault(head, {}).update(pairs(rest))
        if head == "final_score":
            run.final_scores += 1
    elif head == "report":
        report = pairs(rest)
        run.reports[report.get("split", "unnamed")] = report
    elif head == "stopping_early:":
        run.stopped = pairs(rest)
    elif head == "resumed":
        undo_steps(run, line)
    elif head == "preset:":
        run.preset = rest.strip()
    elif line.startswith("artifact over the cap"):
        run.over_cap = True
    elif line.startswith("late compilation"):
        run.late = line
    else:
        read_size(run, line)


def holds_facts(head: str, rest: str) -> bool:
    """Return whether a line with this first word and rest goes into `facts`."""
    if head.startswith("final_"):
        return "val_loss:" in rest
    if head == "artifact":
        return rest.startswith("weights:")
    return head in FACT_LINES or head.startswith("sweep")


def read_step(run: RunLog, line: str) -> None:
    """Add a `step:` line to `run`. One of another form goes to `malformed`."""
    match = STEP.match(line)
    if match is None:
        run.malformed.append(line)
        return

    step, total, kind, loss, bpb, time_ms, average = match.groups()
    try:
        parsed = Step(
            step=int(step),
            total=int(total),
            kind=kind,
            loss=float(loss),
            bpb=float(bpb) if bpb else None,
            time_ms=int(time_ms),
            step_avg_ms=float(average),
        )
    except ValueError:
        raise BadInput(f"{run.path}: not a number in: {line}") from None
    run.steps.append(parsed)


def read_size(run: RunLog, line: str) -> None:
    """Add the figure of a size line to `run`; any other line adds nothing."""
    for name, pattern in SIZES.items():
        if match := pattern.match(line):
            run.sizes[name] = int(match[1])


def undo_steps(run: RunLog, line: str) -> None:
    """Drop the steps, the stop and the scores that the run wrote after the checkpoint it resumes from."""
    match = RESUMED.match(line)
    if match is None:
        raise BadInput(f"{run.path}: no step in: {line}")

    run.resumed.append(line)
    last = int(match[1])
    # The validation of the checkpoint's own step comes after the checkpoint, so it runs again.
    run.steps = [s for s in run.steps if s.step < last or (s.step == last and s.kind == "train")]
    ended = ("final_", "compute")
    run.facts = {name: facts for name, facts in run.facts.items() if not name.startswith(ended)}
    run.stopped = {}
    run.over_cap = False
    run.final_scores = 0
    run.trailing = ""
    run.malformed = []
