"""Reads one training log of train_gpt.py, and turns the logs of a record into the figures of submission.json.

A log is: the script's source, a line of 100 `=`, versions and hardware, a line of 100 `=`, the resolved
config, run lines, and last, once, `final_score`. The source holds every format string too, so nothing before
the second separator is read as a result.
"""
from __future__ import annotations

import gzip
import hashlib
import math
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from ledger import stats
from script import BadInput

SEPARATOR = "=" * 100
CAP_BYTES = 16_000_000                  # decimal: artifact + packed code, decided for every seed
SCHEMA_VERSION = 1
# Seed, name and the places a run reads and writes may differ between the logs of one record; nothing else.
FREE_KEYS = re.compile(r"^(seed|run_id|data|out|([a-z0-9_]+_)?(dir|path|root|file))$")


@dataclass(frozen=True)
class Step:
    """One `step:` line. Time is training time on the clock in ms; bpb is None on train_loss lines."""
    step: int
    total: int
    kind: str                           # train | val
    loss: float                         # nats per token
    bpb: float | None
    time_ms: int
    step_avg_ms: float


@dataclass
class Run:
    """What one log says. Mappings hold the text of the log; `number` reads a figure out of them."""
    path: Path
    source: str = ""
    versions: dict[str, str] = field(default_factory=dict)      # python, torch, cuda, triton
    config: dict[str, str] = field(default_factory=dict)
    preset: str = ""
    facts: dict[str, dict[str, str]] = field(default_factory=dict)    # first word of a line -> its pairs
    steps: list[Step] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)          # step: lines of another form
    reports: dict[str, dict[str, str]] = field(default_factory=dict)  # split -> pairs
    sizes: dict[str, int] = field(default_factory=dict)         # artifact, code, total (bytes), peak (MiB)
    stopped: dict[str, str] = field(default_factory=dict)       # the stopping_early line
    resumed: list[str] = field(default_factory=list)            # `resumed step:N` lines: went on after a kill
    over_cap: bool = False
    final_scores: int = 0
    late: str = ""                      # the line that says that something compiled while the clock ran
    trailing: str = ""                  # first line after final_score, if there is one

    def has(self, line: str, key: str) -> bool:
        """Whether the log has a line starting with `line` that holds `key:`."""
        return key in self.facts.get(line, {})

    def text(self, line: str, key: str) -> str:
        """Value of `key` in the run line starting with `line`; BadInput when the log lacks it."""
        if not self.has(line, key):
            raise BadInput(f"{self.path}: no '{line}' line with {key}: (the run did not finish, or is of "
                           "another script); finished logs are needed here")
        return self.facts[line][key]

    def number(self, line: str, key: str) -> float:
        """Finite figure (a trailing `ms` is dropped); BadInput names file, line and key."""
        value = self.text(line, key)
        try:
            figure = float(value.removesuffix("ms"))
        except ValueError:
            raise BadInput(f"{self.path}: {line} {key}:{value} is not a number") from None
        if not math.isfinite(figure):
            raise BadInput(f"{self.path}: {line} {key}:{value}: a diverged run has no score")
        return figure

    def count(self, line: str, key: str) -> int:
        """Whole, non-negative figure (bytes, steps, ms)."""
        figure = self.number(line, key)
        if figure != int(figure) or figure < 0:
            raise BadInput(f"{self.path}: {line} {key}:{self.text(line, key)} is not a whole number")
        return int(figure)

    def size(self, key: str) -> int:
        """Bytes (or MiB for `peak`) of a size line; BadInput when the log lacks it."""
        if key not in self.sizes:
            raise BadInput(f"{self.path}: no line gives the {key} size: the run did not finish")
        return self.sizes[key]

    @property
    def seed(self) -> int:
        return self.count("final_score", "seed")

    @property
    def hardware(self) -> str:
        return f"{self.text('machine', 'world_size')} x {self.text('machine', 'device')}"

    @property
    def wire(self) -> str:
        """How the weights are shipped, int6 in `int6+lzma`: prefix of the roundtrip lines."""
        return next((key.split("_")[1] for key in self.facts if key.endswith("_roundtrip_exact")), "int6")

    def score(self, suffix: str, key: str = "val_bpb") -> float | None:
        """A figure of the `final_<suffix>` line, None when the run did not compute that score."""
        line = f"final_{suffix}"
        return self.number(line, key) if self.has(line, key) else None


def pairs(line: str) -> dict[str, str]:
    """`a:1 device:NVIDIA H100 b:x` -> {a: 1, device: NVIDIA H100, b: x}; values may hold spaces."""
    return {key: value.strip() for key, value in re.findall(r"(\w+):(.*?)(?=\s\w+:|$)", line)}


def read_text(path: Path) -> str:
    """The file's UTF-8 text, newlines untouched, unzipped if it is a .gz. BadInput names the file."""
    try:
        blob = path.read_bytes()
        return (gzip.decompress(blob) if path.suffix == ".gz" else blob).decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"{path}: cannot read: {why}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def split_log(path: Path) -> tuple[str, list[str], list[str]]:
    """(source, environment lines, run lines). The source ends in exactly one newline. BadInput if no log."""
    parts = re.split(rf"^{SEPARATOR}\r?$\n?", read_text(path), maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or not parts[1].startswith("Running Python"):
        raise BadInput(f"{path}: not a training log: it needs two lines of 100 '=', the first one followed "
                       "by 'Running Python'; pass the file train_gpt.py wrote")
    return parts[0].rstrip("\n") + "\n", parts[1].splitlines(), parts[2].splitlines()


STEP = re.compile(r"step:(\d+)/(\d+) (train|val)_loss:(\S+)(?: val_bpb:(\S+))? "
                  r"train_time:(\d+)ms step_avg:([\d.]+)ms$")
SIZES = {"artifact": re.compile(r"Serialized model \S+: (\d{1,18}) bytes"),
         "code": re.compile(r"Code size: (\d{1,18}) bytes"),
         "total": re.compile(r"Total submission size \S+: (\d{1,18}) bytes"),
         "peak": re.compile(r"peak memory allocated: (\d{1,18}) MiB")}
VERSIONS = {"python": re.compile(r"Running Python (\S+)"), "torch": re.compile(r"Running PyTorch (\S+)"),
            "cuda": re.compile(r"Running PyTorch \S+ compiled for CUDA (\S+)"),
            "triton": re.compile(r"Running Triton version (\S+)")}


NAMED = re.compile(r"train_gpt\.py sha256:([0-9a-f]{64})\n")


def named_source(path: Path, head: str) -> str:
    """The source at the head of a log. A sweep's log holds its hash: then the folder's train_gpt.py.

    BadInput when that file is missing or of another hash.
    """
    match = NAMED.fullmatch(head)
    if match is None:
        return head
    script = path.parent.parent / "train_gpt.py"
    source = read_text(script)
    if sha256(source) != match[1]:
        raise BadInput(f"{path}: was written by a train_gpt.py of sha256 {match[1][:16]}, {script} has "
                       f"{sha256(source)[:16]}")
    return source


def parse_log(path: Path) -> Run:
    """The whole log, finished or not; unknown lines are ignored. BadInput when the file is no log."""
    source, environment, lines = split_log(path)
    run = Run(path, named_source(path, source))
    for name, pattern in VERSIONS.items():
        run.versions[name] = next((m[1] for m in map(pattern.match, environment) if m), "none")
    in_config = False
    for line in lines:
        if run.final_scores and line.strip() and not line.startswith("final_score "):
            run.trailing = run.trailing or line
        if in_config and line.startswith("  "):
            name, _, value = line[2:].partition(":")
            run.config[name] = value.strip()
            continue
        in_config = line == "config:"
        read_run_line(run, line)
    return run


def read_run_line(run: Run, line: str) -> None:
    """Adds what one line after the config says to `run`."""
    head, _, rest = line.partition(" ")
    if match := STEP.match(line):
        step, total, kind, loss, bpb, time_ms, average = match.groups()
        try:
            run.steps.append(Step(int(step), int(total), kind, float(loss), float(bpb) if bpb else None,
                                  int(time_ms), float(average)))
        except ValueError:
            raise BadInput(f"{run.path}: not a number in: {line}") from None
    elif line.startswith("step:"):
        run.malformed.append(line)
    elif (head in ("machine", "data", "phase_times") or head.startswith("sweep")
          or head.startswith("final_") and "val_loss:" in rest):
        run.facts.setdefault(head, {}).update(pairs(rest))
        run.final_scores += head == "final_score"
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
        for name, pattern in SIZES.items():
            if match := pattern.match(line):
                run.sizes[name] = int(match[1])


def undo_steps(run: Run, line: str) -> None:
    """What a run wrote after the checkpoint that it goes on from is void: later steps, its stop and score."""
    match = re.match(r"resumed step:(\d{1,18}) ", line)
    if match is None:
        raise BadInput(f"{run.path}: no step in: {line}")
    run.resumed.append(line)
    last = int(match[1])                                    # its validation comes after the checkpoint
    run.steps = [s for s in run.steps if s.step < last or (s.step == last and s.kind == "train")]
    run.stopped, run.over_cap, run.final_scores, run.trailing, run.malformed = {}, False, 0, "", []
    for name in [name for name in run.facts if name.startswith("final_")]:
        del run.facts[name]


def typed(value: str) -> object:
    """A config value of the log as JSON would hold it: bool, None, int, float, else the text itself."""
    plain = {"True": True, "False": False, "None": None}
    if value in plain:
        return plain[value]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value


def common_config(runs: list[Run]) -> dict[str, object]:
    """The resolved config without seed and paths; BadInput names the first key on which two logs differ."""
    first = runs[0]
    for run in runs:
        if not run.config:
            raise BadInput(f"{run.path}: no config: block after the second line of '='")
        for key in sorted(set(first.config) | set(run.config)):
            if not FREE_KEYS.match(key) and first.config.get(key) != run.config.get(key):
                raise BadInput(f"config differs: {key} is {first.config.get(key)} in {first.path.name} and "
                               f"{run.config.get(key)} in {run.path.name}; a record has one config")
    return {key: typed(value) for key, value in sorted(first.config.items()) if not FREE_KEYS.match(key)}


def same(runs: list[Run], what: str, value) -> object:
    """value(run), equal for all runs; BadInput names the two logs that disagree."""
    first = value(runs[0])
    for run in runs[1:]:
        if value(run) != first:
            raise BadInput(f"{what} differs: {first} in {runs[0].path.name} and {value(run)} in "
                           f"{run.path.name}; the seeds of a record share script, machine and data")
    return first


def sha256(text: str) -> str:
    """Hex sha256 of the text as UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def seed_result(run: Run) -> dict[str, object]:
    """The entry of one seed: losses in nats per token, bpb, times in ms, sizes in bytes and MiB."""
    steps, train_ms = run.count("final_score", "steps"), run.count("final_score", "train_time")
    return {
        "val_loss": run.number("final_score", "val_loss"), "val_bpb": run.number("final_score", "val_bpb"),
        "live_val_bpb": run.score("live"), "ema_val_bpb": run.score("ema"),
        "int6_val_bpb": run.score(f"{run.wire}_roundtrip_exact"),
        "steps": steps, "train_time_ms": train_ms, "step_avg_ms": round(train_ms / max(steps, 1), 2),
        "eval_time_ms": run.count("final_score", "eval_time"),
        "compile_ms": run.count("phase_times", "compile"),
        "peak_mib": run.sizes.get("peak"), "artifact_bytes": run.size("artifact"),
        "artifact_sha256": run.text("final_score", "sha256"),
        "report": {split: float(report["val_bpb"]) for split, report in sorted(run.reports.items())},
    }


def submission(runs: list[Run], meta: dict[str, object]) -> dict[str, object]:
    """submission.json from finished logs of distinct seeds and a given `meta`. BadInput names the log."""
    by_seed = {run.seed: run for run in sorted(runs, key=lambda run: run.seed)}
    if len(by_seed) < len(runs):
        twice = sorted(run.path.name for run in runs if sum(run.seed == other.seed for other in runs) > 1)
        raise BadInput(f"one seed, several logs: {', '.join(twice)}; every log needs its own seed")
    results = {str(seed): seed_result(run) for seed, run in by_seed.items()}

    def column(key: str) -> list[float]:
        return [result[key] for result in results.values()]

    def spread(key: str) -> float | None:
        value = stats.std(column(key))
        return None if value is None else round(value, 8)

    bytes_code = same(runs, "bytes_code", lambda run: run.count("final_score", "bytes_code"))
    stride = next((told["stride"] for told in runs[0].facts.values() if "stride" in told),
                  runs[0].config.get("eval_stride"))
    versions = {name: same(runs, f"{name} version", lambda run, name=name: run.versions[name])
                for name in ("torch", "cuda", "triton", "python")}
    keys = ("name", "author", "github_id", "date", "track", "record", "parent", "blurb")
    return {
        "schema": SCHEMA_VERSION, **{key: meta[key] for key in keys},
        "val_bpb": round(stats.mean(column("val_bpb")), 8), "val_bpb_std": spread("val_bpb"),
        "val_loss": round(stats.mean(column("val_loss")), 8), "val_loss_std": spread("val_loss"),
        "metric": same(runs, "metric", lambda run: run.text("final_score", "metric")),
        "eval_stride": int(stride) if stride else None,
        "seeds": list(by_seed), "seed_results": results,
        "bytes_code": bytes_code, "bytes_total": max(column("artifact_bytes")) + bytes_code,
        "artifact_bytes_mean": round(stats.mean(column("artifact_bytes")), 2),
        "artifact_bytes_max": max(column("artifact_bytes")),
        "hardware": same(runs, "hardware", lambda run: run.hardware),
        "pytorch_version": versions["torch"], "cuda_version": versions["cuda"],
        "triton_version": versions["triton"], "python_version": versions["python"],
        "train_gpt_sha256": same(runs, "source", lambda run: sha256(run.source)),
        "data_manifest_sha256": same(runs, "data manifest", lambda run: run.text("data", "manifest_sha256")),
        "tokenizer_sha256": same(runs, "tokenizer", lambda run: run.text("data", "tokenizer_sha256")),
        "val_tokens": same(runs, "val_tokens", lambda run: run.count("data", "val_tokens")),
        "val_bytes": same(runs, "val_bytes", lambda run: run.count("data", "val_bytes")),
    }


def bits_per_byte(val_loss: float, tokens: int, data_bytes: int) -> float:
    """Bits per byte of nats per token over `tokens` tokens that spell `data_bytes` bytes."""
    return val_loss / math.log(2) * tokens / max(data_bytes, 1)


# ---- a checker for the part of JSON Schema (draft 2020-12) that schema.json uses -----------------

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
KEYWORDS = {"$schema", "$id", "title", "description", "type", "enum", "const", "pattern", "minLength",
            "minimum", "exclusiveMinimum", "items", "minItems", "uniqueItems", "properties", "required",
            "minProperties", "additionalProperties", "propertyNames"}


def is_type(value: object, name: str) -> bool:
    """Whether a parsed JSON value is of the JSON type; true and false are no numbers."""
    if name in ("integer", "number"):
        good = int if name == "integer" else (int, float)
        return isinstance(value, good) and not isinstance(value, bool)
    return isinstance(value, TYPES[name])


def schema_errors(value: object, schema: dict, where: str = "submission") -> list[str]:
    """Every violation as `place: what is wrong`; ValueError when the schema uses a keyword not known here."""
    if unknown := set(schema) - KEYWORDS:
        raise ValueError(f"schema at {where} uses {sorted(unknown)}, which this checker does not know")
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    if names and not any(is_type(value, name) for name in names):
        return [f"{where}: {value!r} is not of type {' or '.join(names)}"]
    errors = []
    if "enum" in schema and value not in schema["enum"]:
        errors.append(f"{where}: {value!r} is none of {schema['enum']}")
    if "const" in schema and value != schema["const"]:
        errors.append(f"{where}: {value!r} is not {schema['const']!r}")
    if isinstance(value, str):
        if "pattern" in schema and not re.search(schema["pattern"], value):
            errors.append(f"{where}: {value!r} does not match {schema['pattern']}")
        if len(value) < schema.get("minLength", 0):
            errors.append(f"{where}: is empty")
    elif isinstance(value, list):
        errors += list_errors(value, schema, where)
    elif isinstance(value, dict):
        errors += object_errors(value, schema, where)
    elif is_type(value, "number"):
        if value < schema.get("minimum", -math.inf) or value <= schema.get("exclusiveMinimum", -math.inf):
            errors.append(f"{where}: {value} is too small")
    return errors


def list_errors(value: list, schema: dict, where: str) -> list[str]:
    """Violations of the keywords for arrays."""
    rule = schema.get("items", {})
    errors = [error for i, item in enumerate(value) for error in schema_errors(item, rule, f"{where}[{i}]")]
    if len(value) < schema.get("minItems", 0):
        errors.append(f"{where}: needs at least {schema['minItems']} items")
    if schema.get("uniqueItems") and any(item in value[:i] for i, item in enumerate(value)):
        errors.append(f"{where}: an item is there twice")
    return errors


def object_errors(value: dict, schema: dict, where: str) -> list[str]:
    """Violations of the keywords for objects."""
    properties, extra = schema.get("properties", {}), schema.get("additionalProperties", True)
    errors = [f"{where}: key {key!r} is missing" for key in schema.get("required", []) if key not in value]
    if len(value) < schema.get("minProperties", 0):
        errors.append(f"{where}: is empty")
    for key, item in value.items():
        errors += schema_errors(key, schema.get("propertyNames", {}), f"{where} key")
        if key in properties:
            errors += schema_errors(item, properties[key], f"{where}.{key}")
        elif extra is False:
            errors.append(f"{where}: key {key!r} is not in the schema")
        elif isinstance(extra, dict):
            errors += schema_errors(item, extra, f"{where}.{key}")
    return errors
