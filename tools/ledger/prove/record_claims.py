"""Proves the claims of a record folder. record_folder.py makes it."""

from __future__ import annotations

import ast
import io
import json
import sys
import tokenize
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ledger import stats
from ledger.files import read_json, read_text, sha256
from ledger.folders import is_date
from ledger.make.race_page import race_result
from ledger.make.record_folder import FOLDER_NAME, NOTES, contents, form_of, requirements, uses_flash4
from ledger.make.submission import common_config, seed_result
from ledger.prove import log_claims
from ledger.prove.claims import (
    LogFolder,
    NotCheckable,
    Wrong,
    demand,
    demand_files,
    demand_same_lines,
    first_difference,
    other_code,
)
from ledger.races import is_race
from ledger.read.probe import probe_script
from ledger.read.runlog import RunLog, parse_log
from ledger.read.schema import schema_errors, schema_name, submission_schema
from ledger.tracks import CAP_BYTES, RECORD_SEEDS, TRACKS, Track
from script import BadInput


def finished_run(path: Path) -> RunLog:
    """Return the run of a log with every figure a record needs. Raises BadInput naming the first missing."""
    run = parse_log(path)
    if is_race(run):
        race_result(run)
    else:
        seed_result(run)
        run.count("final_score", "bytes_total")
    run.count("final_score", "seed")
    for key in ("world_size", "device"):
        run.text("machine", key)
    return run


@dataclass
class RecordCase(LogFolder):
    """A record folder under examination."""

    records: Path  # the ledger's records/, where parents live
    disagreement: str | None = field(default=None, init=False)  # why the logs are not those of one record

    def log_paths(self) -> list[Path]:
        return sorted((self.folder / "logs").glob("*"))

    def read_log(self, path: Path) -> RunLog:
        return finished_run(path)

    @cached_property
    def stored(self) -> dict:
        """submission.json, which follows the schema."""
        try:
            sub = read_json(self.folder / "submission.json")
        except BadInput:
            raise NotCheckable("submission.json cannot be read") from None
        if not isinstance(sub, dict) or schema_errors(sub, submission_schema(self.folder.parent.name)):
            raise NotCheckable("submission.json breaks the schema")
        return sub

    @cached_property
    def answer(self) -> dict:
        """The script's answer to the probe."""
        complete = self.readable_runs and not self.log_errors
        preset = self.runs[0].preset if complete else ""
        return probe_script(self.source, preset)

    def importable_answer(self) -> dict:
        """Return the answer of a script that imports, or raise Wrong.

        Raises NotCheckable if torch or numpy is not installed.
        """
        missing = self.answer.get("missing")
        if missing in ("torch", "numpy"):
            raise NotCheckable(f"{missing} is not installed for {Path(sys.executable).name}")
        demand("error" not in self.answer, f"train_gpt.py: {self.answer.get('error')}")
        return self.answer

    @cached_property
    def expected(self) -> dict[str, str]:
        """The files as `new` would write them today."""
        try:
            return contents(self.runs, self.stored, self.answer)
        except BadInput as error:
            self.disagreement = str(error)
            raise NotCheckable(str(error)) from None

    @property
    def track(self) -> Track:
        """The track that submission.json names."""
        return TRACKS[self.stored["track"]]


def seconds(ms: float) -> str:
    """Return milliseconds as text in seconds, with one digit."""
    return f"{ms / 1000:.1f}"


# ---- the folder and its files --------------------------------------------------------------------


def claim_schema(case: RecordCase) -> str:
    """submission.json has the keys and types of schema.json, no more and no fewer."""
    sub = read_json(case.folder / "submission.json")
    track = case.folder.parent.name
    errors = schema_errors(sub, submission_schema(track))
    demand(not errors, "; ".join(errors[:3]))
    return f"{len(sub)} keys follow records/{schema_name(track)}"


def claim_name(case: RecordCase) -> str:
    """The folder is <track>/<date>_<name> as submission.json says."""
    match = FOLDER_NAME.match(case.folder.name)
    demand(match is not None, f"{case.folder.name} is not YYYY-MM-DD_Name of letters, digits and dots")
    demand(is_date(match[1]), f"{match[1]} is not a day of this century")

    stored = (case.stored["track"], case.stored["date"], case.stored["name"])
    found = (case.folder.parent.name, match[1], match[2])
    demand(stored == found, f"folder says {'/'.join(found)}, submission.json says {'/'.join(stored)}")
    return f"{case.folder.parent.name}/{case.folder.name}"


def claim_files(case: RecordCase) -> str:
    """Every file is there, one log per seed, and no code besides train_gpt.py."""
    files = form_of(case.folder.parent.name).files
    demand_files(case.folder, files)
    logs = sorted(path.name for path in (case.folder / "logs").glob("*"))
    wanted = sorted(f"seed{seed}.txt" for seed in case.stored["seeds"])
    demand(logs == wanted, f"logs/ holds {', '.join(logs) or 'nothing'}; the seeds need {', '.join(wanted)}")

    others = other_code(case.folder)
    demand(not others, f"code outside train_gpt.py is not counted: {', '.join(others)}")
    return f"{len(files)} files and {len(logs)} logs"


def claim_logs(case: RecordCase) -> str:
    """Every log is finished: final_score once, and nothing after it."""
    runs = case.readable_runs
    demand(not case.log_errors, "; ".join(case.log_errors))
    demand(bool(runs), "no logs")
    for run in runs:
        name = run.path.name
        demand(run.final_scores == 1, f"{name}: {run.final_scores} final_score lines, one is allowed")
        demand(not run.trailing, f"{name}: final_score is not the last line: {run.trailing[:60]!r} follows")

    evidence = f"{len(runs)} logs, final_score once and last in each"
    if not has_log_hashes(case.stored):
        return f"{evidence}; made without hashes of the logs: their curves are not covered"
    for run in runs:
        stored = case.stored["seed_results"].get(str(run.seed), {}).get("log_sha256")
        found = sha256(read_text(run.path))
        demand(stored == found, f"{run.path.name}: not the log of this record, its log_sha256 differs")
    return f"{evidence}; every line as hashed in submission.json"


def has_log_hashes(stored: dict) -> bool:
    """Return whether a submission.json holds hashes of its logs; older records do not."""
    return any("log_sha256" in result for result in stored["seed_results"].values())


def claim_source(case: RecordCase) -> str:
    """train_gpt.py is the source at the head of every log."""
    want = sha256(case.file("train_gpt.py"))
    others = [run.path.name for run in case.runs if sha256(run.source) != want]
    demand(not others, f"train_gpt.py is not the source at the head of {', '.join(others)}")
    demand(case.stored["train_gpt_sha256"] == want, "train_gpt_sha256 is not the hash of train_gpt.py")
    return f"sha256 {want[:16]} in train_gpt.py and {len(case.runs)} logs"


def claim_numbers(case: RecordCase) -> str:
    """Every figure of submission.json follows from the logs."""
    try:
        want = json.loads(case.expected["submission.json"])
    except NotCheckable:
        demand(case.disagreement is None, case.disagreement)
        raise
    if not has_log_hashes(case.stored):
        for result in want["seed_results"].values():
            del result["log_sha256"]
    found = first_difference(case.stored, want)
    demand(found is None, f"submission.json {found}")
    return f"val_bpb {want['val_bpb']:.8f} and every other figure recomputed from the logs"


def claim_config(case: RecordCase) -> str:
    """config.json holds the config that all logs share."""
    want = common_config(case.runs)
    found = first_difference(read_json(case.folder / "config.json"), want)
    demand(found is None, f"config.json {found}")
    return f"{len(want)} values equal in config.json and all logs"


def claim_seeds(case: RecordCase) -> str:
    """Each log is named after its own seed, and a record has enough of them."""
    seeds = [run.seed for run in case.runs]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    demand(not twice, f"seed {', '.join(map(str, twice))} is in more than one log")

    for run in case.runs:
        names = {run.path.stem, f"seed{run.config.get('seed')}", f"seed{run.seed}"}
        demand(len(names) == 1, f"file name, config and final_score of a log say {', '.join(sorted(names))}")
    least = case.track.target.runs if case.track.target else RECORD_SEEDS
    demand(
        len(seeds) >= least or not case.stored["record"],
        f"{len(seeds)} seeds, a record needs {least}: add logs or make it a non-record",
    )
    return f"{len(seeds)} distinct: {', '.join(map(str, seeds))}"


def claim_bytes(case: RecordCase) -> str:
    """Artifact + packed code is at most the cap, for the worst seed."""
    worst = 0
    for run in case.runs:
        artifact = run.size("artifact")
        code = run.count("final_score", "bytes_code")
        total = run.count("final_score", "bytes_total")
        demand(
            total == artifact + code,
            f"seed {run.seed}: bytes_total {total} is not artifact {artifact} + code {code}",
        )
        demand(
            run.sizes.get("total", total) == total and run.sizes.get("code", code) == code,
            f"seed {run.seed}: final_score and the size lines before it disagree",
        )
        demand(not run.over_cap, f"seed {run.seed}: the log says 'artifact over the cap'")
        worst = max(worst, total)
    demand(worst <= CAP_BYTES, f"{worst:,} bytes are {worst - CAP_BYTES:,} over the cap of {CAP_BYTES:,}")
    return f"worst seed {worst:,} of {CAP_BYTES:,} bytes, {CAP_BYTES - worst:,} to spare"


def claim_artifacts(case: RecordCase) -> str:
    """artifact.sha256 holds the hashes that the logs end with."""
    demand(
        case.file("artifact.sha256") == case.expected["artifact.sha256"],
        "artifact.sha256 does not hold the hashes of the final_score lines",
    )
    return f"{len(case.runs)} artifact hashes as the logs print them"


# ---- the script ----------------------------------------------------------------------------------


def claim_code(case: RecordCase) -> str:
    """The packed code has the size that the logs count."""
    counted = case.importable_answer()["bytes_code"]
    logged = sorted({run.count("final_score", "bytes_code") for run in case.runs})
    demand(
        logged == [counted],
        f"packed_code(train_gpt.py) has {counted} bytes, the logs say {', '.join(map(str, logged))}",
    )
    return f"packed_code(train_gpt.py) has {counted:,} bytes, counted again"


def claim_import(case: RecordCase) -> str:
    """The script imports in an empty environment, and the import has no effect."""
    answer = case.importable_answer()
    demand(not answer["printed"], f"importing train_gpt.py prints {answer['printed']!r}")
    demand(not answer["files"], f"importing train_gpt.py writes {', '.join(answer['files'])}")
    return f"imports without effects under Python {sys.version.split()[0]}, empty environment"


def newer_fstring(source: str) -> str | None:
    """Return where an f-string needs Python 3.12 (PEP 701), or None.

    Older interpreters refuse those by themselves, so that under them the answer is None.
    """
    if sys.version_info < (3, 12):
        return None

    quotes: list[str] = []  # quotes of the f-strings that are open, the innermost last
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if quotes and needs_312(kind, token.string, quotes):
            return f"line {token.start[0]}: an f-string of Python 3.12 (own quotes or a backslash inside)"
        if kind == "FSTRING_START":
            quotes.append(token.string.lstrip("rRfFbBuU"))
        elif kind == "FSTRING_END":
            quotes.pop()
    return None


def needs_312(kind: str, text: str, quotes: list[str]) -> bool:
    """Return whether a token inside f-strings with these quotes was an error before Python 3.12."""
    if kind == "COMMENT":
        return True
    if kind in ("NL", "NEWLINE"):
        return len(quotes[-1]) == 1
    return kind in ("STRING", "FSTRING_START") and ("\\" in text or any(quote in text for quote in quotes))


def claim_syntax(case: RecordCase) -> str:
    """The script is Python 3.10."""
    try:
        ast.parse(case.source, feature_version=(3, 10))
        found = newer_fstring(case.source)
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError, MemoryError) as error:
        found = f"line {getattr(error, 'lineno', '?')}: {getattr(error, 'msg', error)}"
    demand(found is None, f"train_gpt.py is not Python 3.10: {found}")
    return "train_gpt.py parses as Python 3.10"


# ---- the runs ------------------------------------------------------------------------------------


def claim_clock(case: RecordCase) -> str:
    """Training with calibration, and evaluation with decompression, keep the limits of the track.

    One step of overshoot is allowed: a clock that is read after each step cannot stop earlier.
    """
    limited = case.stored["record"]
    train_s = case.track.train_s if limited else None
    eval_s = case.track.eval_s if limited else None
    evidence = [f"{train_evidence(run, train_s)}, {eval_evidence(run, eval_s)}" for run in case.runs]
    compiled = ", ".join(seconds(run.number("phase_times", "compile")) for run in case.runs)
    intro = "no limit applies; " if train_s is None else ""
    return f"{intro}{'; '.join(evidence)}; off the clock: compile {compiled} s"


def train_evidence(run: RunLog, limit_s: float | None) -> str:
    """Return the time of training and calibration. Raises Wrong if it exceeds the limit by over a step."""
    train = run.number("phase_times", "train")
    calibrate = run.number("phase_times", "calibrate")
    evidence = f"seed {run.seed}: train {seconds(train)} + calibrate {seconds(calibrate)} s"
    if run.resumed:
        evidence += f", resumed {len(run.resumed)} times"
    if limit_s is None:
        return evidence

    demand(not run.resumed, f"{evidence}: the clock does not count what was lost; a record runs through")
    step = run.number("final_score", "train_time") / max(run.count("final_score", "steps"), 1)
    over = train + calibrate - 1000 * limit_s
    demand(over <= step, f"{evidence} is {seconds(over)} s over {limit_s:g} s, more than one step")
    evidence += f" of {limit_s:g}"
    if over > 0:
        evidence += f" (over by {over:.0f} ms, within one step of {step:.0f} ms)"
    return evidence


def eval_evidence(run: RunLog, limit_s: float | None) -> str:
    """Return the time of evaluation and decompression. Raises Wrong if it exceeds the limit."""
    evaluate = max(run.number("phase_times", "eval"), run.number("final_score", "eval_time"))
    total = evaluate + run.number("phase_times", "decompress")
    evidence = f"eval + decompress {seconds(total)} s"
    if limit_s is None:
        return evidence

    demand(total <= 1000 * limit_s, f"seed {run.seed}: {evidence} is over {limit_s:g} s")
    return f"{evidence} of {limit_s:g}"


def claim_steps(case: RecordCase) -> str:
    """Step lines run forward and agree with final_score."""
    for run in case.runs:
        fault = log_claims.steps_fault(run)
        demand(fault is None, f"seed {run.seed}: {fault}")
    ends = [(run.seed, run.steps[-1]) for run in case.runs]
    return "; ".join(f"seed {seed}: {end.step} steps of {end.step_avg_ms} ms" for seed, end in ends)


def claim_score(case: RecordCase) -> str:
    """final_score repeats the score of the artifact as read back, over the whole split."""
    whole_split = case.stored["record"] and case.track.whole_split
    return log_claims.prove_score(case.runs, whole_split=whole_split)


def claim_ratio(case: RecordCase) -> str:
    """Bits per byte follow from nats per token, tokens and bytes, to one part in a million."""
    return log_claims.prove_ratio(case.runs)


def claim_hardware(case: RecordCase) -> str:
    """A record ran on the hardware of its track."""
    run = case.runs[0]
    if not case.stored["record"]:
        return f"{run.hardware}: a non-record may use any"

    track = case.track
    ranks = run.count("machine", "world_size")
    demand(
        track.ranks in (None, ranks) and track.device in run.text("machine", "device"),
        f"{run.hardware}; a record of {case.stored['track']} needs {track.ranks} x {track.device}",
    )
    return run.hardware


def claim_requirements(case: RecordCase) -> str:
    """requirements.txt names the versions that ran."""
    run = case.runs[0]
    want = requirements(run, []).splitlines()
    lines = case.file("requirements.txt").splitlines()
    for line in want:
        demand(line in lines, f"requirements.txt lacks {line!r}, which the logs show")
    if uses_flash4(run):
        demand(
            any(line.startswith("flash-attn-4") for line in lines),
            "requirements.txt lacks flash-attn-4: the logs show attention:flash4",
        )
    return f"{', '.join(line.split('  #')[0] for line in want[1:])} as the logs show"


def claim_readme(case: RecordCase) -> str:
    """The page above the notes line is the one that the logs give."""
    text = case.file("README.md")
    demand(NOTES in text, f"README.md lacks the line {NOTES.strip()}")
    case.importable_answer()  # the page holds a command that needs it

    found = text[: text.index(NOTES)].splitlines()
    want = case.expected["README.md"].removesuffix(NOTES).splitlines()
    demand_same_lines("README.md", found, want)
    return f"{len(want)} lines regenerated"


def claim_parent(case: RecordCase) -> str:
    """The parent is a folder of this ledger; the evidence says what was gained on it."""
    parent = case.stored["parent"]
    if parent is None:
        return "none named"

    demand(parent != f"{case.folder.parent.name}/{case.folder.name}", "a folder cannot be its own parent")
    path = case.records / parent / "submission.json"
    demand(path.is_file(), f"records/{parent} does not exist")
    try:
        before = seed_losses(read_json(path))
    except (BadInput, ValueError, KeyError, TypeError, AttributeError):
        raise Wrong(f"records/{parent}/submission.json cannot be read") from None

    gap = stats.welch(before, seed_losses(case.stored))
    if gap is None:
        return parent
    return f"{parent}: {gap.diff:+.4f} nats, p {gap.p_less():.2g} that it is no better"


def seed_losses(sub: dict) -> list[float]:
    """Return the val_loss of every seed of a submission.json."""
    return [entry["val_loss"] for entry in sub["seed_results"].values()]
