"""The tables of a sweep, made from its logs only, and the claims that `verify` proves about its folder.

A sweep folder: train_gpt.py once, logs/ROW_RATE_seedSEED.txt (or .txt.gz) that name its sha256 in place
of the source, and, written from these, table.json, README.md and curves.png.
"""
from __future__ import annotations

import json
import math
import re
from functools import cached_property
from pathlib import Path

from ledger import checks
from ledger import stats
from ledger import views
from ledger.checks import NotCheckable, demand
from ledger.runlog import BadInput, Run, parse_log, read_text, same, sha256

# What makes the rows of a table comparable: equal in all its logs, so no row may set one of these.
FIXED = (
    "preset", "data_path", "tokenizer_path", "report_split", "bos_id", "max_wallclock_seconds", "iterations",
    "warmup_steps", "val_loss_every", "train_log_every", "val_tokens", "train_batch_tokens",
    "micro_batch_tokens", "train_seq_len", "eval_seq_len", "eval_stride", "eval_batch_tokens", "vocab_size",
    "int6_step", "fit_cap", "size_cap", "ttt_lr", "ttt_chunk_tokens", "ttt_passes")
# What a row may set, at the price of a compilation of its own.
MODEL = (
    "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "rope_dims", "rope_base",
    "attn_windows", "doc_mask", "xsa_last_n", "ve_last_n", "ve_dim", "bigram_vocab_size", "bigram_dim",
    "logit_softcap", "fp8")
NAMES = ("run_id", "seed", "out_dir")       # what tells two logs apart, or says where they lie
FILES = ("README.md", "table.json", "train_gpt.py", "curves.png")
NOTE = """val bpb is that of the int6 artifact, read back ({metric}); live and averaged are bpb of the
training weights and of their average. Rows start from the same weights at each seed unless marked "own init".
n runs have the row's best rate, the one with the lowest val bpb at the first seed, which therefore flatters
that seed in every row alike. ± is the sample standard deviation over seeds; differences are to {baseline},
p two-sided (paired: over shared seeds). "at {equal_step}" is the live bpb at step {equal_step}, the fewest steps
of any run here: a faster row has not finished its warmdown there. Bytes and bits per weight (order-0 entropy of
the int6 codes) are at one int6_step, {int6_step}, not fitted to the cap. A best rate marked "edge" is the largest
or the smallest tried: the row may do better beyond it."""


def log_files(folder: Path) -> list[Path]:
    """The logs of a sweep folder, by name; empty when there are none."""
    return sorted([*(folder / "logs").glob("*.txt"), *(folder / "logs").glob("*.txt.gz")])


def is_sweep(folder: Path) -> bool:
    """Whether the folder is a sweep's, or lies where sweeps lie."""
    return (folder / "table.json").is_file() or folder.parent.name == "sweeps"


def all_sweeps(records: Path) -> list[Path]:
    """Every sweep folder of the ledger, by name."""
    return sorted(path for path in records.glob("sweeps/[!.]*") if path.is_dir())


def diverged(run: Run) -> bool:
    """Whether training ended in weights that are not numbers."""
    return "sweep_diverged" in run.facts


def finished(path: Path) -> Run:
    """The run of a sweep's log that is complete: scored, or diverged. BadInput names what is missing."""
    run = parse_log(path)
    for key in ("row", "baseline", "key", "rate", "seed", "stage", "workers", "kind", "init_sha256"):
        run.text("sweep", key)
    if not diverged(run):
        figures(run)
    return run


def figures(run: Run) -> dict[str, float]:
    """What a log says of its configuration: bpb, steps, ms, bytes, bits. BadInput when one is missing."""
    steps = run.count("final_score", "steps")
    return {"val_bpb": run.number("final_score", "val_bpb"), "live": run.number("final_live", "val_bpb"),
            "ema": run.number("final_ema", "val_bpb"), "steps": steps,
            "step_ms": run.number("final_score", "train_time") / max(steps, 1),
            "bytes": run.size("artifact"), "entropy": run.number("sweep_codes", "entropy")}


def seed_of(run: Run) -> int:
    return run.count("sweep", "seed")


def curve(run: Run) -> list[tuple[int, float, float]]:
    """(step, seconds, live bpb) of every validation, in order."""
    return [(s.step, s.time_ms / 1000, s.bpb) for s in run.steps if s.kind == "val" and s.bpb is not None]


def bpb_at(run: Run, step: int) -> float | None:
    """The live bpb at a step, on the line between the validations around it; None outside of them."""
    points = curve(run)
    for (a, _, low), (b, _, high) in zip(points, points[1:]):
        if a <= step <= b:
            return low + (high - low) * (step - a) / max(b - a, 1)
    return points[-1][2] if points and points[-1][0] == step else None


def best_rate(runs: list[Run]) -> str | None:
    """Of one row's first-stage runs the rate with the lowest val bpb, as text; None when all diverged."""
    scored = [(run.number("final_score", "val_bpb"), float(run.text("sweep", "rate")), run)
              for run in runs if run.text("sweep", "stage") == "1" and not diverged(run)]
    return min(scored, key=lambda trial: trial[:2])[2].text("sweep", "rate") if scored else None


def spread(values: list[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation."""
    return {"mean": stats.mean(values), "std": stats.std(values)}


def row_result(runs: list[Run], step: int) -> dict[str, object]:
    """A row of the table from all of its runs; `step`: where curves are compared."""
    rates = {run.text("sweep", "rate"): None if diverged(run) else run.number("final_score", "val_bpb")
             for run in sorted(runs, key=lambda run: float(run.text("sweep", "rate")))
             if run.text("sweep", "stage") == "1"}
    best = best_rate(runs)
    chosen = [run for run in runs if run.text("sweep", "rate") == best]
    scored = sorted((run for run in chosen if not diverged(run)), key=seed_of)
    out = {"key": runs[0].text("sweep", "key"), "rates": rates, "best_rate": best,
           "edge": len(rates) > 1 and best in (list(rates)[0], list(rates)[-1]),
           "diverged": sum(map(diverged, runs)), "seeds": [seed_of(run) for run in scored]}
    if scored:
        columns = [figures(run) for run in scored]
        out["val_bpb_by_seed"] = {str(seed_of(run)): figures(run)["val_bpb"] for run in scored}
        out |= {name: spread([column[name] for column in columns]) for name in columns[0]}
        at_step = [bpb_at(run, step) for run in scored]
        out["at_step"] = None if None in at_step else spread(at_step)
    return out


def differences(row: dict, base: dict) -> dict[str, float | None] | None:
    """val bpb of a row minus the baseline's, with two-sided p of both tests; None where one has no score."""
    if not row["seeds"] or not base["seeds"]:
        return None
    a, b = base["val_bpb_by_seed"], row["val_bpb_by_seed"]
    common = sorted(set(a) & set(b), key=int)
    pair = stats.paired([a[s] for s in common], [b[s] for s in common]) if common else None
    free = stats.welch(list(a.values()), list(b.values()))
    return {"diff": row["val_bpb"]["mean"] - base["val_bpb"]["mean"],
            "paired_p": pair and pair.p_two_sided(), "welch_p": free and free.p_two_sided()}


def starts(runs: list[Run]) -> dict[int, str]:
    """Hash of the initial weights by seed."""
    return {seed_of(run): run.text("sweep", "init_sha256") for run in runs}


def device_of(run: Run) -> str:
    """Device, processes and versions of a run: equal in all logs of a table."""
    versions = " ".join(f"{name} {run.versions[name]}" for name in ("torch", "cuda", "triton"))
    return f"{run.text('machine', 'world_size')} x {run.text('sweep', 'kind')}, {versions}"


def build_table(runs: list[Run]) -> dict[str, object]:
    """table.json of finished runs. BadInput when there are none or when they are not of one kind."""
    if not runs:
        raise BadInput("no finished configuration yet: nothing to tabulate")
    by_row: dict[str, list[Run]] = {}
    for run in runs:
        by_row.setdefault(run.text("sweep", "row"), []).append(run)
    baseline = same(runs, "baseline", lambda run: run.text("sweep", "baseline"))
    chosen = [run for group in by_row.values() for run in group
              if run.text("sweep", "rate") == best_rate(group) and not diverged(run)]
    step = min((run.count("final_score", "steps") for run in chosen), default=0)
    rows = {name: row_result(group, step) for name, group in by_row.items()}
    home = by_row.get(baseline, runs)[0].config
    for name, group in by_row.items():
        free = {*NAMES, rows[name]["key"]}
        rows[name]["changes"] = {key: value for key, value in sorted(group[0].config.items())
                                 if key not in free and home.get(key) != value}
        compared = baseline in rows and name != baseline
        rows[name]["versus"] = differences(rows[name], rows[baseline]) if compared else None
        a, b = starts(group), starts(by_row.get(baseline, group))
        rows[name]["own_init"] = any(a[seed] != b[seed] for seed in a.keys() & b.keys())
    order = sorted(rows, key=lambda name: (rows[name].get("val_bpb", {"mean": math.inf})["mean"], name))
    table = {
        "schema": 1, "device": same(runs, "device", device_of),
        "workers": sorted({run.count("sweep", "workers") for run in runs}), "baseline": baseline,
        "metric": same([run for run in runs if not diverged(run)] or runs, "metric",
                       lambda run: run.facts.get("final_score", {}).get("metric")),
        "train_gpt_sha256": same(runs, "source", lambda run: sha256(run.source)),
        "data_manifest_sha256": same(runs, "data manifest", lambda run: run.text("data", "manifest_sha256")),
        "config": {key: same(runs, key, lambda run, key=key: run.config.get(key))
                   for key in (*FIXED, *(k for k in MODEL if len({run.config.get(k) for run in runs}) == 1))
                   if key not in ("data_path", "tokenizer_path")
                   and any(key in run.config for run in runs)},         # knobs younger than all of the logs
        "configurations": len(runs), "diverged": sum(map(diverged, runs)), "equal_step": step,
        "rows": [{"name": name, **rows[name]} for name in order]}
    return json.loads(json.dumps(table), parse_float=lambda text: round(float(text), 8))


def number(value: dict | None, digits: int) -> str:
    """The mean of a spread as text."""
    return "-" if value is None else f"{value['mean']:,.{digits}f}"


def table_cells(row: dict) -> list[str]:
    """One Markdown row."""
    rate = "diverged" if row["best_rate"] is None else row["best_rate"] + " (edge)" * row["edge"]
    changes = [f"{key}={value}" for key, value in row["changes"].items()] + ["own init"] * row["own_init"]
    std, versus = (row.get("val_bpb") or {}).get("std"), row["versus"]
    gap = "-" if versus is None else f"{versus['diff']:+.4f}"
    p = ["-" if versus is None or versus[key] is None else f"{versus[key]:.2g}"
         for key in ("paired_p", "welch_p")]
    digits = {"live": 4, "ema": 4, "at_step": 4, "steps": 0, "step_ms": 2, "bytes": 0, "entropy": 3}
    return [row["name"], ", ".join(changes) or "-", f"{row['key']} {rate}", str(len(row["seeds"])),
            number(row.get("val_bpb"), 4), "-" if std is None else f"{std:.4f}", gap, *p,
            *[number(row.get(column), count) for column, count in digits.items()]]


def rate_cells(row: dict) -> str:
    """All rates tried at the first seed and what each scored, the best in bold."""
    told = []
    for rate, bpb in row["rates"].items():
        text = f"{rate}: {'diverged' if bpb is None else format(bpb, '.4f')}"
        told.append(f"**{text}**" if rate == row["best_rate"] else text)
    return ", ".join(told)


def markdown(table: dict) -> list[str]:
    """The tables and the sentence above them; no heading."""
    workers, config = table["workers"], table["config"]
    side = "one at a time" if workers == [1] else f"{' or '.join(map(str, workers))} side by side"
    time = "no time limit" if float(config["max_wallclock_seconds"]) == 0 else \
        f"{float(config['max_wallclock_seconds']):g} s of training each"
    against = f"to {table['baseline']}"
    heads = ["row", "what differs", "best rate", "n", "val bpb", "±", against, "p paired", "p Welch", "live",
             "averaged", f"at {table['equal_step']}", "steps", "ms/step", "bytes", "bits/weight"]
    lost = f", {table['diverged']} of them diverged" if table["diverged"] else ""
    return [
        f"{table['device']}; {time}, preset {config['preset']}; {table['configurations']} configurations"
        f"{lost}, {side}.", "",
        f"| {' | '.join(heads)} |", "|---|---|---|" + "---:|" * (len(heads) - 3),
        *[f"| {' | '.join(table_cells(row))} |" for row in table["rows"]], "",
        "Rates tried at the first seed, val bpb of each:", "",
        "| row | rates |", "|---|---|",
        *[f"| {row['name']} | {row['key']} {rate_cells(row)} |" for row in table["rows"]], ""]


def page(table: dict, name: str) -> str:
    """README.md of a sweep folder."""
    note = NOTE.format(int6_step=table["config"]["int6_step"],
                       **{key: table[key] for key in ("metric", "baseline", "equal_step")})
    return "\n".join([f"# Sweep {name}", "", *markdown(table), note, "",
                      f"train_gpt.py sha256 `{table['train_gpt_sha256']}`; data manifest sha256 "
                      f"`{table['data_manifest_sha256']}`.", "",
                      "![bpb against steps and seconds](curves.png)", ""])


def mean_curve(runs: list[Run]) -> list[tuple[float, float, float]]:
    """(step, seconds, live bpb), means over seeds: of the validations that all have, and of the ends."""
    curves = [curve(run) for run in runs]
    if not all(curves):
        return []
    shared = set.intersection(*({point[0] for point in points[:-1]} for points in curves))
    groups = [[next(p for p in points if p[0] == step) for points in curves] for step in sorted(shared)]
    groups.append([points[-1] for points in curves])
    return [tuple(stats.mean(column) for column in zip(*group)) for group in groups]


def plot(runs: list[Run], table: dict, out: Path) -> None:
    """Live bpb against steps and against seconds: a line per row, the mean over seeds at its best rate."""
    plt = views.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for index, row in enumerate(table["rows"]):
        chosen = [run for run in runs if run.text("sweep", "row") == row["name"]
                  and run.text("sweep", "rate") == row["best_rate"] and not diverged(run)]
        points = mean_curve(chosen) if chosen else []
        points = points[1:] if len(points) > 2 else points          # the untrained model flattens the rest
        style = {"color": f"C{index % 10}", "linestyle": "-" if index < 10 else "--", "linewidth": 1.0,
                 "marker": ".", "markersize": 3, "label": row["name"]}
        for axis, x in zip(axes, (0, 1)):
            axis.plot([point[x] for point in points], [point[2] for point in points], **style)
    axes[0].set_ylabel("live val bpb (bits per byte)")
    axes[0].set_xlabel("step")
    axes[1].set_xlabel("training time (s)")
    axes[1].legend(fontsize=7)
    views.save(plt, figure, out)


def read_runs(folder: Path) -> list[Run]:
    """Every finished run of a sweep folder. BadInput names a log that is none."""
    return [finished(path) for path in log_files(folder)]


def sweep_table(folder: Path) -> dict:
    """Recomputes the table from the logs; writes table.json, README.md and curves.png. Returns the table."""
    runs = read_runs(folder)
    table = build_table(runs)
    views.write_atomic(folder / "table.json", json.dumps(table, indent=1) + "\n")
    views.write_atomic(folder / "README.md", page(table, folder.name))
    plot(runs, table, folder / "curves.png")
    return table


def board(records: Path) -> str:
    """The tables of every sweep folder, for records/README.md. BadInput names a table.json that is none."""
    lines = []
    for folder in all_sweeps(records):
        try:
            table = json.loads(read_text(folder / "table.json"))
            lines += [f"**[{folder.name}](sweeps/{folder.name}/)**", "", *markdown(table)]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{folder / 'table.json'}: not a sweep's table ({error}); "
                           f"./run.sh record sweep {folder} writes it again") from None
    return "\n".join(lines) or "No sweeps yet.\n"


# ---- claims --------------------------------------------------------------------------------------

class SweepCase:
    """A sweep folder under examination."""

    stored = {"record": False}              # for claims shared with record folders

    def __init__(self, folder: Path) -> None:
        self.folder, self.errors = folder, []

    @cached_property
    def everything(self) -> list[Run]:
        """Finished runs; what is wrong with the other logs goes to `errors`."""
        out = []
        for path in log_files(self.folder):
            try:
                out.append(finished(path))
            except BadInput as error:
                self.errors.append(str(error).replace(f"{self.folder}/", ""))
        return out

    @property
    def all_runs(self) -> list[Run]:
        """Every log, when all of them are finished."""
        if not self.everything or self.errors:
            raise NotCheckable("a log is missing or cannot be read")
        return self.everything

    @property
    def runs(self) -> list[Run]:
        """Those with a score."""
        return [run for run in self.all_runs if not diverged(run)]

    @cached_property
    def expected(self) -> dict:
        return build_table(self.all_runs)

    def text(self, name: str) -> str:
        """Text of a file of the folder."""
        try:
            return read_text(self.folder / name)
        except BadInput:
            raise checks.Wrong(f"{name} cannot be read") from None


def claim_files(case: SweepCase) -> str:
    """Every file is there, and no code beside train_gpt.py."""
    missing = [name for name in FILES if not (case.folder / name).is_file()]
    demand(not missing, f"missing: {', '.join(missing)}")
    others = sorted(str(path.relative_to(case.folder)) for path in case.folder.rglob("*.py"))
    demand(others == ["train_gpt.py"], f"code outside train_gpt.py: {', '.join(others)}")
    strange = sorted(set((case.folder / "logs").glob("*")) - set(log_files(case.folder)))
    demand(not strange, f"logs/ holds {strange[0].name}, which is no log" if strange else "")
    return f"{len(FILES)} files and {len(log_files(case.folder))} logs"


def claim_logs(case: SweepCase) -> str:
    """Every log is finished, of the folder's train_gpt.py, and nothing follows its end."""
    runs = case.everything
    demand(not case.errors, "; ".join(case.errors[:3]))
    demand(bool(runs), "no logs")
    for run in runs:
        demand(run.final_scores == (0 if diverged(run) else 1),
               f"{run.path.name}: {run.final_scores} final_score lines")
        demand(not run.trailing, f"{run.path.name}: {run.trailing[:60]!r} follows final_score")
    return f"{len(runs)} logs, {len(runs) - sum(map(diverged, runs))} with a final_score"


def claim_source(case: SweepCase) -> str:
    """train_gpt.py is the one that every log names, by its hash."""
    want = sha256(case.text("train_gpt.py"))
    for run in case.all_runs:
        demand(sha256(run.source) == want, f"{run.path.name} is of another train_gpt.py")
    demand(case.expected["train_gpt_sha256"] == want, "table.json names another train_gpt.py")
    return f"sha256 {want[:16]} in {len(case.all_runs)} logs"


def claim_unique(case: SweepCase) -> str:
    """No configuration is there twice, and each log is named after its own."""
    seen: dict[tuple, str] = {}
    for run in case.all_runs:
        name, config = run.path.name.split(".txt")[0], run.config
        told = f"{run.text('sweep', 'row')}_{run.text('sweep', 'rate')}_seed{config.get('seed')}"
        demand(name == told == config.get("run_id"),
               f"{run.path.name} holds {told}, run_id {config.get('run_id')}")
        rate, used = run.text("sweep", "rate"), config.get(run.text("sweep", "key"))
        demand(rate == used, f"{name}: rate {rate}, its config has {used}")
        demand(run.text("sweep", "seed") == config.get("seed"), f"{name}: its lines disagree on the seed")
        settings = tuple(sorted(pair for pair in config.items() if pair[0] not in ("run_id", "out_dir")))
        demand(settings not in seen, f"{name} and {seen.get(settings)} are one configuration")
        seen[settings] = name
    return f"{len(seen)} different configurations"


def claim_fair(case: SweepCase) -> str:
    """One kind of device, data set and budget; the rates of a row start from the same weights, by seed."""
    table = case.expected                   # BadInput, which is a failure, where a fixed value differs
    first: dict[tuple, str] = {}
    for run in case.all_runs:
        place = (run.text("sweep", "row"), run.config["seed"])
        start = first.setdefault(place, run.text("sweep", "init_sha256"))
        demand(start == run.text("sweep", "init_sha256"),
               f"{run.path.name} began from other weights than the rest of row {place[0]}, seed {place[1]}")
    return f"{len(table['config'])} settings, device and data the same in all logs"


def claim_clock(case: SweepCase) -> str:
    """Training keeps its limit, one step of overshoot allowed, and nothing compiled while the clock ran."""
    worst = 0.0
    for run in case.runs:
        demand(not run.late, f"{run.path.name}: {run.late[:80]}")
        limit = 1000 * float(run.config["max_wallclock_seconds"])
        over = run.number("phase_times", "train") - limit if limit else 0.0
        demand(over <= figures(run)["step_ms"], f"{run.path.name}: {over:.0f} ms over its limit")
        worst = max(worst, over)
    return f"largest overshoot {worst:.0f} ms"


def claim_steps(case: SweepCase) -> str:
    """Step lines run forward and agree with final_score."""
    for run in case.runs:
        fault = checks.steps_fault(run)
        demand(fault is None, f"{run.path.name}: {fault}")
    return f"{sum(len(run.steps) for run in case.runs)} step lines"


def claim_table(case: SweepCase) -> str:
    """table.json is what the logs say."""
    try:
        stored = json.loads(case.text("table.json"))
    except (ValueError, RecursionError) as error:
        raise checks.Wrong(f"table.json is not JSON: {error}") from None
    found = checks.first_difference(unlisted(stored), unlisted(case.expected))
    demand(found is None, f"table.json {found}")
    return f"{len(case.expected['rows'])} rows recomputed from the logs"


def unlisted(value: object) -> object:
    """The same JSON with lists as objects, so that a difference inside one is found and named."""
    if isinstance(value, list):
        return {str(index): unlisted(item) for index, item in enumerate(value)}
    return {key: unlisted(item) for key, item in value.items()} if isinstance(value, dict) else value


def claim_readme(case: SweepCase) -> str:
    """README.md is the page that the logs give."""
    told, want = case.text("README.md").splitlines(), page(case.expected, case.folder.name).splitlines()
    for line, (a, b) in enumerate(zip(told + [""] * len(want), want + [""] * len(told)), 1):
        demand(a == b, f"README.md line {line} is {a[:60]!r}, the logs give {b[:60]!r}")
    return f"{len(want)} lines regenerated"


CLAIMS = {"files": claim_files, "logs": claim_logs, "source": claim_source, "unique": claim_unique,
          "fair": claim_fair, "clock": claim_clock, "steps": claim_steps, "score": checks.claim_score,
          "ratio": checks.claim_ratio, "table": claim_table, "readme": claim_readme}


def examine(folder: Path) -> list[tuple[str, str, str]]:
    """(ok | fail | not checkable, claim, evidence) for every claim about a sweep folder."""
    return checks.results(SweepCase(folder), CLAIMS)
