"""Helpers of the tests of whole runs: finished runs, made once, and the lines of their logs."""

import re
from functools import cache
from types import SimpleNamespace

import train_gpt as t
from tests.helpers import (
    english_args,
    temporary_folder,
)

# The exact formats that parsers of modded-nanogpt and parameter-golf logs take.
TRAIN_LINE = re.compile(
    r"^step:(\d+)/(\d+) train_loss:(\d+\.\d{4}) train_time:(\d+)ms step_avg:(\d+\.\d{2})ms$"
)

VAL_LINE = re.compile(
    r"^step:(\d+)/(\d+) val_loss:(\d+\.\d{4}) val_bpb:(\d+\.\d{4}) "
    r"train_time:(\d+)ms step_avg:(\d+\.\d{2})ms$"
)

COMMUNITY = [
    re.compile(r"step:(\d+)/(\d+)\s+val_loss:([0-9.]+)"),
    re.compile(r"step:(\d+)/\d+ val_loss:([\d.]+)"),
]

SCORE_LINES = [
    r"^final_int6_roundtrip val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} eval_time:\d+ms$",
    r"^final_int6_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$",
    r"^final_int6_sliding_window val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} stride:8 eval_time:\d+ms$",
    r"^final_int6_sliding_window_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$",
    r"^Serialized model int6\+lzma: \d+ bytes$",
    r"^Code size: \d+ bytes$",
    r"^Total submission size int6\+lzma: \d+ bytes$",
    r"^warmup_step:1/2$",
    r"^warmup_step:2/2$",
]

FINAL = re.compile(
    r"^final_score metric:int6_lzma_sliding "
    r"val_loss:(?P<val_loss>\d+\.\d{8}) val_bpb:(?P<val_bpb>\d+\.\d{8}) "
    r"bytes_total:(?P<bytes_total>\d+) bytes_code:(?P<bytes_code>\d+) steps:(?P<steps>\d+) "
    r"train_time:(?P<train_time>\d+)ms eval_time:(?P<eval_time>\d+)ms seed:(?P<seed>\d+) "
    r"sha256:(?P<sha256>[0-9a-f]{64})$"
)

STEPS = 24


def read_run(folder, status):
    """Read what a run left in its folder: log, lines, artifact's blob (None: no file), match of the score."""
    artifact = folder / "run.int6.xz"
    log = (folder / "run.txt").read_text(encoding="utf-8")
    lines = log.splitlines()
    return SimpleNamespace(
        folder=folder,
        status=status,
        log=log,
        lines=lines,
        blob=artifact.read_bytes() if artifact.exists() else None,
        final=FINAL.match(lines[-1]),
    )


@cache
def finished(**knobs):
    """Train in this process and read the run. The same knobs, in the same order, train once."""
    folder = temporary_folder() / "out"
    argv = english_args(**({"iterations": STEPS, "out_dir": folder} | knobs))
    return read_run(folder, t.main(argv))


def finished_with(**knobs):
    """Train in this process and read the run. The same knobs train once."""
    return finished(**dict(sorted(knobs.items())))


def value(run, pattern):
    """Return the first group of the pattern in the only line of the log that matches it."""
    found = [match for match in (re.match(pattern, line) for line in run.lines) if match]
    assert len(found) == 1, (pattern, len(found))
    return found[0].group(1)


def starting(run, start):
    """Return the lines of the log that start so."""
    return [line for line in run.lines if line.startswith(start)]


def matches(run, pattern):
    """Return the matches of a compiled pattern, line by line."""
    return [match for match in map(pattern.match, run.lines) if match]


def loss_in(line):
    return float(re.search(r"val_loss:([\d.]+)", line)[1])
