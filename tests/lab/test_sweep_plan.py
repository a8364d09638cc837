"""The plan of a sweep: what it accepts, which configuration is next, what a dead worker costs."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_gpt as t
from lab import sweep
from lab.training import planning
from ledger import record
from ledger.make import sweep_table
from ledger.read import knobs, runlog
from script import ROOT
from tests.helpers import english_dataset
from tests.lab.sweep_cases import base, raw_plan, tiny_plan

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
    def serve(worker):
        os.kill(os.getpid(), number)
        time.sleep(30)

    reasons = []
    before = signal.getsignal(signal.SIGTERM)
    began = time.monotonic()
    sweep.Sweep.train(SimpleNamespace(serve=serve, workers=["worker"], stop=reasons.append))
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


def without(key):
    """Return the base of a plan that leaves a knob to its preset."""
    return {name: value for name, value in base().items() if name != key}


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(rows={"a": {"orto": "ns5"}}), r"row a: unknown config key 'orto'"),
        (dict(rows={"a": {"ortho": "none"}}), r"row a: config key ortho: 'none'"),
        (dict(rows={"a": {"train_seq_len": 8}}), r"row a: train_seq_len is the same in every row"),
        (dict(rows={"a": {"num_heads": 3}}), r"row a: .*num_heads=3 must divide"),
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
        (dict(base=base(target_loss="3")), r"plan: base sets target_loss, and a sweep ranks artifacts"),
        (dict(rows={"a": {"target_loss": 3}}), r"row a: target_loss is the same in every row"),
        (dict(rows={"a": {"tokens_per_param": 0.5}}, base=without("iterations")), r"row a: makes iterations"),
        (dict(rows={"a": {"depth": 2}}), r"row a: makes \w+ \d+, and it is \d+ in base"),
        (dict(rate_key="tokens_per_param", base=without("iterations")), r"row ns5: makes iterations"),
        (dict(rows={"a": {"resume": "auto"}}), r"row a: resume has no effect in a sweep"),
        (dict(base=base(checkpoint_every="5")), r"plan: base: checkpoint_every has no effect in a sweep"),
        (dict(rate_key="checkpoint_every"), r"row ns5: checkpoint_every has no effect in a sweep"),
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
    own = t.load_config(list(plan.configuration("own", "0.3", 1).argv), {}).matrix_lr
    assert plan.rows["ns5"].rates == (f"{own / 2:g}", f"{own * 2:g}")
    assert plan.rows["slow"].rates == ("0.05", "0.2")
    assert (plan.rows["own"].rate_key, plan.rows["own"].rates) == ("embed_lr", ("0.3",))
    h = t.load_config(list(plan.configuration("slow", "0.2", 2).argv), {})
    assert (h.matrix_lr, h.seed, h.eval_stride, h.fit_cap) == (0.2, 2, h.eval_seq_len, False)
    with pytest.raises(runlog.BadInput, match="--sliding"):
        planning.make_plan(t, raw | dict(base=base(eval_stride=8)), "plan")
    sliding = planning.make_plan(t, raw | dict(base=base(eval_stride=8)), "plan", sliding=True)
    assert t.load_config(list(sliding.configuration("ns5", "0.05", 1).argv), {}).eval_stride == 8


def test_a_sweep_scores_side_by_side_whatever_strides_there_are(monkeypatch):
    """ttt_passes stands for a second one here."""
    assert sweep_table.stride_knobs() == ("eval_stride",)

    monkeypatch.setattr(sweep_table, "stride_knobs", lambda: ("eval_stride", "ttt_passes"))
    raw = raw_plan(rows={"ns5": {}})
    h = t.load_config(list(planning.make_plan(t, raw, "plan").configuration("ns5", "0.05", 1).argv), {})
    assert h.eval_stride == h.ttt_passes == h.eval_seq_len
    with pytest.raises(runlog.BadInput, match="base sets ttt_passes"):
        planning.make_plan(t, raw | dict(base=base(ttt_passes=8)), "plan")


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
    monkeypatch.setattr(sweep, "claim_folder", folders.append)
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


def configurations(name):
    """Return how many configurations a plan of records/plans has."""
    raw = json.loads((ROOT / "records" / "plans" / name).read_text(encoding="utf-8"))
    plan = planning.make_plan(t, raw, name)
    return sum(len(row.rates) + len(raw["seeds"]) - 1 for row in plan.rows.values())


def test_the_documents_count_the_configurations_of_the_plans():
    ledger = (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+\.json)`.*? \| (\d+) \| \d+ \|", ledger, re.M)
    assert len(rows) >= 4 and {name: int(count) for name, count in rows} == {
        name: configurations(name) for name, _ in rows
    }

    count = configurations("optimizers.json")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"`optimizers.json` is {count} x 120 s = {2 * count} GPU-minutes" in readme

    optimizers = " ".join((ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8").split())
    folder = ROOT / "records" / "sweeps" / "2026-11-22_Optimizers"
    run = json.loads((folder / "table.json").read_text(encoding="utf-8"))["configurations"]
    assert f"50 configurations, of which {run} were run" in optimizers
    assert f"`optimizers.json` is without that row and has {count}." in optimizers


def test_knobs_that_wait_for_a_sweep_have_a_row_of_a_plan():
    """The table of knobs that are off names each row of unmeasured.json beside a knob that it sets."""
    rows = json.loads((ROOT / "records" / "plans" / "unmeasured.json").read_text(encoding="utf-8"))["rows"]
    table = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8").split("## Knobs that are off")[1]
    waiting = {}
    for line in table.splitlines():
        named = re.search(r"\brows? ((?:`\w+`(?:, )?)+)", line)
        if named:
            knobs_of_line = re.findall(r"`(\w+)", line.split("|")[1])
            waiting |= dict.fromkeys(re.findall(r"`(\w+)`", named[1]), knobs_of_line)

    assert waiting.keys() == rows.keys() - {"base"}
    for name, knobs_of_line in waiting.items():
        assert set(knobs_of_line) & rows[name].keys(), name


def test_every_knob_of_the_model_is_one_that_compiles_or_one_that_no_row_may_set():
    known = {f.name for f in dataclasses.fields(t.Config)}
    fixed = set(sweep_table.fixed_knobs())
    model = set(sweep_table.model_knobs())
    assert {*t.STORED_KNOBS, *t.CHANGED_KNOBS, *t.knobs_with(t.SIZE)} <= fixed | model <= known
    assert not fixed & model


def test_the_types_and_traits_of_knobs_are_read_without_importing_the_trainer():
    """As the trainer itself has them, trait by trait."""
    read = knobs.known_knobs()
    traits = set().union(*(knob.traits for knob in read.values()))
    assert {"SIZE", "STORED", "SHARED", "BY_DEPTH"} <= traits
    assert {name: knob.type for name, knob in read.items()} == {
        name: kind.type for name, kind in t.kinds_of_knobs().items()
    }
    assert list(read) == [f.name for f in dataclasses.fields(t.Config)]
    for trait in traits:
        assert knobs.with_trait(trait) == t.knobs_with(getattr(t, trait)), trait
