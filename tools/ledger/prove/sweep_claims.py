"""Proves the claims of a sweep folder. sweep_table.py makes its tables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ledger.files import read_json, sha256
from ledger.folders import log_files
from ledger.make.sweep_table import FILES, build_table, diverged, finished, page, run_figures
from ledger.prove import log_claims
from ledger.prove.claims import (
    Finding,
    LogFolder,
    demand,
    demand_files,
    demand_same_lines,
    first_difference,
    other_code,
    prove,
)
from ledger.read.knobs import with_trait
from ledger.read.runlog import RunLog


@dataclass
class SweepCase(LogFolder):
    """A sweep folder under examination. `complete_runs` are all of its runs, `runs` those with a score."""

    def log_paths(self) -> list[Path]:
        return log_files(self.folder / "logs")

    def read_log(self, path: Path) -> RunLog:
        return finished(path)

    def order(self, run: RunLog) -> object:
        return run.path.name

    @property
    def runs(self) -> list[RunLog]:
        return [run for run in self.complete_runs if not diverged(run)]

    @cached_property
    def expected(self) -> dict:
        """table.json as the logs give it. Raises BadInput, a failure, where a fixed setting differs."""
        return build_table(self.complete_runs)


def claim_files(case: SweepCase) -> str:
    """Every file is there, and no code besides train_gpt.py."""
    demand_files(case.folder, FILES)
    others = other_code(case.folder)
    demand(not others, f"code outside train_gpt.py: {', '.join(others)}")

    logs = log_files(case.folder / "logs")
    strange = sorted(path.name for path in (case.folder / "logs").glob("*") if path not in logs)
    demand(not strange, f"logs/ holds {', '.join(strange)}: not a log")
    return f"{len(FILES)} files and {len(logs)} logs"


def claim_logs(case: SweepCase) -> str:
    """Every log is finished, of the folder's train_gpt.py, and nothing follows its end."""
    runs = case.readable_runs
    demand(not case.log_errors, "; ".join(case.log_errors[:3]))
    demand(bool(runs), "no logs")
    for run in runs:
        due = 0 if diverged(run) else 1
        demand(run.final_scores == due, f"{run.path.name}: {run.final_scores} final_score lines")
        demand(not run.trailing, f"{run.path.name}: {run.trailing[:60]!r} follows final_score")
    return f"{len(runs)} logs, {len(runs) - sum(map(diverged, runs))} with a final_score"


def claim_source(case: SweepCase) -> str:
    """train_gpt.py is the one that every log names by its hash."""
    want = sha256(case.file("train_gpt.py"))
    for run in case.complete_runs:
        demand(sha256(run.source) == want, f"{run.path.name} is of another train_gpt.py")
    demand(case.expected["train_gpt_sha256"] == want, "table.json names another train_gpt.py")
    return f"sha256 {want[:16]} in {len(case.complete_runs)} logs"


def claim_unique(case: SweepCase) -> str:
    """No configuration is there twice, and each log is named after its own."""
    own = with_trait("OWN")
    seen: dict[tuple, str] = {}
    for run in case.complete_runs:
        demand_own_name(run)
        config = run.config
        name = config["run_id"]
        others = sorted((key, config[key]) for key in config if key not in own)
        settings = (config.get("seed"), *others)
        demand(settings not in seen, f"{name} and {seen.get(settings)} are one configuration")
        seen[settings] = name
    return f"{len(seen)} different configurations"


def demand_own_name(run: RunLog) -> None:
    """Raise Wrong unless file name, sweep line and config of a log name the same row, rate and seed."""
    config = run.config
    name = run.path.name.split(".txt")[0]
    rate = run.text("sweep", "rate")
    own = f"{run.text('sweep', 'row')}_{rate}_seed{config.get('seed')}"
    demand(name == own == config.get("run_id"), f"{run.path.name} holds {own}, run_id {config.get('run_id')}")
    used = config.get(run.text("sweep", "key"))
    demand(rate == used, f"{name}: rate {rate}, its config has {used}")
    demand(run.text("sweep", "seed") == config.get("seed"), f"{name}: its lines disagree on the seed")


def claim_fair(case: SweepCase) -> str:
    """One kind of device, data set and budget; the rates of a row start from the same weights, by seed."""
    table = case.expected
    first: dict[tuple, str] = {}
    for run in case.complete_runs:
        row = run.text("sweep", "row")
        seed = run.config["seed"]
        weights = run.text("sweep", "init_sha256")
        demand(
            first.setdefault((row, seed), weights) == weights,
            f"{run.path.name} began from other weights than the rest of row {row}, seed {seed}",
        )
    return f"{len(table['config'])} settings, device and data the same in all logs"


def claim_clock(case: SweepCase) -> str:
    """Training and calibration keep the limit but for a step, and nothing compiled while the clock ran."""
    worst = 0.0
    for run in case.runs:
        demand(not run.late, f"{run.path.name}: {run.late[:80]}")
        limit = 1000 * float(run.config["max_wallclock_seconds"])
        trained = run.number("phase_times", "train") + run.number("phase_times", "calibrate")
        over = trained - limit if limit else 0.0
        demand(over <= run_figures(run).step_ms, f"{run.path.name}: {over:.0f} ms over its limit")
        worst = max(worst, over)
    return f"largest overshoot {worst:.0f} ms"


def claim_steps(case: SweepCase) -> str:
    """Step lines run forward and agree with final_score."""
    for run in case.runs:
        fault = log_claims.steps_fault(run)
        demand(fault is None, f"{run.path.name}: {fault}")
    return f"{sum(len(run.steps) for run in case.runs)} step lines"


def claim_score(case: SweepCase) -> str:
    """final_score repeats the score of the artifact as read back."""
    return log_claims.prove_score(case.runs, whole_split=False)


def claim_ratio(case: SweepCase) -> str:
    """Bits per byte follow from nats per token, tokens and bytes, to one part in a million."""
    return log_claims.prove_ratio(case.runs)


def claim_table(case: SweepCase) -> str:
    """table.json holds what the logs give."""
    found = first_difference(read_json(case.folder / "table.json"), case.expected)
    demand(found is None, f"table.json {found}")
    return f"{len(case.expected['rows'])} rows recomputed from the logs"


def claim_readme(case: SweepCase) -> str:
    """README.md is the page that the logs give."""
    want = page(case.expected, case.folder.name).splitlines()
    demand_same_lines("README.md", case.file("README.md").splitlines(), want)
    return f"{len(want)} lines regenerated"


CLAIMS = {
    "files": claim_files,
    "logs": claim_logs,
    "source": claim_source,
    "unique": claim_unique,
    "fair": claim_fair,
    "clock": claim_clock,
    "steps": claim_steps,
    "score": claim_score,
    "ratio": claim_ratio,
    "table": claim_table,
    "readme": claim_readme,
}


def examine_sweep(folder: Path) -> list[Finding]:
    """Return a finding for every claim about a sweep folder."""
    return prove(SweepCase(folder), CLAIMS)
