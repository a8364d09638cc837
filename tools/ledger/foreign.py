"""Folders in the layout of the published parameter-golf submissions, examined without running their code.

They hold train_seed<seed>.log (or train.log) beside a submission.json of no fixed schema. The claims are
those of checks.py as far as they can be made here; what the logs do not say is not checkable, never ok.
"""
from __future__ import annotations

import ast
import json
import math
import re
import sys
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from functools import cached_property
from pathlib import Path

from ledger import stats
from ledger.checks import CLAIMS, RECORD_SEEDS, TRACKS, LogFolder, NotCheckable, Wrong, demand, seconds
from ledger.dialects import parse
from ledger.runlog import CAP_BYTES, FREE_KEYS, BadInput, Run, is_type, read_text

LIMITS = TRACKS["track_10min_16mb"]
FILES = ("README.md", "submission.json", "train_gpt.py")
SPLIT_BYTES = (151_060_000, 151_090_000)        # the validation split, whatever the tokenizer
BYTES_PER_TOKEN = (0.9, 10.0)                   # of any tokenizer: bytes have 1, 8192 pieces 3.7


def top_logs(folder: Path) -> list[Path]:
    """Training logs beside train_gpt.py."""
    return sorted(path for path in folder.glob("train*") if path.suffix in (".log", ".txt"))


def is_foreign(folder: Path) -> bool:
    """Whether the folder is of the published layout and not of this ledger's."""
    try:
        sub = json.loads(read_text(folder / "submission.json"))
    except (BadInput, ValueError, RecursionError):
        sub = None
    plain = isinstance(sub, dict) and "schema" not in sub
    if top_logs(folder):
        return plain or not (folder / "logs").is_dir()
    return plain and not any((folder / "logs").glob("seed*.txt"))


# ---- the folder ----------------------------------------------------------------------------------

@dataclass
class Foreign(LogFolder):
    """One folder under examination. Properties raise NotCheckable where an earlier claim already failed."""
    folder: Path
    log_errors: list[str] = field(default_factory=list)

    @cached_property
    def sub(self) -> dict:
        try:
            sub = json.loads(read_text(self.folder / "submission.json"))
        except (BadInput, ValueError, RecursionError):
            sub = None
        if not isinstance(sub, dict):
            raise NotCheckable("submission.json cannot be read")
        return sub

    @property
    def told(self) -> dict:
        """submission.json, or nothing."""
        try:
            return self.sub
        except NotCheckable:
            return {}

    @cached_property
    def all_runs(self) -> list[Run]:
        return self.finished([*top_logs(self.folder), *sorted((self.folder / "logs").glob("*"))], parse)

    @property
    def record(self) -> bool:
        """Whether it claims to be a record: the track says otherwise by name."""
        return "non" not in f"{self.folder.parent.name} {self.told.get('track', '')}".lower()

    @cached_property
    def tree(self) -> ast.Module | None:
        """The parsed script, never run; None when this interpreter's grammar refuses it."""
        try:
            return ast.parse(self.source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None

    def fact(self, run: Run, head: str, key: str) -> float:
        """A figure of a log; NotCheckable when the log does not say."""
        if not run.has(head, key):
            raise NotCheckable(f"{run.path.name} does not say {key}")
        return run.number(head, key)

    def mean(self, key: str) -> float:
        """Of a figure over the logs that can be read."""
        return stats.mean([run.number("final_score", key) for run in self.all_runs])


def agrees(told: float, want: float, coarsest: float = 5e-5) -> bool:
    """Whether `told` is `want` rounded to the digits it has; a coarser rounding than `coarsest` is none."""
    unit = 0.5 * 10.0 ** Decimal(repr(told)).as_tuple().exponent
    return abs(told - want) <= min(max(unit, 1e-8), coarsest) * (1 + 1e-6)


def figure(value: object) -> bool:
    """A number that a score, a time or a size can be."""
    return is_type(value, "number") and 0 <= value < 1 << 53


def short(value: object) -> str:
    return repr(value)[:40]


# ---- claims --------------------------------------------------------------------------------------

def loss_faults(case: Foreign) -> list[str]:
    """What is wrong with val_bpb and val_loss, seen without the data: missing, no figure, or exchanged."""
    sub, faults = case.sub, []
    bpb, loss = sub.get("val_bpb"), sub.get("val_loss")
    if bpb is None:
        other = [key for key in ("mean_val_bpb", "mean_bpb", "sliding_bpb_mean") if key in sub]
        faults.append("val_bpb is missing" + (f", {other[0]} is there" if other else ""))
    for key, value in (("val_bpb", bpb), ("val_loss", loss)):
        if value is not None and not (figure(value) and value > 0):
            faults.append(f"{key} {short(value)} is no positive number")
    if figure(loss) and (loss == bpb or case.all_runs and agrees(loss, case.mean("val_bpb"))):
        faults.append(f"val_loss {loss} is bits per byte, the val_bpb of the logs" if bpb is None
                      else f"val_loss {loss} is val_bpb, not nats per token")
    if not faults and loss is not None and bpb is not None:
        width, (low, high) = loss / math.log(2) / bpb, BYTES_PER_TOKEN
        if not low <= width <= high:
            faults.append(f"val_loss {loss} over val_bpb {bpb} means {width:.3g} bytes per token")
    return faults


def claim_schema(case: Foreign) -> str:
    """The keys that the challenge asks for are there, and what every folder has is of one type."""
    try:
        sub = case.sub
    except NotCheckable as reason:
        raise Wrong(str(reason)) from None
    types = {"name": "string", "run_name": "string", "author": "string", "github_id": "string",
             "date": "string", "blurb": "string", "track": "string", "seed_results": "object"}
    faults = [f"{key} is missing" for key in ("author", "github_id", "date")
              if key not in sub] + ["name is missing"] * (not {"name", "run_name"} & set(sub))
    faults += [f"{key} {short(sub[key])} is not of type {kind}" for key, kind in types.items()
               if key in sub and not is_type(sub[key], kind)]
    faults += [f"{key} {short(sub[key])} is no size in bytes" for key in ("bytes_total", "bytes_code")
               if key in sub and not (figure(sub[key]) and is_type(sub[key], "integer"))]
    seeds = sub.get("seeds", [])
    if not isinstance(seeds, list) or not all(is_type(seed, "integer") for seed in seeds):
        faults.append(f"seeds {short(seeds)} is no list of whole numbers")
    faults = loss_faults(case) + faults
    demand(not faults, "; ".join(faults[:3]))
    return f"{len(sub)} keys, those that the challenge asks for among them (no fixed schema)"


def claim_name(case: Foreign) -> str:
    """The folder's name begins with a date, and its track is the one submission.json names."""
    name, there = case.folder.name, case.folder.parent.name.removeprefix("track_")
    try:
        date.fromisoformat(name[:10])
    except ValueError:
        raise Wrong(f"{name} does not begin with a date") from None
    told = case.told.get("track")
    demand(not isinstance(told, str) or told.removeprefix("track_") == there or not case.record,
           f"folder says track {there}, submission.json {short(told)}")
    return f"{case.folder.parent.name}/{name}"


def claim_files(case: Foreign) -> str:
    """The files are there; train_gpt.py imports no other file of the folder, which would not be counted."""
    missing = [name for name in FILES if not (case.folder / name).is_file()]
    demand(not missing, f"missing: {', '.join(missing)}")
    nodes = list(ast.walk(case.tree)) if case.tree else []
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    imported = sorted({name.split(".")[0] for name in names})
    local = [name for name in imported if (case.folder / f"{name}.py").is_file()
             or (case.folder / name).is_dir()]
    demand(not local, f"train_gpt.py imports {', '.join(local)} of the folder: code that is not counted")
    beside = sorted(path.name for path in case.folder.iterdir() if path.name not in FILES
                    and path not in top_logs(case.folder) and path.name not in ("logs", "requirements.txt"))
    return f"{len(FILES)} files" + (f"; not counted: {', '.join(beside)[:200]}" if beside else "")


def claim_logs(case: Foreign) -> str:
    """Every log ends with a score, sizes and a seed; no seed has two."""
    runs = case.all_runs
    demand(not case.log_errors, "; ".join(case.log_errors))
    demand(bool(runs), "no logs")
    for one, other in zip(runs, runs[1:]):
        demand(one.seed != other.seed, f"{one.path.name} and {other.path.name} both have seed {one.seed}")
    return f"{len(runs)} logs with score, sizes and seed"


def claim_source(case: Foreign) -> str:
    """train_gpt.py is the source that the logs hold, where they hold one."""
    want, lack = "\n".join(case.source.splitlines()).strip("\n"), []
    for run in case.runs:
        if not run.source:
            lack.append(run.path.name)
        demand(run.source in ("", want), f"train_gpt.py is not the source that {run.path.name} holds")
    if lack:
        raise NotCheckable(f"no source in {', '.join(lack)}")
    return f"train_gpt.py is in all {len(case.runs)} logs"


def numbers_told(case: Foreign) -> list[tuple[str, object, float, float]]:
    """(key, value in submission.json, value of the logs, coarsest rounding) of figures on both sides."""
    sub, runs = case.sub, case.runs
    rows = [(key, sub.get(key), case.mean(key), 5e-5) for key in ("val_bpb", "val_loss")]
    for key in ("val_bpb", "val_loss"):
        spread = stats.std([run.number("final_score", key) for run in runs])
        rows += [(f"{key}_std", sub.get(f"{key}_std"), spread, 5e-5)] if spread is not None else []
    codes = {counted_code(run) for run in runs}
    rows += [("bytes_code", sub.get("bytes_code"), codes.pop(), 0.0)] if len(codes) == 1 else []
    results = sub.get("seed_results")
    for run in runs:
        entry = results.get(str(run.seed)) if isinstance(results, dict) else None
        final = {key: run.number("final_score", key) for key in ("val_bpb", "val_loss", "steps", "train_time")
                 if run.has("final_score", key)}
        final["artifact_bytes"] = run.sizes.get("artifact")
        final["train_time_s"] = final["train_time"] / 1000 if "train_time" in final else None
        for key, coarsest in (("val_bpb", 5e-5), ("val_loss", 5e-5), ("steps", 0.0), ("artifact_bytes", 0.0),
                              ("train_time_s", 0.05)):
            told = entry.get(key) if isinstance(entry, dict) else None
            rows.append((f"seed_results {run.seed} {key}", told, final.get(key), coarsest))
    return [row for row in rows if row[1] is not None and row[2] is not None]


def claim_numbers(case: Foreign) -> str:
    """Score, std, and what submission.json says by seed are the figures of the logs."""
    rows = numbers_told(case)
    for key, told, want, coarsest in rows:
        demand(figure(told), f"{key} {short(told)} is no figure")
        demand(agrees(told, want, coarsest), f"submission.json {key}: {told}, {want:.8g} from the logs"
               + (f" (mean of {len(case.runs)})" if key in ("val_bpb", "val_loss") else ""))
    demand("val_bpb" in case.sub, "val_bpb is missing")
    return f"val_bpb {case.mean('val_bpb'):.8f}, mean of {len(case.runs)} logs; {len(rows)} figures agree"


def claim_config(case: Foreign) -> str:
    """All logs print the same settings, seed and paths aside."""
    bare = [run.path.name for run in case.runs if not run.config]
    if bare:
        raise NotCheckable(f"no settings in {', '.join(bare)}")
    first, *others = case.runs
    keys = sorted(key for key in {key for run in case.runs for key in run.config}
                  if not FREE_KEYS.match(key) and key not in ("logfile", "rank", "local_rank"))
    for run in others:
        for key in keys:
            a, b = first.config.get(key), run.config.get(key)
            demand(a == b, f"{key} is {a} in {first.path.name} and {b} in {run.path.name}")
    return f"{len(keys)} settings equal in {len(case.runs)} logs"


def claim_seeds(case: Foreign) -> str:
    """Every log has the seed of its name, submission.json names these seeds, and a record has three."""
    seeds = [run.seed for run in case.runs]
    for run in case.runs:
        named = re.search(r"seed_?(\d+)", run.path.stem)
        demand(named is None or int(named[1]) == run.seed, f"{run.path.name} is of seed {run.seed}")
    told = case.told.get("seeds", case.told.get("seed_results"))
    told = sorted(map(str, told)) if isinstance(told, (list, dict)) else None
    demand(told is None or told == sorted(map(str, seeds)), "submission.json has seeds "
           f"{', '.join(told or [])[:80]}; the logs {', '.join(map(str, seeds))}")
    count = f"{len(seeds)} seed{'s' * (len(seeds) != 1)}"
    demand(len(seeds) >= RECORD_SEEDS or not case.record, f"{count}, a record needs {RECORD_SEEDS}")
    return f"{count}: {', '.join(map(str, seeds))}"


def counted_code(run: Run) -> int | None:
    """Bytes of code in the total of a log."""
    if run.has("final_score", "bytes_wrapped"):
        return run.count("final_score", "bytes_wrapped")
    return run.sizes.get("code")


def claim_bytes(case: Foreign) -> str:
    """Every seed's artifact and code are at most the cap, and submission.json says the largest total."""
    totals = {run.seed: run.size("total") for run in case.runs}
    for seed, total in totals.items():
        demand(total <= CAP_BYTES,
               f"seed {seed}: {total:,} bytes are {total - CAP_BYTES:,} over the cap of {CAP_BYTES:,}")
    for run in case.runs:
        code, artifact = counted_code(run), run.size("artifact")
        demand(code is None or artifact + code == run.size("total"),
               f"seed {run.seed}: total {run.size('total'):,} is not artifact {artifact:,} + code {code}")
    worst, told = max(totals.values()), case.told.get("bytes_total")
    demand(told is None or told == worst,
           f"submission.json bytes_total {short(told)}, the worst seed has {worst:,}")
    return f"worst of {len(totals)} seeds {worst:,} of {CAP_BYTES:,} bytes, {CAP_BYTES - worst:,} to spare"


def packed(tree: ast.Module | None) -> bool:
    """Whether the script is a shell around compressed code: it ends by executing what it unpacks."""
    last = tree.body[-1] if tree and 0 < len(tree.body) <= 5 else None
    call = last.value if isinstance(last, ast.Expr) else None
    unpacks = isinstance(call, ast.Call) and getattr(call.func, "id", "") == "exec"
    return unpacks and any(isinstance(node, ast.Attribute) and "decompress" in node.attr
                           for node in ast.walk(call))


def claim_code(case: Foreign) -> str:
    """The counted code is the file, raw or packed; a wrapper that is not in the folder is not checkable."""
    size, runs = len(case.source.encode("utf-8")), case.runs
    for run in runs:
        raw = run.count("final_score", "bytes_raw") if run.has("final_score", "bytes_raw") else None
        told = run.sizes.get("code") if raw is None else raw
        if told is None:
            raise NotCheckable(f"{run.path.name} gives no code size")
        demand(told == size, f"{run.path.name} says {told:,} bytes of source, train_gpt.py has {size:,}")
    if any(run.has("final_score", "bytes_wrapped") for run in runs):
        counted = max(counted_code(run) or 0 for run in runs)
        raise NotCheckable(f"convention: {counted:,} bytes of a compressed wrapper are counted, "
                           f"and the folder holds the raw {size:,}")
    if packed(case.tree):
        return f"convention: the folder's packed train_gpt.py, {size:,} bytes (what it imports is not seen)"
    return f"convention: raw source, {size:,} bytes"


def claim_syntax(case: Foreign) -> str:
    """The script parses. It is neither imported nor run."""
    here = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    case.source
    if case.tree is None and sys.version_info < (3, 12):
        raise NotCheckable(f"train_gpt.py does not parse under {here}; the challenge runs 3.12")
    demand(case.tree is not None, f"train_gpt.py does not parse under {here}")
    return f"train_gpt.py parses under {here}"


def claim_clock(case: Foreign) -> str:
    """Training with Hessian collection, and evaluation, keep 600 s each; one step of overshoot is allowed."""
    evidence, unknown = [], ""
    for run in case.runs:
        train, steps = (case.fact(run, "final_score", key) for key in ("train_time", "steps"))
        timed = run.has("phase_times", "calibrate_s")
        calibrate = 1000 * run.number("phase_times", "calibrate_s") if timed else 0.0
        total, told = train + calibrate, f"seed {run.seed}: train {seconds(train)}"
        told += f" + Hessians {seconds(calibrate)} = {seconds(total)} s" if timed else " s"
        if not timed and run.has("phase_times", "untimed"):
            unknown = f"{run.path.name} calibrates and does not say for how long"
        if run.has("phase_times", "eval_s"):
            told += f", eval {run.number('phase_times', 'eval_s'):.1f} s"
            demand(not case.record or run.number("phase_times", "eval_s") <= LIMITS.eval_s,
                   f"{told} of {LIMITS.eval_s:g}")
        over = total - 1000 * LIMITS.train_s
        demand(not case.record or over <= train / max(steps, 1),
               f"{told}: {seconds(over)} s over {LIMITS.train_s:g} s, more than one step")
        evidence.append(told)
    if unknown and case.record:
        raise NotCheckable(f"{'; '.join(evidence)}; {unknown}")
    return "; ".join(evidence) + ("" if case.record else "; no limit applies")


def claim_steps(case: Foreign) -> str:
    """Step lines run forward and end where the log says it stopped."""
    evidence = []
    for run in case.runs:
        steps, train_ms = (case.fact(run, "final_score", key) for key in ("steps", "train_time"))
        if not run.steps or run.malformed:
            raise NotCheckable(f"{run.path.name}: step lines of a form not known here, or none")
        for a, b in zip(run.steps, run.steps[1:]):
            demand(b.step >= a.step and b.time_ms >= a.time_ms and b.total == a.total,
                   f"seed {run.seed}: step {b.step}/{b.total} follows {a.step}/{a.total}")
        last = run.steps[-1].step
        demand(last <= steps, f"seed {run.seed}: stopped at step {steps:g}, but has a line of step {last}")
        evidence.append(f"seed {run.seed}: {steps:g} steps of {train_ms / max(steps, 1):.2f} ms")
    return "; ".join(evidence)


def claim_score(case: Foreign) -> str:
    """Every log ends with a score of the same name."""
    labels = sorted({run.text("final_score", "metric") for run in case.runs})
    demand(len(labels) == 1, f"the logs end with different scores: {', '.join(labels)}")
    return f"{labels[0] or 'unnamed'} is the last score of {len(case.runs)} logs"


def claim_ratio(case: Foreign) -> str:
    """Nats, bits and tokens of every log give the bytes of the validation split."""
    low, high = SPLIT_BYTES
    for run in case.runs:
        tokens = case.fact(run, "data", "val_tokens")
        loss, bpb = (run.number("final_score", key) for key in ("val_loss", "val_bpb"))
        demand(bpb > 0, f"seed {run.seed}: val_bpb {bpb}")
        digits = len(run.text("final_score", "val_bpb").partition(".")[2])
        slack = 1 + 10.0 ** -digits / bpb
        got = loss / math.log(2) * tokens / bpb
        demand(low / slack <= got <= high * slack, f"seed {run.seed}: {loss} nats at {bpb} bpb over "
               f"{tokens:,.0f} tokens mean {got:,.0f} bytes, the split has {low:,} to {high:,}")
    return f"{tokens:,.0f} tokens and {got:,.0f} bytes follow from loss and bpb"


def claim_hardware(case: Foreign) -> str:
    """A record ran on eight H100, as its logs show."""
    claimed, run = short(case.told.get("hardware")), case.runs[0]
    if not (run.has("machine", "world_size") and run.has("machine", "device")):
        raise NotCheckable(f"the logs do not show it; submission.json says {claimed}")
    ranks, device = run.count("machine", "world_size"), run.text("machine", "device")
    demand(not case.record or (ranks == LIMITS.ranks and LIMITS.device in device),
           f"{ranks} x {device}, a record needs {LIMITS.ranks} x {LIMITS.device}")
    return f"{ranks} x {device}"


def claim_requirements(case: Foreign) -> str:
    """The PyTorch that submission.json names is the one that ran."""
    told, ran = case.told.get("pytorch_version"), case.runs[0].versions.get("torch")
    if not isinstance(told, str) or ran is None:
        raise NotCheckable("no PyTorch version in submission.json, or none in the log")
    demand(ran.startswith(told), f"submission.json says PyTorch {short(told)}, the log {ran}")
    return f"PyTorch {ran}"


def claim_readme(case: Foreign) -> str:
    """README.md states the score of submission.json."""
    try:
        text = read_text(case.folder / "README.md")
    except BadInput:
        raise Wrong("README.md cannot be read") from None
    bpb = case.sub.get("val_bpb")
    if not figure(bpb):
        raise NotCheckable("submission.json has no val_bpb to look for")
    stated = re.findall(r"(?<![\d.])\d\.\d{3,12}(?!\d)", text)
    demand(any(abs(float(x) - bpb) <= 0.51 * 10.0 ** -len(x[2:]) for x in stated),
           f"README.md does not state the val_bpb {bpb} of submission.json")
    return f"states val_bpb {bpb}"


def skip(reason: str):
    """A claim that is never checkable in this layout."""
    def claim(case: Foreign) -> str:
        raise NotCheckable(reason)
    return claim


HERE = {"artifacts": skip("this layout has no hashes of the artifacts"),
        "import": skip("a foreign script is not imported or run"),
        "parent": skip("parents of this layout are pull requests, not folders"),
        **{name.removeprefix("claim_"): fn for name, fn in list(globals().items())
           if name.startswith("claim_")}}


def examine(folder: Path) -> list[tuple[str, str, str]]:
    """(ok | fail | not checkable, claim, evidence) for every claim, as checks.examine gives them."""
    case, out = Foreign(folder), []
    for name in CLAIMS:
        try:
            row = "ok", name, HERE[name](case)
        except Wrong as wrong:
            row = "fail", name, str(wrong)
        except NotCheckable as reason:
            row = "not checkable", name, str(reason)
        except BadInput as error:
            row = "fail", name, str(error).replace(f"{folder}/", "")
        line = " ".join(row[2].split())[:600].encode("utf-8", "backslashreplace").decode("utf-8")
        out.append((*row[:2], line))
    return out
