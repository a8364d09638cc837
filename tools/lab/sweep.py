"""The shoot-out: trains many configurations on one device kind, fairly, and tabulates them.

    ./run.sh record sweep PLAN.json [key=value ...] [options]      a plan, with more settings for every row
    ./run.sh record sweep --row ns5 --row turbo:ortho=turbo --rates 0.01,0.02 preset=cpu data_path=DIR
    ./run.sh record sweep FOLDER                                   write a finished sweep's tables again

Stage 1 trains every row at every rate with the first seed, stage 2 the best rate of each row with the other
seeds. Each worker is one process on one device that compiles a model once: a configuration puts new weights
into the same tensors, so that only the update of the matrices is compiled anew; for a row with another model
(heads, windows, depth, ...) all is, off the clock. Training, clock, export and score are train_gpt.py's own.
A configuration is one log; a rerun skips those that are there. The environment sets no knob here: what a
sweep trains is in its plan and on its command line.
"""
from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ledger import sweep_table
from ledger import views
from ledger.runlog import BadInput, read_text, sha256

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import train_gpt as t  # noqa: E402

ROW_KEYS = ("rate_key", "rates", "multipliers")         # of a plan, and of a row that has its own
PLAN_KEYS = {*ROW_KEYS, "name", "base", "seeds", "rows"}
OWN_KEYS = {"fit_cap": "false"}                         # one quantisation for all: never fitted to the cap
SCRIPT = ROOT / "train_gpt.py"


# ---- plan ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Job:
    """One configuration. argv: its whole configuration as key=value; rate as config lines print it."""
    row: str
    rate: str
    seed: int
    stage: int
    argv: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.row}_{self.rate}_seed{self.seed}"


@dataclass(frozen=True)
class Row:
    """A row of the plan: what it sets, the knob whose values are tried, and those values as text."""
    settings: Mapping[str, str]
    key: str
    rates: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What is trained. base: settings of every row; the first row is the baseline."""
    name: str
    base: Mapping[str, str]
    rows: Mapping[str, Row]
    seeds: tuple[int, ...]

    @property
    def baseline(self) -> str:
        return next(iter(self.rows))

    @property
    def size(self) -> int:
        """Configurations of both stages."""
        return sum(len(row.rates) + len(self.seeds) - 1 for row in self.rows.values())

    def job(self, row: str, rate: str, seed: int) -> Job:
        """The configuration of a row at a rate with a seed. Raises InputError when Config refuses it."""
        spec = self.rows[row]
        settings = {**self.base, **spec.settings, spec.key: rate, "seed": str(seed)}
        job = Job(row, rate, seed, 1 if seed == self.seeds[0] else 2, ())
        argv = [f"{key}={value}" for key, value in settings.items()] + [f"run_id={job.name}"]
        return dataclasses.replace(job, argv=tuple(argv))

    def first_stage(self) -> list[Job]:
        """Middle rates of all rows first: a sweep cut short has compared all rows."""
        longest = max(len(row.rates) for row in self.rows.values())
        order = sorted(range(longest), key=lambda i: (abs(i - (longest - 1) // 2), i))
        return [self.job(name, row.rates[i], self.seeds[0]) for i in order
                for name, row in self.rows.items() if i < len(row.rates)]


def resolve(where: str, settings: Mapping[str, str]) -> t.Config:
    """The Config of settings; BadInput says in which part of the plan a knob is wrong."""
    try:
        return t.load_config([f"{key}={value}" for key, value in settings.items()], {})
    except t.InputError as error:
        raise BadInput(f"{where}: {error}") from None


def make_row(name: str, given: Mapping, plan: Mapping, base: Mapping[str, str]) -> Row:
    """A row of the plan with its rates as values. BadInput names the row and the key."""
    where = f"row {name}"
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise BadInput(f"{where}: a row's name is letters, digits and _ . - (it becomes a file name)")
    if not isinstance(given, dict):
        raise BadInput(f"{where}: not an object of settings")
    settings = {key: str(value) for key, value in given.items() if key not in ROW_KEYS}
    for key in settings:
        if key in (*sweep_table.FIXED, *sweep_table.NAMES):
            raise BadInput(f"{where}: {key} is the same in every row of a table; set it in base")
    source = given if given.keys() & {"rates", "multipliers"} else plan
    own = {key: source[key] for key in ("rates", "multipliers") if key in source}
    key = given.get("rate_key", plan.get("rate_key", "matrix_lr"))
    config = resolve(where, {**base, **settings})
    start = getattr(config, str(key), None)
    if not isinstance(start, float) or key in (*sweep_table.FIXED, *sweep_table.MODEL):
        raise BadInput(f"{where}: rate_key {key!r} is no knob of fractions, such as matrix_lr")
    if ("rates" in own) == ("multipliers" in own):
        raise BadInput(f"{where}: give rates (values of {key}) or multipliers (of its {start}), one of them")
    try:
        values = [float(x) * (1 if "rates" in own else start) for x in (*own.values(),)[0]]
    except (TypeError, ValueError):
        raise BadInput(f"{where}: rates and multipliers are lists of numbers") from None
    rates = tuple(str(float(f"{value:.6g}")) for value in sorted(set(values)))
    if not rates:
        raise BadInput(f"{where}: no rates to try")
    for rate in rates:
        resolve(where, {**base, **settings, key: rate})
    return Row(settings, key, rates)


def make_plan(raw: Mapping, where: str, sliding: bool = False) -> Plan:
    """The plan of a JSON object. BadInput names what is wrong with it."""
    unknown = sorted(set(raw) - PLAN_KEYS)
    if unknown:
        raise BadInput(f"{where}: unknown key {unknown[0]!r}; a plan has {', '.join(sorted(PLAN_KEYS))}")
    base = {key: str(value) for key, value in raw.get("base", {}).items()}
    for key in (*OWN_KEYS, *sweep_table.NAMES, *["eval_stride"] * (not sliding)):
        if key in base:
            raise BadInput(f"{where}: base sets {key}, which the sweep sets itself"
                           + " (--sliding leaves it alone)" * (key == "eval_stride"))
    base |= OWN_KEYS
    if not sliding:
        base["eval_stride"] = str(resolve(f"{where}: base", {**base, "eval_stride": "1"}).eval_seq_len)
    resolve(f"{where}: base", base)
    rows, seeds = raw.get("rows", {}), raw.get("seeds", [])
    if not isinstance(rows, dict) or not rows:
        raise BadInput(f"{where}: no rows; name some in the plan or with --row NAME:key=value,key=value")
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)
            and len(set(seeds)) == len(seeds)):
        raise BadInput(f"{where}: seeds must be a list of different whole numbers, got {seeds}")
    made = {name: make_row(name, given, raw, base) for name, given in rows.items()}
    return Plan(str(raw.get("name", "sweep")), base, made, tuple(seeds))


def read_plan(args: argparse.Namespace) -> tuple[Plan, str]:
    """The plan file with the command line's settings over it, and its default folder's name."""
    files = [word for word in args.words if "=" not in word]
    raw: dict = {"seeds": [1337]}
    if files:
        try:
            raw = json.loads(read_text(Path(files[0])))
        except ValueError as error:
            raise BadInput(f"{files[0]}: not JSON ({error})") from None
        if not isinstance(raw, dict) or not isinstance(raw.get("base", {}), dict):
            raise BadInput(f"{files[0]}: a plan is an object, and its base another")
    where = files[0] if files else "command line"
    raw["base"] = raw.get("base", {}) | dict(word.split("=", 1) for word in args.words if "=" in word)
    for text in args.row:
        name, _, settings = text.partition(":")
        pairs = [pair.partition("=") for pair in settings.split(",") if pair]
        raw["rows"] = raw.get("rows", {}) | {name: {key: value for key, _, value in pairs}}
    try:
        for key, kind in (("rates", float), ("multipliers", float), ("seeds", int)):
            if getattr(args, key):
                raw[key] = [kind(x) for x in getattr(args, key).split(",")]
    except ValueError as error:
        raise BadInput(f"--{key}: {error}; write numbers with commas between them") from None
    if args.key:
        raw["rate_key"] = args.key
    name = Path(files[0]).stem if files else "sweep"
    return make_plan({"name": name, **raw}, where, args.sliding), name


# ---- one worker: a device, its data, a model compiled once ---------------------------------------

class SweepLog(t.Log):
    """train_gpt.py's log, but its first entry, the script's source, is the source's hash: a sweep folder
    holds the script once, and runlog.parse_log puts it back."""

    def __init__(self, path: Path, m: t.Machine, source_sha: str) -> None:
        super().__init__(str(path), m)
        self.source_sha = source_sha

    def __call__(self, line: str, console: bool = True) -> None:
        if self.source_sha:
            line, self.source_sha = f"train_gpt.py sha256:{self.source_sha}", ""
        super().__call__(line, console)


def device_kind(m: t.Machine) -> str:
    """What must be equal for two clocks to compare: the GPU's name, or the processor's and its cores."""
    name = m.names["device"] if m.pin else t.machine_report(m).splitlines()[-1]
    return re.sub(r"\s+", " ", name.replace(":", " ")).strip()


def weights_sha256(model: t.GPT) -> str:
    """Hash of all parameters, in the order of their names."""
    digest = hashlib.sha256()
    for _, p in sorted(model.named_parameters()):
        digest.update(p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def entropy_bytes(raw: bytes) -> float:
    """Order-0 entropy of a byte string in bytes: what xz comes within a few percent of on int6 codes."""
    counts = np.bincount(np.frombuffer(raw, np.uint8), minlength=256)
    p = counts[counts > 0] / len(raw)
    return float(-(p * np.log2(p)).sum() * len(raw) / 8)


def code_entropy(run: t.Run, ema: t.Ema) -> tuple[float, int]:
    """(order-0 entropy in bits per weight, weights) of the int6 codes of the weights that are exported."""
    weights = ema.average if run.h.artifact_weights == "ema" else ema.params
    codes = [t.quantize(p, "int6", run.h.int6_step, run.grams.get(name))[0].cpu().numpy().tobytes()
             for (name, _), p in zip(run.model.named_parameters(), weights) if t.KINDS[name] == "int6"]
    raw = b"".join(codes)
    return 8 * entropy_bytes(raw) / len(raw), len(raw)


def model_of(h: t.Config) -> list:
    """What the machine's bindings and the compiled functions depend on."""
    return [getattr(h, key) for key in sweep_table.MODEL]


class Bench:
    """A device and its data, and the model that configurations are trained in, until one has another."""

    def __init__(self, h: t.Config, env: Mapping[str, str]) -> None:
        self.m, self.dataset, self.kept = t.init_machine(h, env), t.load_dataset(h), None
        self.kind, self.model = device_kind(self.m), model_of(h)
        # Each rate and rule is another graph of matrix_update, by four shapes; the default limit is 8.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 100_000

    def machine(self, h: t.Config) -> t.Machine:
        """The machine for a config's model: other heads or windows may bind other attention and kernels."""
        if not self.m.pin:
            return self.m
        ops, names = t.bind_ops(h, self.m.device)
        return dataclasses.replace(self.m, ops=ops, names=self.m.names | names)

    def prepare(self, h: t.Config, log: t.Log) -> t.Run:
        """start_run; where its model is the one before, its weights go into that and its compiled functions.

        A compiled function guards on types, shapes and the settings it reads, not on where parameters lie, so
        neither new contents nor Optimizer.rehome's new storage compile it again; settings it does read would.
        torch 2.13 would take a new model of the same shapes as well; to rely on identity alone is safer.
        """
        if model_of(h) != self.model:
            self.kept = self.model = None                   # what cannot be bound is tried again, or refused
            torch._dynamo.reset()
            gc.collect()
            self.m, self.model = self.machine(h), model_of(h)
        run = t.start_run(h, self.m, log, self.dataset, time.perf_counter())
        if self.kept is None:
            self.kept = run
            return run
        model, fresh = self.kept.model, dict(run.model.named_parameters())
        for name, value in vars(run.model).items():         # settings: h, and what follows from it
            if not name.startswith("_") and getattr(model, name) != value:
                setattr(model, name, value)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(fresh[name])
        return dataclasses.replace(run, model=model, loss_fn=self.kept.loss_fn, nats_fn=self.kept.nats_fn)

    def train(self, job: dict, folder: Path) -> None:
        """Trains and scores one configuration; its log appears in logs/ when it is complete.

        job: argv of the Config, and the pairs of the `sweep` line.
        """
        h = t.load_config(job["argv"], {})
        part, artifact = (folder / ".work" / f"{h.run_id}{end}" for end in (".part", ".int6.xz"))
        part.unlink(missing_ok=True)
        log = SweepLog(part, self.m, sha256(read_text(SCRIPT)))
        run = self.prepare(h, log)
        pairs = {**job["line"], "kind": self.kind, "init_sha256": weights_sha256(run.model)}
        log("sweep " + " ".join(f"{key}:{value}" for key, value in pairs.items()))
        if self.m.pin:
            torch.cuda.reset_peak_memory_stats()
        try:
            ema = t.train(run)
        except t.Fault:                                     # diverged; phases say when
            ema = None
        if ema is not None and all(bool(p.isfinite().all()) for p in run.model.parameters()):
            bits, weights = code_entropy(run, ema)
            log(f"sweep_codes entropy:{bits:.6f} int6_weights:{weights} int6_step:{h.int6_step}")
            t.conclude(run, ema, str(artifact))
            artifact.unlink()
        else:
            log(f"sweep_diverged steps:{run.phases['steps']} train_time:{run.phases['train']:.0f}ms")
        log.file.close()
        os.replace(part, folder / "logs" / f"{h.run_id}.txt")
        del run, ema
        gc.collect()                # the loader holds itself in a cycle, and with it two shards


def worker(folder: Path) -> int:
    """Reads requests from stdin, a JSON object a line, and answers each on stdout; prints go to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    bench, env = None, {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if bench is None:
                bench = Bench(t.load_config(job["argv"], {}), env)
                print(json.dumps({"kind": bench.kind}), file=answers, flush=True)
                continue
            bench.train(job, folder)
            answer = {"done": True}
        except t.InputError as error:
            answer = {"refused": str(error)}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


# ---- the parent: hands out configurations --------------------------------------------------------

class Jobs:
    """Which configuration is next. No processes, no clock: outcomes in, jobs out.

    outcomes: name -> val bpb of the finished ones, None for a diverged one. A job whose worker died twice is
    failed.
    """

    def __init__(self, plan: Plan, outcomes: Mapping[str, float | None]) -> None:
        self.plan, self.outcomes, self.failed = plan, dict(outcomes), set()
        self.deaths: dict[str, int] = {}
        self.running: set[str] = set()

    def wanted(self) -> list[Job]:
        """Configurations known to be needed, the first stage before the second."""
        first = self.plan.first_stage()
        settled = {*self.outcomes, *self.failed}
        second = []
        for seed in self.plan.seeds[1:]:
            for row, spec in self.plan.rows.items():
                trials = [job for job in first if job.row == row]
                scored = [(self.outcomes[job.name], float(job.rate), job.rate) for job in trials
                          if self.outcomes.get(job.name) is not None]
                if scored and all(job.name in settled for job in trials):
                    second.append(self.plan.job(row, min(scored)[2], seed))
        return first + second

    def open(self) -> list[Job]:
        """Those neither settled nor running."""
        busy = {*self.outcomes, *self.failed, *self.running}
        return [job for job in self.wanted() if job.name not in busy]

    def take(self, row: str = "") -> Job | None:
        """The next one, now running: at the seed whose turn it is, `row`'s if it is open. None: none at the moment."""
        jobs = self.open()
        job = next((job for job in jobs if (job.row, job.seed) == (row, jobs[0].seed)), jobs[0] if jobs else None)
        if job:
            self.running.add(job.name)
        return job

    def finish(self, job: Job, bpb: float | None) -> None:
        self.running.discard(job.name)
        self.outcomes[job.name] = bpb

    def fail(self, job: Job) -> None:
        self.running.discard(job.name)
        self.failed.add(job.name)

    def died(self, job: Job) -> bool:
        """The worker died at it: once more, by whoever is free, or failed. Whether it will be tried again."""
        self.running.discard(job.name)
        self.deaths[job.name] = self.deaths.get(job.name, 0) + 1
        if self.deaths[job.name] > 1:
            self.failed.add(job.name)
        return self.deaths[job.name] == 1

    @property
    def over(self) -> bool:
        """Nothing to do and nothing running that could make more."""
        return not self.running and not self.open()

    @property
    def left(self) -> int:
        """Configurations of the plan that are still to be finished, as far as is known."""
        lost = sum(len(self.plan.seeds) - 1 for row in self.plan.rows if self.hopeless(row))
        return max(0, self.plan.size - lost - len(self.outcomes) - len(self.failed))

    def hopeless(self, row: str) -> bool:
        """Whether no rate of the row has, or can still get, a score: it has no second stage."""
        trials = [job for job in self.plan.first_stage() if job.row == row]
        return all(job.name in self.failed or self.outcomes.get(job.name, 0.0) is None for job in trials)


def clock(seconds: float) -> str:
    """1:02:03"""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


class Sweep:
    """A plan, its folder and its workers; a thread serves each worker process, and restarts one that died."""

    def __init__(self, plan: Plan, folder: Path, workers: int = 1, budget: float = 0.0) -> None:
        self.plan, self.folder, self.count, self.budget = plan, folder, workers, budget
        self.lock = threading.Condition()
        self.processes: dict[int, subprocess.Popen] = {}
        self.durations: list[tuple[bool, float]] = []       # (first of its process, seconds)
        self.error, self.out_of_time, self.kind = "", False, ""
        self.began = time.monotonic()
        self.claim_folder()
        self.jobs = Jobs(plan, self.earlier())

    def claim_folder(self) -> None:
        """Makes the folder; BadInput when it belongs to another script or to a sweep that is running."""
        for sub in ("logs", ".work"):
            (self.folder / sub).mkdir(parents=True, exist_ok=True)
        self.guard = open(self.folder / ".work" / "lock", "w")
        try:
            import fcntl
            fcntl.flock(self.guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass                                            # Windows: nothing keeps two sweeps apart
        except OSError:
            raise BadInput(f"{self.folder}: another sweep is writing here; choose another --out") from None
        script = self.folder / "train_gpt.py"
        if not script.exists():
            shutil.copyfile(SCRIPT, script)
        elif script.read_bytes() != SCRIPT.read_bytes():
            raise BadInput(f"{script}: train_gpt.py has changed since this sweep began; choose another --out")

    def earlier(self) -> dict[str, float | None]:
        """Outcomes of the logs that are there. BadInput for one that this plan would not write."""
        seeds, out = [str(seed) for seed in self.plan.seeds], {}
        for run in sweep_table.read_runs(self.folder):
            row, rate = run.text("sweep", "row"), run.text("sweep", "rate")
            seed = run.text("sweep", "seed")
            known = row in self.plan.rows and rate in self.plan.rows[row].rates and seed in seeds
            if known:
                job = self.plan.job(row, rate, int(seed))
                config = dataclasses.asdict(t.load_config(list(job.argv), {}))
                known = all(run.config.get(key) == str(value) for key, value in config.items()
                            if key not in ("out_dir", "data_path", "tokenizer_path"))
            if not known or run.text("sweep", "baseline") != self.plan.baseline:
                raise BadInput(f"{run.path}: not of this plan; choose another --out")
            self.kind = self.kind or run.text("sweep", "kind")
            out[job.name] = None if sweep_table.diverged(run) else run.number("final_score", "val_bpb")
        return out

    # -- a worker process

    def start(self, index: int) -> subprocess.Popen:
        """A worker on device `index` of those this process may use."""
        allowed = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
        device = allowed[index % len(allowed)] if allowed else str(index)
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": device}
        if self.count > 1:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.count)))
        command = [sys.executable, str(Path(__file__).resolve()), "worker", str(self.folder)]
        with open(self.folder / ".work" / f"worker{index}.txt", "a") as console:
            process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=console, text=True, bufsize=1)
        self.processes[index] = process
        return process

    def ask(self, process: subprocess.Popen, request: dict) -> dict | None:
        """The worker's answer; None when it died instead."""
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline() or "null")
        except (OSError, ValueError):
            return None

    def run_on(self, index: int, job: Job) -> dict | None:
        """Has a worker train the job, starting the worker if there is none. Its answer, None when it died."""
        process, line = self.processes.get(index), {
            "plan": self.plan.name, "row": job.row, "baseline": self.plan.baseline,
            "key": self.plan.rows[job.row].key, "rate": job.rate, "seed": job.seed, "stage": job.stage,
            "workers": self.count}
        fresh = process is None or process.poll() is not None
        began = time.monotonic()
        if fresh:
            process = self.start(index)
            hello = self.ask(process, {"argv": job.argv})
            if hello is None or "refused" in hello:
                return hello
            with self.lock:
                self.kind = self.kind or hello["kind"]
                if hello["kind"] != self.kind:
                    return {"mixed": f"worker {index} runs on {hello['kind']}, other rows of this table on "
                                     f"{self.kind}; a table is of one kind of device: choose another --out "
                                     "or fewer --workers"}
        answer = self.ask(process, {"argv": job.argv, "line": line})
        if answer and "done" in answer:
            self.durations.append((fresh, time.monotonic() - began))
        return answer

    def serve(self, index: int) -> None:
        """A thread: jobs for one worker until there are none, or time is up, or the sweep stops."""
        try:
            row = ""                                        # its model is compiled here
            while (job := self.next_job(row)) is not None:
                row, answer = job.row, self.run_on(index, job)
                with self.lock:
                    self.settle(index, job, answer)
                    self.lock.notify_all()
        except Exception as error:                          # not lost in a thread: the sweep ends with it
            self.stop(f"{type(error).__name__}: {error}")
        process = self.processes.get(index)
        if process is not None:
            process.stdin.close()
            process.wait()

    def next_job(self, row: str = "") -> Job | None:
        """The next job, of this row if possible; waits while running ones may make more. None: all are done."""
        with self.lock:
            while not self.error and not self.jobs.over:
                late = self.budget and time.monotonic() - self.began + self.estimate() > self.budget
                if late and self.jobs.open():
                    self.out_of_time = True
                    return None
                job = self.jobs.take(row)
                if job is not None:
                    return job
                self.lock.wait(1.0)
            return None

    def settle(self, index: int, job: Job, answer: dict | None) -> None:
        """Notes how a job ended and says so."""
        if self.error:
            return
        if answer is None:
            end = self.processes[index].wait()
            again = "another try" if self.jobs.died(job) else "failed"
            self.say(f"{job.name}: worker {index} died (status {end}, {self.console(index)}): {again}")
        elif "mixed" in answer:
            self.stop(answer["mixed"])
        elif "refused" in answer:
            self.jobs.fail(job)
            self.stop(answer["refused"])
        else:
            run = sweep_table.finished(self.folder / "logs" / f"{job.name}.txt")
            lost = sweep_table.diverged(run)
            told = None if lost else sweep_table.figures(run)
            self.jobs.finish(job, None if lost else told["val_bpb"])
            what = "diverged" if lost else (f"val_bpb {told['val_bpb']:.4f}, {told['steps']} steps of "
                                            f"{told['step_ms']:.1f} ms")
            self.say(f"{job.name}: {what}; {clock(self.seconds_left())} left")

    def console(self, index: int) -> str:
        """The last line that a worker printed."""
        lines = read_text(self.folder / ".work" / f"worker{index}.txt").split("\n")
        return next((line.strip()[:160] for line in reversed(lines) if line.strip()), "it printed nothing")

    def say(self, text: str) -> None:
        print(f"[{len(self.jobs.outcomes)}/{self.plan.size}] {text}", flush=True)

    def stop(self, error: str) -> None:
        """Ends the sweep: no more jobs, workers killed."""
        self.error = self.error or error
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()

    def estimate(self) -> float:
        """Seconds that a configuration takes: the longest so far, starts of workers aside if possible."""
        warm = [seconds for fresh, seconds in self.durations if not fresh]
        limit = resolve("base", self.plan.base).max_wallclock_seconds
        return max(warm or [seconds for _, seconds in self.durations] or [limit])

    def seconds_left(self) -> float:
        """Until the plan is done, workers side by side."""
        times = [seconds for fresh, seconds in self.durations if not fresh] or [s for _, s in self.durations]
        return self.jobs.left * sum(times) / max(len(times), 1) / self.count

    def run(self) -> int:
        """Trains what is missing and writes the tables. Exit status 1 when a configuration failed."""
        plan = self.plan
        print(f"sweep {plan.name}: {len(plan.rows)} rows, {plan.size} configurations, "
              f"{len(self.jobs.outcomes)} of them there already; {self.count} "
              f"worker{'s' * (self.count > 1)}; {self.folder}", flush=True)
        threads = [threading.Thread(target=self.serve, args=(i,), daemon=True) for i in range(self.count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            self.stop("interrupted; the same command goes on with what is missing")
        if self.error:
            raise BadInput(self.error)
        if self.out_of_time:
            print(f"budget of {self.budget:g} s: {self.jobs.left} configurations not begun; the same command "
                  "goes on with them", flush=True)
        table = sweep_table.sweep_table(self.folder)
        print("\n".join(sweep_table.markdown(table)))
        print(f"tables: {self.folder / 'README.md'}, {self.folder / 'table.json'}; picture: "
              f"{self.folder / 'curves.png'}", flush=True)
        for name in sorted(self.jobs.failed):
            print(f"failed: {name} (its output is in {self.folder / '.work'})", flush=True)
        if not self.jobs.failed:
            self.guard.close()
            shutil.rmtree(self.folder / ".work", ignore_errors=True)
        return 1 if self.jobs.failed else 0


def command(args: argparse.Namespace) -> int:
    """The verb: a plan to train, or a folder whose tables are written again. BadInput for what is neither."""
    files = [word for word in args.words if "=" not in word]
    if len(files) > 1:
        raise BadInput(f"{files[1]}: one plan at a time; settings are key=value")
    if files and Path(files[0]).is_dir():
        table = sweep_table.sweep_table(Path(files[0]))
        print("\n".join(sweep_table.markdown(table)))
        return 0
    if args.workers < 1 or args.budget < 0:
        raise BadInput("--workers is 1 or more, --budget seconds")
    views.pyplot()                                          # no matplotlib: said now, not after hours
    plan, name = read_plan(args)
    folder = Path(args.out) if args.out else Path("logs", "sweeps", name)
    return Sweep(plan, folder, args.workers, args.budget).run()


if __name__ == "__main__":
    if sys.argv[1:2] != ["worker"] or len(sys.argv) != 3:
        sys.exit("this is `record.py sweep`: ./run.sh record sweep --help")
    sys.exit(worker(Path(sys.argv[2])))
