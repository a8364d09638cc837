"""Sweeps: fair starts, one compilation, a folder that resumes, survives dead workers and proves itself."""

import dataclasses
import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gpt as t
from helpers import english_args, english_dataset
from lab import sweep
from lab.training import planning
from lab.training.worker import Worker, entropy_bytes, weights_sha256
from ledger import record
from ledger.make import sweep_table
from ledger.prove import sweep_claims
from ledger.read import runlog
from script import ROOT, TRAINER

STEPS = 14
LINE = dict(plan="p", row="r", baseline="r", key="matrix_lr", rate="0.02", seed=1, stage=1, workers=1)


def base(**knobs):
    """Return the settings of all rows: a tiny model on the English dataset."""
    args = english_args(iterations=STEPS, val_loss_every=5, warmup_steps=1)
    given = dict(arg.split("=", 1) for arg in args)
    del given["run_id"]
    del given["eval_stride"]
    return given | knobs


def raw_plan(**change):
    """Return the JSON object of a plan: two rows, two rates, two seeds."""
    plan = {
        "name": "tiny",
        "base": base(),
        "rates": [0.02, 0.04],
        "seeds": [1, 2],
        "rows": {"ns5": {}, "turbo": {"ortho": "turbo"}},
    }
    return plan | change


def tiny_plan(**change):
    """Return `raw_plan` as a Plan."""
    return planning.make_plan(t, raw_plan(**change), "plan")


def final(log):
    """Return the pairs of the final_score line of a log."""
    lines = log.read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith("final_score ")]
    return dict(re.findall(r"(\w+):(\S+)", line))


def step_lines(log):
    """Return the step lines of a log without their times."""
    lines = log.read_text(encoding="utf-8").splitlines()
    return [line.split(" train_time")[0] for line in lines if line.startswith("step:")]


def no_sweep_starts(monkeypatch):
    """Fail the test if a sweep starts a worker."""
    monkeypatch.setattr(sweep.Sweep, "start", lambda *_: pytest.fail("a worker was started"))


# ---------------------------------------------------------------- one device, one model


@pytest.fixture(scope="module")
def worker():
    """Make a worker in this process."""
    h = t.load_config(list(tiny_plan().configuration("ns5", "0.02", 1).argv), {})
    yield Worker(t, h, {})
    torch.distributed.destroy_process_group()


def folder_for(tmp_path):
    """Make the folder of a sweep that trains with the repository's script."""
    for sub in ("logs", ".work"):
        (tmp_path / sub).mkdir()
    shutil.copyfile(TRAINER, tmp_path / "train_gpt.py")
    return tmp_path


def test_a_sweep_trains_what_train_trains(worker, tmp_path):
    """The two agree bit for bit, for the first configuration of a process and for a later one."""
    plan = tiny_plan()
    folder = folder_for(tmp_path)
    configurations = [
        plan.configuration("ns5", "0.02", 1),
        plan.configuration("turbo", "0.04", 2),
        plan.configuration("ns5", "0.04", 1),
    ]
    for configuration in configurations:
        worker.train({"argv": configuration.argv, "line": LINE}, folder)
    torch.distributed.destroy_process_group()

    def log_of(configuration):
        return folder / "logs" / f"{configuration.name}.txt"

    def start(configuration):
        return runlog.parse_log(log_of(configuration)).text("sweep", "init_sha256")

    for configuration in configurations[:2]:
        assert t.main([*configuration.argv, f"out_dir={tmp_path}/alone"]) == 0
        log = log_of(configuration)
        alone = tmp_path / "alone" / log.name
        assert final(alone)["metric"] == "int6_lzma_chunked"
        for key in ("val_loss", "val_bpb", "steps", "sha256", "bytes_total", "seed"):
            assert final(alone)[key] == final(log)[key], (configuration.name, key)

        assert len(step_lines(alone)) > STEPS
        assert step_lines(alone) == step_lines(log)
        h = t.load_config(list(configuration.argv), {})
        assert start(configuration) == weights_sha256(t.GPT(h))

    assert start(configurations[0]) == start(configurations[2]) != start(configurations[1])
    worker.m = t.init_machine(t.load_config(list(configurations[0].argv), {}), {})
    assert list((folder / ".work").iterdir()) == []  # no artifact is left


def test_one_model_holds_all_configurations(worker, tmp_path):
    """What a version of torch may guard on stays the same: the identity of the module and of parameters."""
    plan = tiny_plan()
    runs = []
    parameters = []
    for configuration in (plan.configuration("ns5", "0.02", 1), plan.configuration("turbo", "0.04", 2)):
        h = t.load_config(list(configuration.argv), {})
        runs.append(worker.prepare(h, t.Log(str(tmp_path / configuration.name), worker.m)))
        parameters.append([id(p) for p in runs[-1].model.parameters()])
        assert runs[-1].h == runs[-1].model.h == h
        t.Optimizer(runs[-1].model, h, worker.m)
    assert runs[0].model is runs[1].model is worker.kept.model
    assert parameters[0] == parameters[1]
    assert runs[0].loss_fn is runs[1].loss_fn and runs[0].nats_fn is runs[1].nats_fn


def test_entropy_bytes():
    assert entropy_bytes(b"a" * 100) == 0.0
    assert entropy_bytes(bytes(range(256)) * 4) == pytest.approx(1024.0)
    bits = 0.25 * 2 + 0.75 * math.log2(4 / 3)  # per letter of aaab
    assert entropy_bytes(b"aaab" * 10) == pytest.approx(40 * bits / 8)


def test_the_entropy_is_that_of_the_artifacts_codes(worker, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(Path, "unlink", lambda p, **_: kept.append(p.read_bytes()) if p.exists() else None)
    configuration = tiny_plan().configuration("ns5", "0.02", 1)
    folder = folder_for(tmp_path)
    worker.train({"argv": configuration.argv, "line": LINE}, folder)
    header, payload = t.open_artifact(kept[-1])
    codes = b""
    for _, kind, shape, offset in header["tensors"]:
        codes += payload[offset : offset + torch.Size(shape).numel()] if kind == "int6" else b""
    run = runlog.parse_log(folder / "logs" / f"{configuration.name}.txt")
    assert run.count("sweep_codes", "int6_weights") == len(codes)
    assert run.number("sweep_codes", "entropy") == pytest.approx(
        8 * entropy_bytes(codes) / len(codes), abs=1e-6
    )


def test_nothing_of_the_model_is_compiled_twice(worker, tmp_path, monkeypatch):
    """A new seed or rate compiles no graph, a new row only those of the matrix update."""
    from torch._dynamo.backends.debugging import aot_eager

    counts = {}
    backends = {}

    def compiler(f):
        def backend(graph, inputs, name=f.__name__):
            counts[name] = counts.get(name, 0) + 1
            return aot_eager(graph, inputs)

        return torch.compile(
            f, backend=backends.setdefault(f.__name__, backend), dynamic=False, fullgraph=True
        )

    monkeypatch.setattr(worker, "m", dataclasses.replace(worker.m, compile=compiler))
    monkeypatch.setattr(worker, "kept", None)
    one_layer = base(iterations=2, val_loss_every=0, num_layers=1, xsa_last_n=1, ve_last_n=1)
    rows = {name: {"ortho": name} for name in ("ns5", "turbo", "mud")}
    plan = tiny_plan(base=one_layer, rows=rows)
    folder = folder_for(tmp_path)

    def graphs(row, rate, seed):
        """Train a configuration and return {function: graphs compiled for it}."""
        before = dict(counts)
        worker.train({"argv": plan.configuration(row, rate, seed).argv, "line": LINE}, folder)
        new = {name: count - before.get(name, 0) for name, count in counts.items()}
        return {name: count for name, count in new.items() if count}

    first = graphs("ns5", "0.02", 1)
    assert set(first) == {"loss", "nats", "adam_update", "matrix_update"}
    assert first["loss"] == 1
    assert graphs("ns5", "0.02", 2) == {}
    matrices = first["matrix_update"]
    assert graphs("ns5", "0.04", 1) == {}
    assert graphs("turbo", "0.02", 1) == graphs("mud", "0.02", 1) == {"matrix_update": matrices}
    assert 3 * matrices > 8  # more than torch's default limit, which is an error with fullgraph
    assert graphs("turbo", "0.04", 2) == {}
    plan = tiny_plan(base=one_layer, rows=rows | {"masks": {"attn_windows": "4"}})
    assert graphs("masks", "0.02", 1) == first and graphs("masks", "0.02", 2) == {}
    for log in (folder / "logs").iterdir():
        assert not runlog.parse_log(log).late
    torch._dynamo.reset()


def test_a_row_may_have_a_model_of_its_own(worker, tmp_path):
    """Among rows of the first model, each trains what train trains, and the table says what differs."""
    rows = {
        "ns5": {},
        "masks": {"attn_windows": "4 0", "doc_mask": "1"},
        "heads": {"num_heads": "2", "num_kv_heads": "1"},
    }
    plan = tiny_plan(rows=rows, rates=[0.02])
    folder = folder_for(tmp_path)
    configurations = [
        plan.configuration(row, "0.02", seed)
        for row, seed in (("ns5", 1), ("masks", 1), ("heads", 1), ("heads", 2), ("ns5", 2))
    ]
    for configuration in configurations:
        own = {key: getattr(configuration, key) for key in ("row", "seed", "stage")}
        line = LINE | own | {"baseline": "ns5"}
        worker.train({"argv": configuration.argv, "line": line}, folder)
    torch.distributed.destroy_process_group()
    for configuration in configurations:
        assert t.main([*configuration.argv, f"out_dir={tmp_path}/alone"]) == 0
        alone = final(tmp_path / "alone" / f"{configuration.name}.txt")
        log = final(tmp_path / "logs" / f"{configuration.name}.txt")
        assert all(alone[key] == log[key] for key in ("val_bpb", "steps", "sha256")), configuration.name

    worker.m = t.init_machine(t.load_config(list(configurations[0].argv), {}), {})
    table = sweep_table.build_table(sweep_table.read_runs(folder))
    found = {row["name"]: (row["changes"], row["own_init"]) for row in table["rows"]}
    assert found["masks"] == ({"attn_windows": "4 0", "doc_mask": "True"}, False)
    assert found["heads"] == ({"num_heads": "2", "num_kv_heads": "1"}, True)
    assert "num_layers" in table["config"]
    assert not {"num_heads", "doc_mask"} & table["config"].keys()


def test_a_gpu_binds_its_kernels_again_for_another_model(worker, monkeypatch):
    """Heads of another size, or windows, may take another attention kernel."""
    bound = []

    def bind_ops(h, device):
        bound.append(f"attention{h.head_dim}")
        return t.Ops(qk=len), {"attention": bound[-1]}

    monkeypatch.setattr(t, "bind_ops", bind_ops)
    monkeypatch.setattr(worker, "m", dataclasses.replace(worker.m, pin=True))
    m = worker.machine_for(t.load_config(["num_heads=4", "num_kv_heads=2"], {}))
    assert bound == ["attention128"]
    assert m.ops.qk is len
    assert m.names["attention"] == "attention128"
    assert m.names["device"] == worker.m.names["device"]


def test_a_model_that_cannot_be_bound_is_refused_each_time(worker, tmp_path, monkeypatch):
    """Its second seed must not train with the kernels of an earlier model."""

    def refused(h):
        raise t.InputError("no attention kernel")

    monkeypatch.setattr(worker, "machine_for", refused)
    h = t.load_config([*english_args(), "attn_windows=4"], {})
    for _ in range(2):
        with pytest.raises(t.InputError, match="no attention kernel"):
            worker.prepare(h, t.Log(str(tmp_path / "log.txt"), None))


def test_weights_that_are_no_numbers_are_a_result(worker, tmp_path, monkeypatch):
    plan = tiny_plan(base=base(iterations=2))
    folder = folder_for(tmp_path)
    real = t.train

    def broken(run):
        ema = real(run)
        run.model.qo_bank.data[0] = float("nan")
        return ema

    monkeypatch.setattr(t, "train", broken)
    lost = plan.configuration("turbo", "0.04", 1)
    worker.train({"argv": lost.argv, "line": LINE | dict(row="turbo", rate="0.04", baseline="ns5")}, folder)
    monkeypatch.setattr(t, "train", real)
    for row, rate in (("ns5", "0.02"), ("turbo", "0.02")):
        line = LINE | dict(row=row, rate=rate, baseline="ns5")
        worker.train({"argv": plan.configuration(row, rate, 1).argv, "line": line}, folder)
    table = sweep_table.write_tables(folder)
    rows = {row["name"]: row for row in table["rows"]}
    assert table["diverged"] == 1 and rows["turbo"]["rates"]["0.04"] is None
    assert rows["turbo"]["best_rate"] == "0.02" and rows["turbo"]["edge"]
    assert "0.04: diverged" in (folder / "README.md").read_text()
    assert not [row for row in sweep_claims.examine_sweep(folder) if row[0] == "fail"]


def test_training_that_diverges_is_a_result_at_the_step_where_it_stopped(worker, tmp_path, monkeypatch):
    plan = tiny_plan(base=base(iterations=9))
    folder = folder_for(tmp_path)
    real = t.train_step

    def broken(backward, optimizer, batch, hp):
        loss = real(backward, optimizer, batch, hp)
        return loss * float("nan") if optimizer.steps == 3 else loss

    monkeypatch.setattr(t, "train_step", broken)
    lost = plan.configuration("turbo", "0.04", 1)
    worker.train({"argv": lost.argv, "line": LINE | dict(row="turbo", rate="0.04", baseline="ns5")}, folder)
    run = sweep_table.finished(folder / "logs" / f"{lost.name}.txt")
    assert sweep_table.diverged(run) and run.text("sweep_diverged", "steps") == "4"  # known one step later


# ---------------------------------------------------------------- who is next


def outcome(configuration):
    """Return a made-up bpb: the middle rate of ns5 and the last of turbo are best."""
    bpb = {
        "ns5": {"0.01": 1.3, "0.02": 1.1, "0.04": 1.2},
        "turbo": {"0.01": 1.3, "0.02": 1.2, "0.04": 1.1},
    }
    return bpb[configuration.row][configuration.rate]


def three_rates(**change):
    """Return a plan of three rates and three seeds."""
    return tiny_plan(rates=[0.01, 0.02, 0.04], seeds=[1, 2, 3], **change)


def test_the_second_stage_takes_the_best_rate_of_each_row():
    queue = planning.Queue(three_rates(), {})
    order = []
    while (configuration := queue.take()) is not None:
        order.append(configuration)
        queue.finish(configuration, outcome(configuration))

    # all rows at the middle first
    assert [configuration.rate for configuration in order[:6]] == ["0.02"] * 2 + ["0.01"] * 2 + ["0.04"] * 2
    assert [configuration.name for configuration in order[6:]] == [
        "ns5_0.02_seed2", "turbo_0.04_seed2", "ns5_0.02_seed3", "turbo_0.04_seed3",
    ]  # fmt: skip
    assert [configuration.stage for configuration in order] == [1] * 6 + [2] * 4
    assert queue.over
    assert queue.left == 0
    assert len(order) == three_rates().size


def test_a_second_stage_waits_for_its_own_row_only():
    queue = planning.Queue(three_rates(), {})
    taken = [queue.take() for _ in range(6)]
    assert queue.take() is None and not queue.over
    for configuration in taken:
        if configuration.row == "ns5":
            queue.finish(configuration, outcome(configuration))
    assert queue.take().name == "ns5_0.02_seed2"


def test_a_worker_keeps_its_row_while_the_seed_has_it():
    queue = planning.Queue(three_rates(), {})
    while len(queue.outcomes) < 6:
        first = queue.take("turbo")
        # no seed before the one whose turn it is
        assert first.row == ("ns5" if len(queue.outcomes) > 2 else "turbo")
        queue.finish(first, outcome(first))
    assert [queue.take(row).name for row in ("turbo", "turbo", "turbo", "")] == [
        "turbo_0.04_seed2", "ns5_0.02_seed2", "turbo_0.04_seed3", "ns5_0.02_seed3",
    ]  # fmt: skip


def test_a_dead_worker_costs_one_more_try_then_the_configuration():
    queue = planning.Queue(three_rates(), {})
    configuration = queue.take()
    assert queue.died(configuration) and queue.take() == configuration
    assert not queue.died(configuration)
    assert configuration.name in queue.failed and queue.take() != configuration
    queue.running.clear()
    while (following := queue.take()) is not None:
        queue.finish(following, outcome(following))
    assert queue.over and queue.left == 0  # its row goes on with the rates that are left
    second_seeds = {name for name in queue.outcomes if name.startswith("ns5") and "seed2" in name}
    assert second_seeds == {"ns5_0.04_seed2"}


def test_a_row_that_diverges_everywhere_has_no_second_stage():
    queue = planning.Queue(three_rates(), {})
    while (configuration := queue.take()) is not None:
        queue.finish(configuration, None if configuration.row == "turbo" else outcome(configuration))
    assert queue.over and queue.left == 0
    assert not [name for name in queue.outcomes if "turbo" in name and "seed2" in name]


def test_the_budget_begins_nothing_that_would_end_late(tmp_path, monkeypatch, capsys):
    plan = three_rates(base=base(max_wallclock_seconds="100"))
    running = sweep.Sweep(plan, tmp_path / "s", 1, budget=150)
    assert running.next_configuration() is not None and not running.out_of_time
    running.cold_seconds.append(400.0)
    running.warm_seconds.append(60.0)
    assert running.estimate() == 60.0  # the first of a process also compiles
    running.began -= 100
    assert running.next_configuration() is None and running.out_of_time
    running.budget = 200
    assert running.next_configuration() is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_workers_at_once(number):
    def serve(index):
        os.kill(os.getpid(), number)
        time.sleep(30)

    reasons = []
    before = signal.getsignal(signal.SIGTERM)
    began = time.monotonic()
    sweep.Sweep.train(SimpleNamespace(serve=serve, workers=1, stop=reasons.append))
    assert reasons == ["interrupted; the same command continues with what is missing"]
    assert time.monotonic() - began < 5 and signal.getsignal(signal.SIGTERM) is before


def is_alive(pid):
    """Whether a process runs; one that ended and waits for its parent does not."""
    asked = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return asked.stdout.strip()[:1] not in ("", "Z")


@pytest.mark.slow
def test_sigterm_to_the_command_ends_sweep_and_worker(tmp_path):
    """Through the one command, in the middle of a configuration."""
    plan = raw_plan(base=base(iterations=1_000_000, max_wallclock_seconds=60))
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    words = ["record", "sweep", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]
    command = [sys.executable, str(ROOT / "tools" / "cli.py"), *words]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    console = tmp_path / "out" / ".work" / "worker0.txt"
    deadline = time.monotonic() + 90
    while not (console.exists() and "step:1/" in console.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    found = subprocess.run(["pgrep", "-f", f"lab.training.worker {tmp_path}"], capture_output=True, text=True)
    (worker,) = map(int, found.stdout.split())
    try:
        parent.send_signal(signal.SIGTERM)
        _, said = parent.communicate(timeout=10)
        assert not is_alive(worker)
        assert parent.returncode == 2
        assert said == "record: interrupted; the same command continues with what is missing\n"
    finally:
        if is_alive(worker):
            os.kill(worker, signal.SIGKILL)


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(rows={"a": {"orto": "ns5"}}), r"row a: unknown config key 'orto'"),
        (dict(rows={"a": {"ortho": "none"}}), r"row a: config key ortho: 'none'"),
        (dict(rows={"a": {"train_seq_len": 8}}), r"row a: train_seq_len is the same in every row"),
        (dict(rows={"a": {"num_heads": 3}}), r"row a: .*num_heads must divide"),
        (dict(rate_key="mlp_mult"), r"rate_key 'mlp_mult'"),
        (dict(rows={"a": {"seed": 3}}), r"row a: seed is the same in every row"),
        (dict(rows={"a/b": {}}), r"row a/b: a row's name"),
        (dict(rows={"..": {}}), r"row \.\.: a row's name"),
        (dict(rows={"a\n": {}}), r"row a\\n: a row's name"),
        (dict(name="../x"), r"plan: name '../x': it becomes a file name"),
        (dict(name=""), r"plan: name '': it becomes a file name"),
        (dict(rows={}), r"no rows"),
        (dict(rates=[]), r"no rates"),
        (dict(rates=["x"]), r"lists of numbers"),
        (dict(rates=[-1]), r"config key matrix_lr"),
        (dict(multipliers=[1]), r"rates .* or multipliers"),
        (dict(rate_key="ortho"), r"rate_key 'ortho'"),
        (dict(seeds=[1, 1]), r"seeds must be"),
        (dict(base=base(fit_cap="1")), r"base sets fit_cap"),
        (dict(base=base(iterations="x")), r"plan: base: config key iterations"),
        (dict(colour="red"), r"unknown key 'colour'"),
    ],
)
def test_a_bad_plan_is_one_line(change, says):
    with pytest.raises(runlog.BadInput, match=says) as caught:
        tiny_plan(**change)
    assert "\n" not in str(caught.value)


def test_rates_are_values_or_multiples_of_a_rows_own():
    rows = {"ns5": {}, "slow": {"matrix_lr": 0.1}, "own": {"rates": [0.3], "rate_key": "embed_lr"}}
    raw = raw_plan(rows=rows, multipliers=[0.5, 2])
    del raw["rates"]
    plan = planning.make_plan(t, raw, "plan")
    default = t.Config().matrix_lr
    assert plan.rows["ns5"].rates == (f"{default / 2:g}", f"{default * 2:g}")
    assert plan.rows["slow"].rates == ("0.05", "0.2")
    assert (plan.rows["own"].rate_key, plan.rows["own"].rates) == ("embed_lr", ("0.3",))
    h = t.load_config(list(plan.configuration("slow", "0.2", 2).argv), {})
    assert (h.matrix_lr, h.seed, h.eval_stride, h.fit_cap) == (0.2, 2, h.eval_seq_len, False)
    with pytest.raises(runlog.BadInput, match="--sliding"):
        planning.make_plan(t, raw | dict(base=base(eval_stride=8)), "plan")
    sliding = planning.make_plan(t, raw | dict(base=base(eval_stride=8)), "plan", sliding=True)
    assert t.load_config(list(sliding.configuration("ns5", "0.05", 1).argv), {}).eval_stride == 8


def test_the_command_line_can_be_the_plan():
    words = [f"{k}={v}" for k, v in base().items()]
    options = "--row ns5 --row b:ortho=turbo,step_rule=normuon --rates 0.1,0.2 --seeds 5".split()
    args = sweep.argument_parser().parse_args([*words, *options])
    plan = planning.read_plan(t, args)
    assert plan.size == 4
    assert plan.seeds == (5,)
    assert plan.baseline == "ns5"
    h = t.load_config(list(plan.configuration("b", "0.2", 5).argv), {})
    assert (h.ortho, h.step_rule, h.matrix_lr) == ("turbo", "normuon", 0.2)
    assert h.data_path == english_dataset().path


def test_settings_may_follow_options(tmp_path, capsys):
    status = sweep.main([str(tmp_path / "none.json"), "--workers", "2", "preset=cpu"])
    assert status == 2 and "none.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sweep.main(["a.json", "--wrong"])
    with pytest.raises(SystemExit):
        record.main(["verify", "--quiet", "x", "--wrong", "y"])


@pytest.mark.parametrize("change, name", [({}, "tiny"), ({"name": None}, "the-file")])
def test_the_folder_has_the_name_of_the_plan(change, name, tmp_path, monkeypatch):
    """A plan that names itself beats the name of its file."""
    raw = {key: value for key, value in raw_plan(**change).items() if value is not None}
    file = tmp_path / "the file.json"
    file.write_text(json.dumps(raw))
    folders = []
    monkeypatch.setattr(sweep.Sweep, "claim_folder", lambda self: folders.append(self.folder))
    monkeypatch.setattr(sweep.Sweep, "run", lambda self: 0)
    monkeypatch.chdir(tmp_path)
    assert sweep.main([str(file)]) == 0
    assert folders == [Path("logs/sweeps") / name]


@pytest.mark.parametrize("path", sorted((ROOT / "records" / "plans").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_plans(path):
    """Every plan resolves with train_gpt.py's knobs, no two rows are alike, and the first is the base."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert raw["name"] == path.stem
    assert [*raw["rows"].values()][0] == {}
    assert raw["seeds"] == [1337, 42, 2025]
    plan = planning.make_plan(t, raw, path.name)
    count = len(raw["multipliers"])
    assert count in (1, 3) and all(len(row.rates) == count for row in plan.rows.values())
    assert len(set(map(repr, plan.rows.values()))) == len(plan.rows)


def test_every_knob_of_the_model_is_one_that_compiles_or_one_that_no_row_may_set():
    knobs = {f.name for f in dataclasses.fields(t.Config)}
    fixed = set(sweep_table.FIXED)
    model = set(sweep_table.MODEL)
    assert {*t.MODEL_FIELDS, *t.EXTRA_FIELDS} <= fixed | model <= knobs
    assert set(sweep_table.NAMES) <= knobs and not fixed & model


def test_tables_need_no_torch(folder):
    """`record sweep FOLDER` in a process of its own, from another folder."""
    code = (
        "import sys\nfrom lab import sweep\n"
        f"assert sweep.main([{str(folder)!r}]) == 0\nassert 'torch' not in sys.modules"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "tools")}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "| ns5 |" in done.stdout, done.stderr


# ---------------------------------------------------------------- a folder, end to end


def kill_first_worker(running, folder, thread):
    """Kill the first worker of a sweep once a configuration has begun, and return its process."""
    deadline = time.monotonic() + 60
    while thread.is_alive() and time.monotonic() < deadline:
        if list((folder / ".work").glob("*.part")):
            victim = running.processes[0]
            os.kill(victim.pid, signal.SIGKILL)
            return victim
        time.sleep(0.002)
    return None


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Run two rows, two rates and two seeds on two workers, one of which is killed at its start.

    Returns the folder, what the sweep `printed`, its exit status and the victim's process.
    """
    folder = tmp_path_factory.mktemp("sweep") / "Tiny"
    printed = []
    status = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        running = sweep.Sweep(tiny_plan(), folder, workers=2)
        running.say = printed.append
        thread = threading.Thread(target=lambda: status.append(running.run()))
        thread.start()
        victim = kill_first_worker(running, folder, thread)
        thread.join(90)
    assert not thread.is_alive()
    return SimpleNamespace(folder=folder, printed=printed, status=status, victim=victim)


@pytest.fixture
def folder(done, tmp_path):
    return Path(shutil.copytree(done.folder, tmp_path / "records" / "sweeps" / "Tiny"))


def edit(path, pattern, new):
    """Replace the first match of the pattern, which must be in the file."""
    text, count = re.subn(pattern, new, path.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    assert count, pattern
    path.write_text(text, encoding="utf-8")


def failed(folder):
    """Return the claims of a sweep folder that fail."""
    return {claim for status, claim, _ in sweep_claims.examine_sweep(folder) if status == "fail"}


def test_the_configuration_of_a_killed_worker_is_trained_by_another(done):
    assert done.status == [0] and done.victim.returncode == -signal.SIGKILL
    deaths = [line for line in done.printed if "died" in line]
    assert len(deaths) == 1 and deaths[0].endswith("another try"), done.printed
    again = deaths[0].split(":")[0]
    assert len([line for line in done.printed if line.startswith(f"{again}: val_bpb")]) == 1
    scores = [line for line in done.printed if "val_bpb" in line]
    assert all(re.search(r"\d:\d\d:\d\d left$", line) for line in scores)


def test_the_folder_holds_every_configuration_and_proves_itself(done):
    names = sorted(p.name for p in (done.folder / "logs").iterdir())
    assert len(names) == 6 and sum("seed2" in n for n in names) == 2
    assert sorted(p.name for p in done.folder.iterdir()) == [
        "README.md", "curves.png", "logs", "table.json", "train_gpt.py",
    ]  # fmt: skip
    assert all(len((done.folder / "logs" / n).read_bytes()) < 10_000 for n in names)
    rows = sweep_claims.examine_sweep(done.folder)
    assert [row for row in rows if row[0] != "ok"] == []
    assert len(rows) == len(sweep_claims.CLAIMS)
    source = runlog.parse_log(done.folder / "logs" / names[0]).source
    assert source == (ROOT / "train_gpt.py").read_text(encoding="utf-8")


def test_the_table_says_what_the_logs_say(done):
    table = json.loads((done.folder / "table.json").read_text())
    assert table == sweep_table.build_table(sweep_table.read_runs(done.folder))
    assert (table["workers"], table["baseline"], table["configurations"]) == ([2], "ns5", 6)
    assert table["equal_step"] == STEPS and table["metric"] == "int6_lzma_chunked"

    def bpb_of(row, rate, seed):
        return float(final(done.folder / "logs" / f"{row}_{rate}_seed{seed}.txt")["val_bpb"])

    for row in table["rows"]:
        tried = {rate: bpb_of(row["name"], rate, 1) for rate in ("0.02", "0.04")}
        assert row["rates"] == tried
        assert row["best_rate"] == min(tried, key=tried.get)
        assert row["edge"]
        both = [bpb_of(row["name"], row["best_rate"], seed) for seed in (1, 2)]
        assert row["val_bpb"]["mean"] == pytest.approx(sum(both) / 2, abs=1e-8)
        assert row["val_bpb"]["std"] == pytest.approx(abs(both[0] - both[1]) / 2**0.5, abs=1e-8)
        assert row["at_step"]["mean"] == pytest.approx(row["live"]["mean"], abs=1e-4)
        assert row["seeds"] == [1, 2]
        assert not row["own_init"]
        assert row["diverged"] == 0

    rows = {row["name"]: row for row in table["rows"]}
    ns5 = rows["ns5"]
    turbo = rows["turbo"]
    assert turbo["changes"] == {"ortho": "turbo"}
    assert ns5["changes"] == {}
    assert ns5["versus"] is None
    gap = turbo["val_bpb"]["mean"] - ns5["val_bpb"]["mean"]
    assert turbo["versus"]["diff"] == pytest.approx(gap, abs=2e-8)
    assert 0 < turbo["versus"]["paired_p"] < 1 and 0 < turbo["versus"]["welch_p"] < 1


def test_rows_start_from_the_same_weights(done):
    runs = sweep_table.read_runs(done.folder)
    by_seed = {}
    for run in runs:
        by_seed.setdefault(run.text("sweep", "seed"), set()).add(run.text("sweep", "init_sha256"))
    assert all(len(hashes) == 1 for hashes in by_seed.values())
    assert by_seed["1"] != by_seed["2"]
    for run in runs:
        h = t.load_config([f"{k}={v}" for k, v in run.config.items()], {})
        assert run.text("sweep", "init_sha256") == weights_sha256(t.GPT(h))


def test_a_rerun_trains_nothing(folder, monkeypatch, capsys):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    no_sweep_starts(monkeypatch)
    assert sweep.Sweep(tiny_plan(), folder, workers=2).run() == 0
    assert "6 of them there already" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    (folder / "logs" / "turbo_0.02_seed1.txt").unlink()
    running = sweep.Sweep(tiny_plan(), folder)
    assert [configuration.name for configuration in running.queue.open()] == ["turbo_0.02_seed1"]


def test_another_plan_or_script_is_refused(folder):
    with pytest.raises(runlog.BadInput, match="not of this plan"):
        sweep.Sweep(tiny_plan(base=base(muon_wd="0.1")), folder)
    with pytest.raises(runlog.BadInput, match="not of this plan"):
        sweep.Sweep(tiny_plan(rates=[0.02]), folder)
    (folder / "train_gpt.py").write_text("x = 1\n")
    with pytest.raises(runlog.BadInput, match="train_gpt.py has changed"):
        sweep.Sweep(tiny_plan(), folder)


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    first = sweep.Sweep(tiny_plan(), tmp_path / "s")
    with pytest.raises(runlog.BadInput, match="another sweep"):
        sweep.Sweep(tiny_plan(), tmp_path / "s")
    first.guard.close()


def test_devices_are_not_mixed(folder, capsys):
    edit(folder / "logs" / "ns5_0.02_seed1.txt", r"^(sweep .*)kind:.*? init", r"\1kind:Other GPU init")
    with pytest.raises(runlog.BadInput, match="device differs"):
        sweep_table.write_tables(folder)
    assert "fair" in failed(folder)


def test_a_worker_of_another_kind_stops_the_sweep(folder, monkeypatch):
    (folder / "logs" / "turbo_0.02_seed1.txt").unlink()
    running = sweep.Sweep(tiny_plan(), folder)
    process = SimpleNamespace(poll=lambda: None, kill=lambda: None, stdin=SimpleNamespace(close=lambda: None),
                              wait=lambda: 0)  # fmt: skip
    monkeypatch.setattr(running, "start", lambda index: running.processes.setdefault(index, process))
    monkeypatch.setattr(running, "ask", lambda *_: {"kind": "Other GPU"})
    with pytest.raises(runlog.BadInput, match="one kind of device"):
        running.run()


@pytest.mark.parametrize(
    "log, pattern, new, claim",
    [
        (
            "ns5_0.02_seed1",
            r"^(final_score .*val_bpb:\d\.)\d\d",
            r"\g<1>00",
            {"score", "ratio", "table", "readme"},
        ),
        # The table has the entropy of best rates only.
        ("ns5_0.02_seed1", r"^(sweep_codes entropy:)\S+", r"\g<1>1.000000", set()),
        ("ns5_BEST_seed2", r"^(sweep_codes entropy:)\S+", r"\g<1>1.000000", {"table", "readme"}),
        ("ns5_BEST_seed2", r"^train_gpt.py sha256:.", "train_gpt.py sha256:g", {"source"}),
        ("ns5_BEST_seed2", r"^(train_gpt.py sha256:)[0-9a-f]{4}", r"\g<1>0000", {"logs"}),
        ("ns5_BEST_seed2", r"^final_score .*\n", "", {"logs"}),
        ("ns5_BEST_seed2", r"^  matrix_lr: .*", "  matrix_lr: 0.5", {"unique"}),
        ("ns5_BEST_seed2", r"^  val_tokens: .*", "  val_tokens: 9", {"fair", "table", "readme", "source"}),
        ("ns5_0.02_seed1", r"init_sha256:....", "init_sha256:0000", {"fair"}),
        ("ns5_BEST_seed2", r"^(step:5/14 val_loss.*)train_time:\d+ms", r"\1train_time:999999ms", {"steps"}),
        ("ns5_BEST_seed2", r"^(phase_times .*)", r"late compilation: 2 graphs\n\1", {"clock"}),
    ],
)
def test_a_doctored_log_is_caught(folder, log, pattern, new, claim):
    rows = json.loads((folder / "table.json").read_text())["rows"]
    (best,) = [row["best_rate"] for row in rows if row["name"] == "ns5"]
    edit(folder / "logs" / f"{log.replace('BEST', best)}.txt", pattern, new)
    found = failed(folder)
    assert claim <= found and bool(claim) == bool(found), found


def test_doctored_tables_and_files_are_caught(folder):
    for name, pattern, new, claim in [
        ("table.json", r'"val_bpb": \{\s*"mean": \d\.\d\d', '"val_bpb": {"mean": 1.00', {"table"}),
        ("README.md", r"side by side", "alone", {"readme"}),
        ("train_gpt.py", r"^import math", "import math  # mine", {"logs"}),
    ]:
        before = (folder / name).read_text(encoding="utf-8")
        edit(folder / name, pattern, new)
        assert claim <= failed(folder), name
        (folder / name).write_text(before, encoding="utf-8")
    (folder / "more.py").write_text("")
    assert failed(folder) == {"files"}


def test_a_configuration_twice_is_caught(folder):
    text = (folder / "logs" / "ns5_0.02_seed1.txt").read_text(encoding="utf-8")
    twin = text.replace("ns5_0.02_seed1", "again_0.02_seed1").replace("row:ns5 ", "row:again ")
    (folder / "logs" / "again_0.02_seed1.txt").write_text(twin, encoding="utf-8")
    assert "unique" in failed(folder)


def test_packed_logs_are_read(folder, capsys):
    for path in (folder / "logs").glob("*.txt"):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        path.unlink()
    assert failed(folder) == set()
    root = folder.parent.parent.parent
    assert record.main(["--root", str(root), "verify", "Tiny"]) == 0
    (folder / "logs" / "ns5_0.02_seed1.txt.gz").write_bytes(b"\x1f\x8b broken")
    assert failed(folder) >= {"logs"}


def test_the_ledger_lists_verifies_and_tabulates_sweeps(folder, capsys):
    root = folder.parent.parent.parent
    board = "<!-- board:start -->\n<!-- board:end -->\n"
    (root / "README.md").write_text(board)
    (root / "records" / "README.md").write_text(board)
    assert record.main(["--root", str(root), "board"]) == 2
    assert "sweeps:start" in capsys.readouterr().err
    (root / "records" / "README.md").write_text(
        board + "<!-- sweeps:start -->\nold\n<!-- sweeps:end -->\nend\n"
    )
    assert record.main(["--root", str(root), "board"]) == 0
    page = (root / "records" / "README.md").read_text()
    assert "**[Tiny](sweeps/Tiny/)**" in page
    assert "\nold\n" not in page
    assert page.endswith("end\n")
    for line in sweep_table.table_lines(json.loads((folder / "table.json").read_text())):
        assert line in page
    assert record.main(["--root", str(root), "verify"]) == 0
    assert "1 folder: 11 ok" in capsys.readouterr().out
    (folder / "table.json").unlink()
    assert record.main(["--root", str(root), "verify"]) == 1
    assert sweep.main([str(folder)]) == 0  # from the logs alone
    assert record.main(["--root", str(root), "verify", "--quiet"]) == 0


def test_bpb_is_interpolated_between_validations(done):
    run = sweep_table.read_runs(done.folder)[0]
    points = {s.step: s.bpb for s in run.steps if s.kind == "val"}
    assert sorted(points) == [0, 5, 10, STEPS]
    assert sweep_table.bpb_at(run, 7) == pytest.approx(points[5] + (points[10] - points[5]) * 2 / 5)
    assert sweep_table.bpb_at(run, 10) == points[10]
    assert sweep_table.bpb_at(run, STEPS + 1) is None


def test_an_out_that_cannot_be_a_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    plan = ["--row", "a", "--rates", "0.02", *(f"{key}={value}" for key, value in base().items())]
    assert sweep.main([*plan, "--out", str(tmp_path / "file")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"record: {tmp_path}/file")
    assert err.count("\n") == 1


def test_a_folder_without_logs_is_no_sweep(tmp_path, capsys):
    assert sweep.main([str(tmp_path)]) == 2
    assert f"{tmp_path}: no folder of a sweep" in capsys.readouterr().err
