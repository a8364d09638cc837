"""Proves folders in the form of the published parameter-golf submissions, without running their code.

They hold train_seed<seed>.log (or train.log) beside a submission.json of no fixed schema. The claims are
those of record_claims.py, as far as they can be made here. A figure that the logs do not give is not
checkable, never ok.
"""

from __future__ import annotations

import ast
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from ledger import stats
from ledger.files import read_json
from ledger.folders import is_date
from ledger.prove.claims import LogFolder, NotCheckable, demand, demand_files
from ledger.prove.record_claims import seconds
from ledger.read.dialects import SEED_IN_NAME, parse_published_log
from ledger.read.runlog import RunLog
from ledger.read.schema import is_type
from ledger.tracks import CAP_BYTES, RECORD_SEEDS, TRACKS
from script import BadInput

LIMITS = TRACKS["track_10min_16mb"]
FILES = ("README.md", "submission.json", "train_gpt.py")
SPLIT_BYTES = (151_060_000, 151_090_000)  # the validation split, whatever the tokenizer
BYTES_PER_TOKEN = (0.9, 10.0)  # any tokenizer lies within: bytes have 1, 8192 pieces 3.7
ROUNDING = 5e-5  # half of the last of the four digits that scores are rounded to at most
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+[a-z]*")  # in a track's name: 10min_16mb, NonRecord
# Settings that differ between logs of one script, which names them as it likes: seed, name, paths, process.
FREE_NAME = re.compile(r"(seed|run_id|data|out|([a-z0-9_]+_)?(dir|path|root|file)|logfile|rank|local_rank)")
MAX_EVIDENCE = 600  # characters


def top_logs(folder: Path) -> list[Path]:
    """Return the training logs beside train_gpt.py."""
    return sorted(path for path in folder.glob("train*") if path.suffix in (".log", ".txt"))


def stored_submission(folder: Path) -> dict | None:
    """Return submission.json, or None when it cannot be read or is not an object."""
    try:
        sub = read_json(folder / "submission.json")
    except BadInput:
        return None
    return sub if isinstance(sub, dict) else None


def is_challenge_folder(folder: Path) -> bool:
    """Return whether the folder has the published form and not this ledger's."""
    sub = stored_submission(folder)
    without_schema = sub is not None and "schema" not in sub
    if top_logs(folder):
        return without_schema or not (folder / "logs").is_dir()
    return without_schema and not any((folder / "logs").glob("seed*.txt"))


# ---- the folder ----------------------------------------------------------------------------------


def holds_non_records(track: str) -> bool:
    """Return whether the words of a track's name say so: non and record side by side, or in one word."""
    words = [word.lower() for word in WORD.findall(track)]
    return "nonrecord" in words or ("non", "record") in pairwise(words)


@dataclass
class ChallengeCase(LogFolder):
    """A folder of the published form under examination."""

    def log_paths(self) -> list[Path]:
        return [*top_logs(self.folder), *sorted((self.folder / "logs").glob("*"))]

    def read_log(self, path: Path) -> RunLog:
        return parse_published_log(path)

    @cached_property
    def stored(self) -> dict | None:
        """submission.json, or None when it cannot be read."""
        return stored_submission(self.folder)

    @property
    def sub(self) -> dict:
        """submission.json, which can be read."""
        if self.stored is None:
            raise NotCheckable("submission.json cannot be read")
        return self.stored

    def get(self, key: str, default: object = None) -> object:
        """Return a value of submission.json; `default` when it is absent or the file cannot be read."""
        return (self.stored or {}).get(key, default)

    @property
    def is_record(self) -> bool:
        """Whether it claims to be a record: its folder and submission.json name no track of non-records."""
        tracks = (self.folder.parent.name, str(self.get("track", "")))
        return not any(holds_non_records(track) for track in tracks)

    @cached_property
    def tree(self) -> ast.Module | None:
        """The parsed script, never run; None when this interpreter's grammar refuses it."""
        try:
            return ast.parse(self.source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None

    def mean(self, key: str) -> float:
        """Return the mean of a final figure over the logs that can be read."""
        return stats.mean([run.number("final_score", key) for run in self.readable_runs])


def fact(run: RunLog, head: str, key: str) -> float:
    """Return a figure of a log. Raises NotCheckable if the log does not say."""
    if not run.has(head, key):
        raise NotCheckable(f"{run.path.name} does not say {key}")
    return run.number(head, key)


def agrees(stored: float, want: float, coarsest: float = ROUNDING) -> bool:
    """Return whether `stored` is `want` rounded to the digits it has.

    coarsest: the largest difference that still counts as rounding.
    """
    unit = 0.5 * 10.0 ** Decimal(repr(stored)).as_tuple().exponent
    return abs(stored - want) <= min(max(unit, 1e-8), coarsest) * (1 + 1e-6)


def is_plausible(value: object) -> bool:
    """Return whether a JSON value is a number that a score, a time or a size can be."""
    return is_type(value, "number") and 0 <= value < 1 << 53


def short(value: object) -> str:
    """Return the value as it prints, cut to 40 characters."""
    return repr(value)[:40]


def seed_count(runs: list[RunLog]) -> str:
    """Return the number of seeds with its noun."""
    return "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"


# ---- submission.json -----------------------------------------------------------------------------

TYPES = {
    "name": "string",
    "run_name": "string",
    "author": "string",
    "github_id": "string",
    "date": "string",
    "blurb": "string",
    "track": "string",
    "seed_results": "object",
}
OTHER_NAMES_OF_BPB = ("mean_val_bpb", "mean_bpb", "sliding_bpb_mean")


def score_faults(case: ChallengeCase) -> list[str]:
    """Return what is wrong with val_bpb and val_loss without the data: missing, implausible or exchanged."""
    sub = case.sub
    bpb = sub.get("val_bpb")
    loss = sub.get("val_loss")
    faults = []
    if bpb is None:
        others = [key for key in OTHER_NAMES_OF_BPB if key in sub]
        hint = f", {others[0]} is there" if others else ""
        faults.append(f"val_bpb is missing{hint}")

    for key, value in (("val_bpb", bpb), ("val_loss", loss)):
        if value is not None and not (is_plausible(value) and value > 0):
            faults.append(f"{key} {short(value)} is not a positive number")

    if is_plausible(loss):
        faults += exchange_faults(case, bpb, loss)
    if not faults and loss is not None and bpb is not None:
        faults += ratio_faults(bpb, loss)
    return faults


def exchange_faults(case: ChallengeCase, bpb: object, loss: float) -> list[str]:
    """Return the fault of a val_loss that is bits per byte."""
    is_bpb = loss == bpb or (bool(case.readable_runs) and agrees(loss, case.mean("val_bpb")))
    if not is_bpb:
        return []
    if bpb is None:
        return [f"val_loss {loss} is bits per byte, the val_bpb of the logs"]
    return [f"val_loss {loss} is val_bpb, not nats per token"]


def ratio_faults(bpb: float, loss: float) -> list[str]:
    """Return the fault of two scores whose ratio fits no tokenizer."""
    low, high = BYTES_PER_TOKEN
    width = loss / math.log(2) / bpb
    if low <= width <= high:
        return []
    return [f"val_loss {loss} over val_bpb {bpb} means {width:.3g} bytes per token"]


def key_faults(sub: dict) -> list[str]:
    """Return the keys that are missing or have a wrong type."""
    faults = [f"{key} is missing" for key in ("author", "github_id", "date") if key not in sub]
    if not {"name", "run_name"} & set(sub):
        faults.append("name is missing")

    for key, kind in TYPES.items():
        if key in sub and not is_type(sub[key], kind):
            faults.append(f"{key} {short(sub[key])} is not of type {kind}")
    for key in ("bytes_total", "bytes_code"):
        if key in sub and not (is_plausible(sub[key]) and is_type(sub[key], "integer")):
            faults.append(f"{key} {short(sub[key])} is not a size in bytes")

    seeds = sub.get("seeds", [])
    if not isinstance(seeds, list) or not all(is_type(seed, "integer") for seed in seeds):
        faults.append(f"seeds {short(seeds)} is not a list of whole numbers")
    return faults


def claim_schema(case: ChallengeCase) -> str:
    """The keys that the challenge asks for are there, and keys that every folder has are of one type."""
    demand(case.stored is not None, "submission.json cannot be read")
    faults = score_faults(case) + key_faults(case.sub)
    demand(not faults, "; ".join(faults[:3]))
    return f"{len(case.sub)} keys, those that the challenge asks for among them (no fixed schema)"


class Figure(NamedTuple):
    """A figure that submission.json and the logs both give."""

    key: str
    stored: object
    logged: float
    coarsest: float  # the coarsest rounding that is allowed


def figures_on_both_sides(case: ChallengeCase) -> list[Figure]:
    """Return every figure of submission.json that the logs also give."""
    sub = case.sub
    runs = case.runs
    rows = []
    for key in ("val_bpb", "val_loss"):
        spread = stats.std([run.number("final_score", key) for run in runs])
        rows.append(Figure(key, sub.get(key), case.mean(key), ROUNDING))
        rows.append(Figure(f"{key}_std", sub.get(f"{key}_std"), spread, ROUNDING))

    codes = {counted_code(run) for run in runs}
    if len(codes) == 1:
        rows.append(Figure("bytes_code", sub.get("bytes_code"), codes.pop(), 0.0))

    results = sub.get("seed_results")
    for run in runs:
        entry = results.get(str(run.seed)) if isinstance(results, dict) else None
        if isinstance(entry, dict):
            rows += seed_figures(run, entry)
    return [row for row in rows if row.stored is not None and row.logged is not None]


def seed_figures(run: RunLog, entry: dict) -> list[Figure]:
    """Return the figures of one seed; those that the log lacks are None."""

    def logged(key: str) -> float | None:
        return run.number("final_score", key) if run.has("final_score", key) else None

    train_ms = logged("train_time")
    train_s = None if train_ms is None else train_ms / 1000
    rows = [
        ("val_bpb", logged("val_bpb"), ROUNDING),
        ("val_loss", logged("val_loss"), ROUNDING),
        ("steps", logged("steps"), 0.0),
        ("artifact_bytes", run.sizes.get("artifact"), 0.0),
        ("train_time_s", train_s, 0.05),
    ]
    return [
        Figure(f"seed_results {run.seed} {key}", entry.get(key), value, coarsest)
        for key, value, coarsest in rows
    ]


def claim_numbers(case: ChallengeCase) -> str:
    """Score, std and the entries by seed of submission.json are the figures of the logs."""
    figures = figures_on_both_sides(case)
    for row in figures:
        demand(is_plausible(row.stored), f"{row.key} {short(row.stored)} is not a figure")
        mean_of = f" (mean of {len(case.runs)})" if row.key in ("val_bpb", "val_loss") else ""
        demand(
            agrees(row.stored, row.logged, row.coarsest),
            f"submission.json {row.key}: {row.stored}, {row.logged:.8g} from the logs{mean_of}",
        )
    demand("val_bpb" in case.sub, "val_bpb is missing")
    return f"val_bpb {case.mean('val_bpb'):.8f}, mean of {len(case.runs)} logs; {len(figures)} figures agree"


# ---- the folder and its files --------------------------------------------------------------------


def claim_name(case: ChallengeCase) -> str:
    """The folder's name begins with a date, and its track is the one submission.json names."""
    name = case.folder.name
    demand(is_date(name[:10]), f"{name} does not begin with a day of this century")

    track = case.folder.parent.name.removeprefix("track_")
    stored = case.get("track")
    if isinstance(stored, str) and case.is_record:
        demand(
            stored.removeprefix("track_") == track,
            f"folder says track {track}, submission.json {short(stored)}",
        )
    return f"{case.folder.parent.name}/{name}"


def imported_names(tree: ast.Module | None) -> list[str]:
    """Return the top-level modules that a script imports anywhere."""
    names = set()
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return sorted({name.split(".")[0] for name in names})


def claim_files(case: ChallengeCase) -> str:
    """The files are there; train_gpt.py imports no other file of the folder, which would not be counted."""
    folder = case.folder
    demand_files(folder, FILES)
    local = [
        name
        for name in imported_names(case.tree)
        if (folder / f"{name}.py").is_file() or (folder / name).is_dir()
    ]
    demand(not local, f"train_gpt.py imports {', '.join(local)} of the folder: code that is not counted")

    known = {*FILES, "logs", "requirements.txt", *(path.name for path in top_logs(folder))}
    beside = sorted(path.name for path in folder.iterdir() if path.name not in known)
    note = f"; not counted: {', '.join(beside)[:200]}" if beside else ""
    return f"{len(FILES)} files{note}"


def claim_logs(case: ChallengeCase) -> str:
    """Every log ends with a score, sizes and a seed; no seed has two."""
    runs = case.readable_runs
    demand(not case.log_errors, "; ".join(case.log_errors))
    demand(bool(runs), "no logs")
    for one, other in zip(runs, runs[1:]):
        demand(one.seed != other.seed, f"{one.path.name} and {other.path.name} both have seed {one.seed}")
    return f"{len(runs)} logs with score, sizes and seed"


def claim_source(case: ChallengeCase) -> str:
    """train_gpt.py is the source that the logs hold, where they hold one."""
    want = "\n".join(case.source.splitlines()).strip("\n")
    for run in case.runs:
        demand(run.source in ("", want), f"train_gpt.py is not the source that {run.path.name} holds")

    without = [run.path.name for run in case.runs if not run.source]
    if without:
        raise NotCheckable(f"no source in {', '.join(without)}")
    return f"train_gpt.py is in all {len(case.runs)} logs"


def claim_readme(case: ChallengeCase) -> str:
    """README.md states the score of submission.json."""
    text = case.file("README.md")
    bpb = case.sub.get("val_bpb")
    if not is_plausible(bpb):
        raise NotCheckable("submission.json has no val_bpb to look for")

    stated = re.findall(r"(?<![\d.])\d\.\d{3,12}(?!\d)", text)
    demand(
        any(abs(float(figure) - bpb) <= 0.51 * 10.0 ** -len(figure[2:]) for figure in stated),
        f"README.md does not state the val_bpb {bpb} of submission.json",
    )
    return f"states val_bpb {bpb}"


# ---- the script ----------------------------------------------------------------------------------


def counted_code(run: RunLog) -> int | None:
    """Return the bytes of code in the total of a log."""
    if run.has("final_score", "bytes_wrapped"):
        return run.count("final_score", "bytes_wrapped")
    return run.sizes.get("code")


def source_size(run: RunLog) -> int | None:
    """Return the bytes of the raw source that a log states."""
    if run.has("final_score", "bytes_raw"):
        return run.count("final_score", "bytes_raw")
    return run.sizes.get("code")


def is_packed(tree: ast.Module | None) -> bool:
    """Return whether the script is a shell around compressed code: it ends by executing what it unpacks."""
    if tree is None or not 0 < len(tree.body) <= 5:
        return False

    last = tree.body[-1]
    call = last.value if isinstance(last, ast.Expr) else None
    if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "exec":
        return False
    return any(isinstance(node, ast.Attribute) and "decompress" in node.attr for node in ast.walk(tree))


def claim_code(case: ChallengeCase) -> str:
    """The counted code is the file, raw or packed. A wrapper that is not in the folder is not checkable."""
    size = len(case.source.encode("utf-8"))
    runs = case.runs
    for run in runs:
        stated = source_size(run)
        if stated is None:
            raise NotCheckable(f"{run.path.name} gives no code size")
        demand(stated == size, f"{run.path.name} says {stated:,} bytes of source, train_gpt.py has {size:,}")

    if any(run.has("final_score", "bytes_wrapped") for run in runs):
        counted = max(counted_code(run) or 0 for run in runs)
        raise NotCheckable(
            f"convention: {counted:,} bytes of a compressed wrapper are counted, "
            f"and the folder holds the raw {size:,}"
        )
    if is_packed(case.tree):
        return f"convention: the folder's packed train_gpt.py, {size:,} bytes (what it imports is not seen)"
    return f"convention: raw source, {size:,} bytes"


def claim_syntax(case: ChallengeCase) -> str:
    """The script parses. It is neither imported nor run."""
    here = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    if case.tree is None and sys.version_info < (3, 12):
        raise NotCheckable(f"train_gpt.py does not parse under {here}; the challenge runs 3.12")
    demand(case.tree is not None, f"train_gpt.py does not parse under {here}")
    return f"train_gpt.py parses under {here}"


# ---- the runs ------------------------------------------------------------------------------------


def claim_config(case: ChallengeCase) -> str:
    """All logs print the same settings, seed and paths aside."""
    without = [run.path.name for run in case.runs if not run.config]
    if without:
        raise NotCheckable(f"no settings in {', '.join(without)}")

    first, *others = case.runs
    printed = {key for run in case.runs for key in run.config}
    keys = sorted(key for key in printed if not FREE_NAME.fullmatch(key))
    for run in others:
        for key in keys:
            a = first.config.get(key)
            b = run.config.get(key)
            demand(a == b, f"{key} is {a} in {first.path.name} and {b} in {run.path.name}")
    return f"{len(keys)} settings equal in {len(case.runs)} logs"


def claim_seeds(case: ChallengeCase) -> str:
    """Every log has the seed of its name, submission.json names these seeds, and a record has three."""
    runs = case.runs
    for run in runs:
        named = SEED_IN_NAME.search(run.path.stem)
        demand(named is None or int(named[1]) == run.seed, f"{run.path.name} is of seed {run.seed}")

    seeds = ", ".join(str(run.seed) for run in runs)
    stored = case.get("seeds", case.get("seed_results"))
    if isinstance(stored, (list, dict)):
        names = sorted(map(str, stored))
        demand(
            names == sorted(str(run.seed) for run in runs),
            f"submission.json has seeds {', '.join(names)[:80]}; the logs {seeds}",
        )
    demand(
        len(runs) >= RECORD_SEEDS or not case.is_record,
        f"{seed_count(runs)}, a record needs {RECORD_SEEDS}",
    )
    return f"{seed_count(runs)}: {seeds}"


def claim_bytes(case: ChallengeCase) -> str:
    """Every seed's artifact and code are at most the cap, and submission.json says the largest total."""
    totals = {run.seed: run.size("total") for run in case.runs}
    for seed, total in totals.items():
        demand(
            total <= CAP_BYTES,
            f"seed {seed}: {total:,} bytes are {total - CAP_BYTES:,} over the cap of {CAP_BYTES:,}",
        )
    for run in case.runs:
        code = counted_code(run)
        artifact = run.size("artifact")
        demand(
            code is None or artifact + code == run.size("total"),
            f"seed {run.seed}: total {run.size('total'):,} is not artifact {artifact:,} + code {code}",
        )

    worst = max(totals.values())
    stored = case.get("bytes_total")
    demand(
        stored is None or stored == worst,
        f"submission.json bytes_total {short(stored)}, the worst seed has {worst:,}",
    )
    return f"worst of {len(totals)} seeds {worst:,} of {CAP_BYTES:,} bytes, {CAP_BYTES - worst:,} to spare"


def claim_clock(case: ChallengeCase) -> str:
    """Training with Hessian collection, and evaluation, keep 600 s each; one step of overshoot is allowed."""
    evidence = "; ".join(clock_evidence(run, case.is_record) for run in case.runs)
    if not case.is_record:
        return f"{evidence}; no limit applies"

    untimed = [run.path.name for run in case.runs if calibrates_untimed(run)]
    if untimed:
        raise NotCheckable(f"{evidence}; {untimed[-1]} calibrates and does not say for how long")
    return evidence


def calibrates_untimed(run: RunLog) -> bool:
    """Return whether the log shows a calibration without its time."""
    return run.has("phase_times", "untimed") and not run.has("phase_times", "calibrate_s")


def clock_evidence(run: RunLog, limited: bool) -> str:
    """Return the times of one log. Raises Wrong if the limits apply and are exceeded."""
    train = fact(run, "final_score", "train_time")
    steps = fact(run, "final_score", "steps")
    total = train
    evidence = f"seed {run.seed}: train {seconds(train)}"
    if run.has("phase_times", "calibrate_s"):
        calibrate = 1000 * run.number("phase_times", "calibrate_s")
        total += calibrate
        evidence += f" + Hessians {seconds(calibrate)} = {seconds(total)}"
    evidence += " s"

    if run.has("phase_times", "eval_s"):
        eval_s = run.number("phase_times", "eval_s")
        evidence += f", eval {eval_s:.1f} s"
        demand(not limited or eval_s <= LIMITS.eval_s, f"{evidence} of {LIMITS.eval_s:g}")

    over = total - 1000 * LIMITS.train_s
    demand(
        not limited or over <= train / max(steps, 1),
        f"{evidence}: {seconds(over)} s over {LIMITS.train_s:g} s, more than one step",
    )
    return evidence


def claim_steps(case: ChallengeCase) -> str:
    """Step lines run forward and end where the log says it stopped."""
    evidence = []
    for run in case.runs:
        steps = fact(run, "final_score", "steps")
        train_ms = fact(run, "final_score", "train_time")
        if not run.steps or run.malformed:
            raise NotCheckable(f"{run.path.name}: step lines of a form not known here, or none")

        for a, b in zip(run.steps, run.steps[1:]):
            demand(
                b.step >= a.step and b.time_ms >= a.time_ms and b.total == a.total,
                f"seed {run.seed}: step {b.step}/{b.total} follows {a.step}/{a.total}",
            )
        last = run.steps[-1].step
        demand(last <= steps, f"seed {run.seed}: stopped at step {steps:g}, but has a line of step {last}")
        evidence.append(f"seed {run.seed}: {steps:g} steps of {train_ms / max(steps, 1):.2f} ms")
    return "; ".join(evidence)


def claim_score(case: ChallengeCase) -> str:
    """Every log ends with a score of the same name."""
    labels = sorted({run.text("final_score", "metric") for run in case.runs})
    demand(len(labels) == 1, f"the logs end with different scores: {', '.join(labels)}")
    return f"{labels[0] or 'unnamed'} is the last score of {len(case.runs)} logs"


def claim_ratio(case: ChallengeCase) -> str:
    """Nats, bits and tokens of every log give the bytes of the validation split."""
    low, high = SPLIT_BYTES
    for run in case.runs:
        tokens = fact(run, "data", "val_tokens")
        loss = run.number("final_score", "val_loss")
        bpb = run.number("final_score", "val_bpb")
        demand(bpb > 0, f"seed {run.seed}: val_bpb {bpb}")

        digits = len(run.text("final_score", "val_bpb").partition(".")[2])
        slack = 1 + 10.0**-digits / bpb
        found = loss / math.log(2) * tokens / bpb
        demand(
            low / slack <= found <= high * slack,
            f"seed {run.seed}: {loss} nats at {bpb} bpb over {tokens:,.0f} tokens mean {found:,.0f} bytes, "
            f"the split has {low:,} to {high:,}",
        )
    return f"{tokens:,.0f} tokens and {found:,.0f} bytes follow from loss and bpb"


def claim_hardware(case: ChallengeCase) -> str:
    """A record ran on eight H100, as its logs show."""
    run = case.runs[0]
    if not (run.has("machine", "world_size") and run.has("machine", "device")):
        stored = short(case.get("hardware"))
        raise NotCheckable(f"the logs do not show it; submission.json says {stored}")

    ranks = run.count("machine", "world_size")
    device = run.text("machine", "device")
    demand(
        not case.is_record or (ranks == LIMITS.ranks and LIMITS.device in device),
        f"{ranks} x {device}, a record needs {LIMITS.ranks} x {LIMITS.device}",
    )
    return f"{ranks} x {device}"


def claim_requirements(case: ChallengeCase) -> str:
    """The PyTorch that submission.json names is the one that ran."""
    stored = case.get("pytorch_version")
    ran = case.runs[0].versions.get("torch")
    if not isinstance(stored, str) or ran is None:
        raise NotCheckable("no PyTorch version in submission.json, or none in the log")
    demand(ran.startswith(stored), f"submission.json says PyTorch {short(stored)}, the log {ran}")
    return f"PyTorch {ran}"


def never_checkable(reason: str) -> Callable[[ChallengeCase], str]:
    """Return a claim that cannot be decided in this form."""

    def claim(case: ChallengeCase) -> str:
        raise NotCheckable(reason)

    return claim


def printable(evidence: str) -> str:
    """Return the evidence, which may quote foreign text, as one short line that any terminal can print."""
    line = " ".join(evidence.split())[:MAX_EVIDENCE]
    return line.encode("utf-8", "backslashreplace").decode("utf-8")
