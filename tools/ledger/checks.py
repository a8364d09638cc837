"""A record folder: its files, all written from the logs, and the claims that `verify` proves about it."""
from __future__ import annotations

import ast
import io
import json
import math
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import cache, cached_property
from pathlib import Path

from ledger import stats
from ledger.runlog import (CAP_BYTES, FREE_KEYS, BadInput, Run, bits_per_byte, common_config, parse_log, read_text,
                    schema_errors, seed_result, sha256, submission)


@dataclass(frozen=True)
class Track:
    """Limits of a track. Seconds of None: not limited."""
    title: str
    train_s: float | None
    eval_s: float | None
    ranks: int | None                   # processes of a record, one GPU each
    device: str                         # what the device name of a record holds
    whole_split: bool                   # a record scores every validation token


TRACKS = {
    "track_10min_16mb": Track("8xH100, 600 s of training, 600 s of evaluation, 16,000,000 bytes",
                              600.0, 600.0, 8, "H100", True),
    "track_h100x1_5min": Track("one H100, 300 s of training, 16,000,000 bytes",
                               300.0, 600.0, 1, "H100", True),
    "track_cpu": Track("a laptop, no time limit, 16,000,000 bytes", None, None, None, "", False),
}
RECORD_SEEDS = 3
METRICS = {"sliding": "sliding_window", "ttt": "ttt"}       # end of a metric -> label of its line
FOLDER_NAME = re.compile(r"^(\d{4}-\d{2}-\d{2})_([A-Za-z0-9.]+)$")
NOTES = "<!-- notes: everything below is written by hand -->\n"
FILES = ("README.md", "submission.json", "train_gpt.py", "config.json", "requirements.txt", "artifact.sha256",
         "loss.png")


# ---- the script, asked from outside --------------------------------------------------------------

PROBE = """
import contextlib, dataclasses, importlib.util, io, json, os, sys
out, said = {}, io.StringIO()
try:
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        spec = importlib.util.spec_from_file_location("train_gpt", sys.argv[1])
        module = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    out["printed"], out["files"] = said.getvalue()[:80], os.listdir(".")
    with open(sys.argv[1], encoding="utf-8", newline="") as f:
        out["bytes_code"] = len(module.packed_code(f.read()))
    argv = ["preset=" + sys.argv[2]] if sys.argv[2] in module.PRESETS else []
    out["config"] = {k: str(v) for k, v in dataclasses.asdict(module.load_config(argv, {})).items()}
    out["preset"] = argv
except BaseException as e:
    out["error"] = f"{type(e).__name__}: {e}".splitlines()[0]
    out["missing"] = e.name if isinstance(e, ModuleNotFoundError) else None
print(json.dumps(out))
"""


@cache
def probe(source: str, preset: str) -> dict[str, object]:
    """What the script says when a clean process imports it: no environment, empty folder, this interpreter.

    Keys: bytes_code (length of packed_code), config (values of the preset, as text), preset (argv that
    selects it), printed and files (effects of the import), or error (one line) and missing (absent module).
    """
    with tempfile.TemporaryDirectory() as folder:
        script, empty = Path(folder, "train_gpt.py"), Path(folder, "empty")
        script.write_bytes(source.encode("utf-8"))
        empty.mkdir()
        command = [sys.executable, "-I", "-B", "-c", PROBE, str(script), preset]
        try:
            done = subprocess.run(command, cwd=empty, env={}, capture_output=True, text=True, timeout=180)
            return json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            return {"error": "importing it takes more than 180 s"}
        except (ValueError, IndexError):
            last = (done.stderr.splitlines() or ["no message"])[-1]
            return {"error": f"its import ended the interpreter: {last}"}


def overrides(run: Run, answer: dict) -> list[str]:
    """The key=value arguments by which this run departs from its preset, seed and output folder aside."""
    changed = [f"{key}={value}" for key, value in sorted(run.config.items())
               if not FREE_KEYS.match(key) and key != "preset" and answer["config"].get(key) != value]
    if run.config.get("data_path") != answer["config"].get("data_path"):
        changed.append("data_path=DIR")
    return answer["preset"] + changed


def command(run: Run, answer: dict, script: str, seed: int) -> list[str]:
    """The one command, from the repository's root, that runs this training again."""
    ranks = int(run.text("machine", "world_size"))
    launcher = ["python"] if ranks == 1 else ["torchrun", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, script, "train", *overrides(run, answer), f"seed={seed}"]


# ---- the files of a folder, from its logs --------------------------------------------------------

def seconds(ms: float) -> str:
    """Milliseconds as text in seconds, one digit."""
    return f"{ms / 1000:.1f}"


def learns(runs: list[Run]) -> bool:
    """Whether a run was scored with test-time training, too."""
    return any(run.score(f"{run.wire}_ttt_exact") is not None for run in runs)


def seed_table(runs: list[Run], sub: dict) -> list[str]:
    """Markdown rows: one per seed, then mean and sample std of each column."""
    splits = sorted({split for run in runs for split in run.reports})
    columns = {
        "val_bpb": (4, lambda r, e: e["val_bpb"]), "val_loss": (4, lambda r, e: e["val_loss"]),
        "live": (4, lambda r, e: e["live_val_bpb"]), "ema": (4, lambda r, e: e["ema_val_bpb"]),
        "int6 chunked": (4, lambda r, e: e["int6_val_bpb"]),
        "int6 sliding": (4, lambda r, e: r.score(f"{r.wire}_sliding_window_exact")),
        **({"int6 ttt": (4, lambda r, e: r.score(f"{r.wire}_ttt_exact"))} if learns(runs) else {}),
        **{split: (4, lambda r, e, split=split: e["report"].get(split)) for split in splits},
        "steps": (0, lambda r, e: e["steps"]), "step_avg ms": (2, lambda r, e: e["step_avg_ms"]),
        "artifact bytes": (0, lambda r, e: e["artifact_bytes"]),
        "total bytes": (0, lambda r, e: e["artifact_bytes"] + sub["bytes_code"]),
        "peak MiB": (0, lambda r, e: e["peak_mib"]), "compile s": (1, lambda r, e: e["compile_ms"] / 1000),
        "eval s": (1, lambda r, e: e["eval_time_ms"] / 1000),
    }
    values = {name: [get(run, sub["seed_results"][str(run.seed)]) for run in runs]
              for name, (_, get) in columns.items()}

    def row(head: str, pick) -> str:
        cells = []
        for name, (digits, _) in columns.items():
            value = pick(values[name])
            extra = 1 if head == "**std**" else 0
            cells.append("-" if value is None else f"{value:,.{digits + extra}f}")
        return f"| {head} | " + " | ".join(cells) + " |"

    def over_seeds(statistic):
        return lambda column: None if None in column else statistic(column)

    return [f"| seed | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns),
            *[row(str(run.seed), lambda column, i=i: column[i]) for i, run in enumerate(runs)],
            row("**mean**", over_seeds(stats.mean)),
            row("**std**", over_seeds(stats.std))]


def readme(runs: list[Run], sub: dict, answer: dict) -> str:
    """The generated part of the page, up to and with the notes marker."""
    spread = "" if sub["val_bpb_std"] is None else f" (std {sub['val_bpb_std']:.5f})"
    stride = "" if sub["eval_stride"] is None else f", stride {sub['eval_stride']}"
    folder = f"{sub['date']}_{sub['name']}"
    again = " ".join(command(runs[0], answer, "train_gpt.py", runs[0].seed))
    where, data = "", []
    if "data_path=DIR" in again:
        where = " --data DIR"
        data = [f"`DIR`: a data folder whose manifest.json has sha256 `{sub['data_manifest_sha256']}`.", ""]
    lines = [
        f"# {sub['name']}", "",
        f"**val_bpb {sub['val_bpb']:.4f}**{spread}, {sub['val_loss']:.4f} nats per token, {len(runs)} "
        f"seed{'s' * (len(runs) > 1)}, metric `{sub['metric']}`{stride}; "
        f"{sub['bytes_total']:,} of {CAP_BYTES:,} bytes.", "",
        *([sub["blurb"], ""] if sub["blurb"] else []),
        "| | |", "|---|---|",
        f"| track | {sub['track']}: {TRACKS[sub['track']].title}{'' if sub['record'] else ' (non-record)'} |",
        f"| parent | {sub['parent'] or 'none'} |",
        f"| hardware | {sub['hardware']} |",
        f"| software | Python {sub['python_version']}, PyTorch {sub['pytorch_version']}, "
        f"CUDA {sub['cuda_version']}, Triton {sub['triton_version']} |",
        f"| data | {sub['val_tokens']:,} validation tokens, {sub['val_bytes']:,} bytes; manifest sha256 "
        f"`{sub['data_manifest_sha256']}` |",
        f"| code | {sub['bytes_code']:,} bytes packed; train_gpt.py sha256 `{sub['train_gpt_sha256']}` |", "",
        *seed_table(runs, sub), "",
        "live, ema, int6 chunked and int6 sliding are bpb of the training weights, of their average, and of",
        "the artifact read back from disk. Total bytes are the artifact and the packed code.",
        *(["int6 ttt is sliding, too, by weights that learn from each chunk of tokens once it is scored."]
          if learns(runs) else []), "",
        "Again, from a copy of this folder anywhere:", "",
        "```", "pip install -r requirements.txt", again, "```", "", *data,
        "In the repository, compared with the figures above:", "",
        "```", f"./run.sh record reproduce {sub['track']}/{folder}{where}", "```", "",
        "![loss curves](loss.png)", "", NOTES]
    return "\n".join(lines)


def uses_flash4(run: Run) -> bool:
    """Whether its log names FlashAttention-4, a package that torch does not bring."""
    return run.text("machine", "attention").startswith("flash4")


def requirements(run: Run, pins: list[str]) -> str:
    """Versions as the log says; a local label such as +cu130 is a comment, because no index serves it."""
    torch, _, build = run.versions["torch"].partition("+")
    triton = run.versions["triton"]
    lines = [f"# Python {run.versions['python']}, CUDA {run.versions['cuda']}",
             f"torch=={torch}" + (f"  # the build was +{build}" if build else "")]
    return "\n".join(lines + ([f"triton=={triton}"] if triton != "none" else []) + pins) + "\n"


def contents(runs: list[Run], meta: dict, answer: dict) -> dict[str, str]:
    """Text of every generated file but requirements.txt and the picture. BadInput when the logs disagree."""
    runs = sorted(runs, key=lambda run: run.seed)
    sub = submission(runs, meta)
    return {
        "submission.json": json.dumps(sub, indent=2) + "\n",
        "README.md": readme(runs, sub, answer) if "error" not in answer else "",
        "config.json": json.dumps(common_config(runs), indent=2) + "\n",
        "train_gpt.py": runs[0].source,
        "artifact.sha256": "".join(f"{run.text('final_score', 'sha256')}  seed{run.seed}\n" for run in runs),
        **{f"logs/seed{run.seed}.txt": read_text(run.path) for run in runs},
    }


# ---- claims --------------------------------------------------------------------------------------

class Wrong(Exception):
    """The claim does not hold; the message is the evidence."""


class NotCheckable(Exception):
    """Nothing can be said here; the message says what is missing."""


def finished_run(path: Path) -> Run:
    """The run of a log that has every figure a record needs; BadInput names the first one missing."""
    run = parse_log(path)
    seed_result(run), run.seed, run.count("final_score", "bytes_total"), run.hardware
    return run


class LogFolder:
    """What every folder with logs and a script has, whatever its layout. Mixed into classes with these fields."""
    folder: Path
    log_errors: list[str]
    all_runs: list[Run]         # logs that parse and are finished; the others are in log_errors

    def finished(self, paths: list[Path], read: Callable[[Path], Run]) -> list[Run]:
        """The runs that `read` accepts, by seed; what it says of the others goes to log_errors."""
        runs = []
        for path in paths:
            try:
                runs.append(read(path))
            except BadInput as error:
                self.log_errors.append(str(error).replace(f"{self.folder}/", ""))
        return sorted(runs, key=lambda run: run.seed)

    @property
    def runs(self) -> list[Run]:
        """Every log, when all of them are finished."""
        if not self.all_runs or self.log_errors:
            raise NotCheckable("a log is missing or cannot be read")
        return self.all_runs

    @cached_property
    def source(self) -> str:
        try:
            return read_text(self.folder / "train_gpt.py")
        except BadInput:
            raise NotCheckable("train_gpt.py cannot be read") from None


@dataclass
class Case(LogFolder):
    """One folder under examination. Properties raise NotCheckable where an earlier claim already failed."""
    folder: Path
    records: Path                       # the ledger's records/, where parents live
    log_errors: list[str] = field(default_factory=list)
    disagreement: str = ""              # why the logs are not those of one record

    @cached_property
    def stored(self) -> dict:
        """submission.json, or NotCheckable."""
        try:
            sub = json.loads(read_text(self.folder / "submission.json"))
        except (BadInput, ValueError, RecursionError):
            raise NotCheckable("submission.json cannot be read") from None
        if not isinstance(sub, dict) or schema_errors(sub, schema()):
            raise NotCheckable("submission.json breaks the schema")
        return sub

    @cached_property
    def all_runs(self) -> list[Run]:
        return self.finished(sorted((self.folder / "logs").glob("*")), finished_run)

    @cached_property
    def answer(self) -> dict:
        preset = self.runs[0].preset if self.all_runs and not self.log_errors else ""
        return probe(self.source, preset)

    @cached_property
    def expected(self) -> dict[str, str]:
        """The folder as `new` would write it today; NotCheckable when its logs disagree."""
        try:
            return contents(self.runs, self.stored, self.answer)
        except BadInput as error:
            self.disagreement = str(error)
            raise NotCheckable(str(error)) from None

    @property
    def track(self) -> Track:
        return TRACKS[self.stored["track"]]

    def file(self, name: str) -> str:
        """Text of a file of the folder; Wrong when it cannot be read."""
        try:
            return read_text(self.folder / name)
        except BadInput:
            raise Wrong(f"{name} cannot be read") from None


@cache
def schema() -> dict:
    """schema.json beside this file."""
    return json.loads(read_text(Path(__file__).resolve().parent / "schema.json"))


def demand(holds: bool, evidence: str) -> None:
    """Raises Wrong with the evidence unless the condition holds."""
    if not holds:
        raise Wrong(evidence)


def claim_schema(case: Case) -> str:
    """submission.json has the keys and types of schema.json, no more and no fewer."""
    text = case.file("submission.json")
    try:
        sub = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Wrong(f"submission.json is not JSON: {error}") from None
    errors = schema_errors(sub, schema())
    demand(not errors, "; ".join(errors[:3]))
    return f"{len(sub)} keys follow records/schema.json"


def claim_name(case: Case) -> str:
    """The folder is <track>/<date>_<name> as submission.json says."""
    match = FOLDER_NAME.match(case.folder.name)
    demand(match is not None, f"{case.folder.name} is not YYYY-MM-DD_Name of letters, digits and dots")
    try:
        date.fromisoformat(match[1])
    except ValueError:
        raise Wrong(f"{match[1]} is no date") from None
    told = (case.stored["track"], case.stored["date"], case.stored["name"])
    there = (case.folder.parent.name, match[1], match[2])
    demand(told == there, f"folder says {'/'.join(there)}, submission.json says {'/'.join(told)}")
    return f"{case.folder.parent.name}/{case.folder.name}"


def claim_files(case: Case) -> str:
    """Every file is there, one log per seed, and no code beside train_gpt.py."""
    missing = [name for name in FILES if not (case.folder / name).is_file()]
    demand(not missing, f"missing: {', '.join(missing)}")
    logs = sorted(path.name for path in (case.folder / "logs").glob("*"))
    wanted = sorted(f"seed{seed}.txt" for seed in case.stored["seeds"])
    demand(logs == wanted, f"logs/ holds {', '.join(logs) or 'nothing'}; the seeds need {', '.join(wanted)}")
    others = sorted(str(path.relative_to(case.folder)) for path in case.folder.rglob("*.py"))
    demand(others == ["train_gpt.py"], f"code outside train_gpt.py is not counted: {', '.join(others)}")
    return f"{len(FILES)} files and {len(logs)} logs"


def claim_logs(case: Case) -> str:
    """Every log is finished: final_score once, and nothing after it."""
    runs = case.all_runs
    demand(not case.log_errors, "; ".join(case.log_errors))
    demand(bool(runs), "no logs")
    for run in runs:
        name = run.path.name
        demand(run.final_scores == 1, f"{name}: {run.final_scores} final_score lines, one is allowed")
        demand(not run.trailing, f"{name}: final_score is not the last line: {run.trailing[:60]!r} follows")
    return f"{len(runs)} logs, final_score once and last in each"


def claim_source(case: Case) -> str:
    """train_gpt.py is the source at the head of every log."""
    want = sha256(case.file("train_gpt.py"))
    other = [run.path.name for run in case.runs if sha256(run.source) != want]
    demand(not other, f"train_gpt.py is not the source at the head of {', '.join(other)}")
    demand(case.stored["train_gpt_sha256"] == want, "train_gpt_sha256 is not the hash of train_gpt.py")
    return f"sha256 {want[:16]} in train_gpt.py and {len(case.runs)} logs"


def first_difference(a: object, b: object, where: str = "") -> str | None:
    """`key: a, b` where two JSON values first disagree; figures agree to 2e-8 (logs have 8 digits)."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(set(a) | set(b)):
            if key not in a or key not in b:
                return f"{where}{key} is on one side only"
            if found := first_difference(a[key], b[key], f"{where}{key}."):
                return found
        return None
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b))
    equal = abs(a - b) <= 2e-8 if numbers else a == b
    return None if equal else f"{where.rstrip('.')}: {a!r} in the file, {b!r} from the logs"


def claim_numbers(case: Case) -> str:
    """Every figure of submission.json follows from the logs."""
    try:
        want = json.loads(case.expected["submission.json"])
    except NotCheckable:
        demand(not case.disagreement, case.disagreement)
        raise
    found = first_difference(case.stored, want)
    demand(found is None, f"submission.json {found}")
    return f"val_bpb {want['val_bpb']:.8f} and every other figure recomputed from the logs"


def claim_config(case: Case) -> str:
    """All logs resolved one config, and config.json is it."""
    try:
        want = common_config(case.runs)
    except BadInput as error:
        raise Wrong(str(error)) from None
    try:
        found = first_difference(json.loads(case.file("config.json")), want)
    except ValueError as error:
        raise Wrong(f"config.json is not JSON: {error}") from None
    demand(found is None, f"config.json {found}")
    return f"{len(want)} values equal in config.json and all logs"


def claim_seeds(case: Case) -> str:
    """One log per seed, named after it; enough of them for a record."""
    seeds = [run.seed for run in case.runs]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    demand(not twice, f"seed {', '.join(map(str, twice))} is in more than one log")
    for run in case.runs:
        told = {run.path.stem, f"seed{run.config.get('seed')}", f"seed{run.seed}"}
        demand(len(told) == 1, f"file name, config and final_score of a log say {', '.join(sorted(told))}")
    demand(len(seeds) >= RECORD_SEEDS or not case.stored["record"],
           f"{len(seeds)} seeds, a record needs {RECORD_SEEDS}: add logs or make it a non-record")
    return f"{len(seeds)} distinct: {', '.join(map(str, seeds))}"


def claim_bytes(case: Case) -> str:
    """Artifact + packed code is at most the cap, for the worst seed."""
    worst = 0
    for run in case.runs:
        artifact, code = run.size("artifact"), run.count("final_score", "bytes_code")
        total = run.count("final_score", "bytes_total")
        demand(total == artifact + code,
               f"seed {run.seed}: bytes_total {total} is not artifact {artifact} + code {code}")
        demand(run.sizes.get("total", total) == total and run.sizes.get("code", code) == code,
               f"seed {run.seed}: final_score and the size lines before it disagree")
        demand(not run.over_cap, f"seed {run.seed}: the log says 'artifact over the cap'")
        worst = max(worst, total)
    demand(worst <= CAP_BYTES, f"{worst:,} bytes are {worst - CAP_BYTES:,} over the cap of {CAP_BYTES:,}")
    return f"worst seed {worst:,} of {CAP_BYTES:,} bytes, {CAP_BYTES - worst:,} to spare"


def claim_artifacts(case: Case) -> str:
    """artifact.sha256 holds the hashes that the logs end with."""
    demand(case.file("artifact.sha256") == case.expected["artifact.sha256"],
           "artifact.sha256 does not hold the hashes of the final_score lines")
    return f"{len(case.runs)} artifact hashes as the logs print them"


def asked(case: Case) -> dict:
    """The probe's answer; Wrong when the import fails, NotCheckable when torch or numpy is not installed."""
    answer = case.answer
    if answer.get("missing") in ("torch", "numpy"):
        raise NotCheckable(f"{answer['missing']} is not installed for {Path(sys.executable).name}")
    demand("error" not in answer, f"train_gpt.py: {answer.get('error')}")
    return answer


def claim_code(case: Case) -> str:
    """The packed code has the size that the logs count."""
    counted = asked(case)["bytes_code"]
    told = sorted({run.count("final_score", "bytes_code") for run in case.runs})
    demand(told == [counted],
           f"packed_code(train_gpt.py) has {counted} bytes, the logs say {', '.join(map(str, told))}")
    return f"packed_code(train_gpt.py) has {counted:,} bytes, counted again"


def claim_import(case: Case) -> str:
    """The script imports in an empty environment, and the import does nothing."""
    answer = asked(case)
    demand(not answer["printed"], f"importing train_gpt.py prints {answer['printed']!r}")
    demand(not answer["files"], f"importing train_gpt.py writes {', '.join(answer['files'])}")
    return f"imports without effects under Python {sys.version.split()[0]}, empty environment"


def newer_fstrings(source: str) -> str | None:
    """Where an f-string needs Python 3.12 (PEP 701). Older interpreters refuse those by themselves."""
    if sys.version_info < (3, 12):
        return None
    stack: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if stack and kind in ("STRING", "FSTRING_START", "COMMENT", "NL", "NEWLINE"):
            inner = token.string
            multiline = kind in ("NL", "NEWLINE") and len(stack[-1]) == 1
            if kind == "COMMENT" or multiline or "\\" in inner or any(quote in inner for quote in stack):
                return f"line {token.start[0]}: an f-string of Python 3.12 (own quotes or a backslash inside)"
        if kind == "FSTRING_START":
            stack.append(token.string.lstrip("rRfFbBuU"))
        elif kind == "FSTRING_END":
            stack.pop()
    return None


def claim_syntax(case: Case) -> str:
    """The script is Python 3.10."""
    try:
        ast.parse(case.source, feature_version=(3, 10))
        found = newer_fstrings(case.source)
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError, MemoryError) as error:
        found = f"line {getattr(error, 'lineno', '?')}: {getattr(error, 'msg', error)}"
    demand(found is None, f"train_gpt.py is not Python 3.10: {found}")
    return "train_gpt.py parses as Python 3.10"


def claim_clock(case: Case) -> str:
    """Training with calibration, and evaluation with decompression, keep the limits of the track.

    One step of overshoot is allowed: a clock that is read after each step cannot stop earlier.
    """
    track, strict, evidence = case.track, case.stored["record"], []
    for run in case.runs:
        train, calibrate, evaluate, decompress = (run.number("phase_times", key) for key in (
            "train", "calibrate", "eval", "decompress"))
        average = run.number("final_score", "train_time") / max(run.count("final_score", "steps"), 1)
        score_ms = max(evaluate, run.number("final_score", "eval_time")) + decompress
        told = f"seed {run.seed}: train {seconds(train)} + calibrate {seconds(calibrate)} s"
        told += f", resumed {len(run.resumed)} times" if run.resumed else ""
        if strict and track.train_s is not None:
            demand(not run.resumed, f"{told}: the clock does not count what was lost; a record runs through")
            over = train + calibrate - 1000 * track.train_s
            demand(over <= average,
                   f"{told} is {seconds(over)} s over {track.train_s:g} s, more than one step")
            told += f" of {track.train_s:g}"
            told += f" (over by {over:.0f} ms, within one step of {average:.0f} ms)" if over > 0 else ""
        told += f", eval + decompress {seconds(score_ms)} s"
        if strict and track.eval_s is not None:
            demand(score_ms <= 1000 * track.eval_s, f"{told} is over {track.eval_s:g} s")
            told += f" of {track.eval_s:g}"
        evidence.append(told)
    compiled = ", ".join(seconds(run.number("phase_times", "compile")) for run in case.runs)
    limits = "" if strict and track.train_s is not None else "no limit applies; "
    return f"{limits}{'; '.join(evidence)}; off the clock: compile {compiled} s"


def steps_fault(run: Run) -> str | None:
    """What does not fit together in the step lines of one log."""
    steps, train_ms = run.count("final_score", "steps"), run.count("final_score", "train_time")
    if not run.steps or run.malformed:
        return f"cannot be read: {run.malformed[0][:60]!r}" if run.malformed else "no step lines"
    for before, after in zip(run.steps, run.steps[1:]):
        if after.step < before.step or after.time_ms < before.time_ms or after.total != before.total:
            return (f"step:{after.step}/{after.total} at {after.time_ms} ms follows "
                    f"step:{before.step}/{before.total} at {before.time_ms} ms")
    for kind in ("train", "val"):
        numbers = [line.step for line in run.steps if line.kind == kind]
        if len(set(numbers)) < len(numbers):
            return f"a step has two {kind}_loss lines"
    for line in run.steps:
        if abs(line.step_avg_ms - line.time_ms / max(line.step, 1)) > 0.006 + 0.5 / max(line.step, 1):
            return f"step:{line.step} step_avg:{line.step_avg_ms}ms is not {line.time_ms} ms / {line.step}"
    last = run.steps[-1]
    if (last.step, last.time_ms) != (steps, train_ms):
        return (f"final_score says {steps} steps in {train_ms} ms, "
                f"the last step line {last.step} in {last.time_ms} ms")
    stop = {"step": f"{steps}/{last.total}", "train_time": f"{train_ms}ms"}
    if run.stopped and any(run.stopped.get(key) != value for key, value in stop.items()):
        return "stopping_early and final_score disagree"
    if not run.stopped and steps != last.total:
        return f"{steps} of {last.total} steps, and no stopping_early line says why"
    if abs(run.number("phase_times", "train") - train_ms) > 1:
        return f"phase_times train:{run.text('phase_times', 'train')} is not train_time:{train_ms}ms"
    return None


def claim_steps(case: Case) -> str:
    """Step lines run forward and agree with final_score."""
    for run in case.runs:
        fault = steps_fault(run)
        demand(fault is None, f"seed {run.seed}: {fault}")
    last = {run.seed: run.steps[-1] for run in case.runs}
    return "; ".join(f"seed {seed}: {end.step} steps of {end.step_avg_ms} ms" for seed, end in last.items())


def claim_score(case: Case) -> str:
    """final_score repeats the score of the artifact as read back, over the whole split."""
    for run in case.runs:
        metric = run.text("final_score", "metric")
        kind = METRICS.get(metric.rpartition("_")[2], "roundtrip")
        line = f"final_{run.wire}_{kind}_exact"
        for key in ("val_loss", "val_bpb"):
            demand(run.has(line, key), f"seed {run.seed}: no {line} line for metric {metric}")
            final, exact = run.text("final_score", key), run.text(line, key)
            demand(final == exact, f"seed {run.seed}: final_score {key}:{final}, {line} {key}:{exact}")
        part = run.config.get("val_tokens", "0")
        demand(part in ("0", "None") or not (case.stored["record"] and case.track.whole_split),
               f"seed {run.seed}: val_tokens={part} scores a part of the split; a record scores all of it")
    return f"final_score repeats the {metric} score of the artifact that was read back"


def claim_ratio(case: Case) -> str:
    """Bits per byte follow from nats per token, tokens and bytes, to one part in a million."""
    worst = 0.0
    for run in case.runs:
        tokens, data_bytes = run.count("data", "val_tokens"), run.count("data", "val_bytes")
        for line in run.facts:
            if line == "final_score" or line.endswith("_exact"):
                want = bits_per_byte(run.number(line, "val_loss"), tokens, data_bytes)
                got = run.number(line, "val_bpb")
                worst = max(worst, abs(got / want - 1) if want else math.inf)
                demand(worst <= 1e-6, f"seed {run.seed}: {line} val_bpb:{got} but its val_loss over "
                                      f"{tokens} tokens and {data_bytes} bytes gives {want:.8f}")
    return f"bpb = loss / ln 2 * {tokens} tokens / {data_bytes} bytes, to {worst:.0e}"


def claim_hardware(case: Case) -> str:
    """A record ran on the hardware of its track."""
    track, run = case.track, case.runs[0]
    if not case.stored["record"]:
        return f"{run.hardware}: a non-record may use any"
    ranks, device = run.count("machine", "world_size"), run.text("machine", "device")
    demand(track.ranks in (None, ranks) and track.device in device,
           f"{run.hardware}; a record of {case.stored['track']} needs {track.ranks} x {track.device}")
    return run.hardware


def claim_requirements(case: Case) -> str:
    """requirements.txt names the versions that ran."""
    want = requirements(case.runs[0], []).splitlines()
    lines = case.file("requirements.txt").splitlines()
    lost = [line for line in want if line not in lines]
    demand(not lost, f"requirements.txt lacks {lost[0]!r}, which the logs show" if lost else "")
    demand(not uses_flash4(case.runs[0]) or any(line.startswith("flash-attn-4") for line in lines),
           "requirements.txt lacks flash-attn-4: the logs show attention:flash4")
    return f"{', '.join(line.split('  #')[0] for line in want[1:])} as the logs show"


def claim_readme(case: Case) -> str:
    """The page above the notes line is the one the logs give."""
    text = case.file("README.md")
    demand(NOTES in text, f"README.md lacks the line {NOTES.strip()}")
    asked(case)
    told = text[:text.index(NOTES)].splitlines()
    want = case.expected["README.md"].splitlines()[:-1]
    for number, (a, b) in enumerate(zip(told + [""] * len(want), want + [""] * len(told)), 1):
        demand(a == b, f"README.md line {number} is {a[:60]!r}, the logs give {b[:60]!r}")
        if number >= max(len(told), len(want)):
            break
    return f"{len(want)} lines regenerated"


def claim_parent(case: Case) -> str:
    """The parent is a folder of this ledger; the evidence says what was gained on it."""
    parent = case.stored["parent"]
    if parent is None:
        return "none named"
    folder = case.records / parent
    demand(parent != f"{case.folder.parent.name}/{case.folder.name}", "a folder cannot be its own parent")
    demand((folder / "submission.json").is_file(), f"records/{parent} does not exist")
    try:
        results = json.loads(read_text(folder / "submission.json"))["seed_results"]
        old = [entry["val_loss"] for entry in results.values()]
    except (BadInput, ValueError, KeyError, TypeError, AttributeError):
        raise Wrong(f"records/{parent}/submission.json cannot be read") from None
    gap = stats.welch(old, [entry["val_loss"] for entry in case.stored["seed_results"].values()])
    return f"{parent}" + (f": {gap.diff:+.4f} nats, p {gap.p_less():.2g} that it is no better" if gap else "")


CLAIMS = {fn.__name__.removeprefix("claim_"): fn for fn in (
    claim_schema, claim_name, claim_files, claim_logs, claim_source, claim_numbers, claim_config,
    claim_seeds, claim_bytes, claim_artifacts, claim_code, claim_import, claim_syntax, claim_clock,
    claim_steps, claim_score, claim_ratio, claim_hardware, claim_requirements, claim_readme, claim_parent)}


def examine(folder: Path, records: Path) -> list[tuple[str, str, str]]:
    """(ok | fail | not checkable, claim, evidence) for every claim about the folder."""
    return results(Case(folder, records), CLAIMS)


def results(case, claims: dict[str, Callable]) -> list[tuple[str, str, str]]:
    """The same for any case that has a folder, and its own claims."""
    out = []
    for name, claim in claims.items():
        try:
            out.append(("ok", name, claim(case)))
        except Wrong as wrong:
            out.append(("fail", name, str(wrong)))
        except NotCheckable as reason:
            out.append(("not checkable", name, str(reason)))
        except BadInput as error:
            out.append(("fail", name, str(error).replace(f"{case.folder}/", "")))
    return out
