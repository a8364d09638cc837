"""The folder of a sweep: it resumes, survives a dead worker, proves itself and refuses to be doctored."""

import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_gpt as t
from lab import sweep
from lab.training.worker import weights_sha256
from lab.training.worker_process import Answer, WorkerProcess
from ledger import record
from ledger.make import sweep_table
from ledger.prove import sweep_claims
from ledger.read import runlog
from script import ROOT
from tests.lab.sweep_cases import STEPS, base, final, no_sweep_starts, tiny_plan


def kill_first_worker(running, folder, thread):
    """Kill the first worker of a sweep once a configuration has begun, and return its process."""
    deadline = time.monotonic() + 60
    while thread.is_alive() and time.monotonic() < deadline:
        if list((folder / ".work").glob("*.part")):
            victim = running.workers[0].process
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
    vocabulary = int(table["config"]["vocab_size"])
    page = (done.folder / "README.md").read_text()
    assert f"preset {table['config']['preset']} of its script, vocabulary {vocabulary:,}; 6 conf" in page

    def bpb_of(row, rate, seed):
        return float(final(done.folder / "logs" / f"{row}_{rate}_seed{seed}.txt")["val_bpb"])

    for row in table["rows"]:
        tried = {rate: bpb_of(row["name"], rate, 1) for rate in ("0.02", "0.04")}
        assert row["rates"] == tried
        assert row["best_rate"] == min(tried, key=tried.get)
        assert row["edge"]
        both = [bpb_of(row["name"], row["best_rate"], seed) for seed in (1, 2)]
        assert row["val_bpb"]["mean"] == pytest.approx(sum(both) / 2, abs=1e-8)  # measured: 5e-9
        # Measured: 1.5e-9.
        assert row["val_bpb"]["std"] == pytest.approx(abs(both[0] - both[1]) / 2**0.5, abs=1e-8)
        assert row["at_step"]["mean"] == pytest.approx(row["live"]["mean"], abs=1e-4)  # measured: 1.5e-5
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
    assert turbo["versus"]["diff"] == pytest.approx(gap, abs=1e-12)  # measured: 2.3e-16
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
    first.folder_lock.close()


def test_devices_are_not_mixed(folder, capsys):
    edit(folder / "logs" / "ns5_0.02_seed1.txt", r"^(sweep .*)kind:.*? init", r"\1kind:Other GPU init")
    with pytest.raises(runlog.BadInput, match="device differs"):
        sweep_table.write_tables(folder)
    assert "fair" in failed(folder)


@pytest.mark.parametrize(
    "line, answer",
    [
        ('{"kind": "H100"}\n', Answer(kind="H100")),
        ('{"done": true}\n', Answer()),
        ('{"refused": "no data"}\n', Answer(refused="no data")),
        ("", None),  # it died
        ('{"refu', None),  # while it wrote
    ],
)
def test_a_worker_is_asked_in_lines_of_json(line, answer, tmp_path):
    worker = WorkerProcess(tmp_path, 0, 1)
    worker.process = SimpleNamespace(stdin=io.StringIO(), stdout=io.StringIO(line))
    assert worker.ask({"argv": ["seed=1"]}) == answer
    assert worker.process.stdin.getvalue() == '{"argv": ["seed=1"]}\n'


def test_a_worker_of_another_kind_stops_the_sweep(folder, monkeypatch):
    (folder / "logs" / "turbo_0.02_seed1.txt").unlink()
    running = sweep.Sweep(tiny_plan(), folder)
    monkeypatch.setattr(WorkerProcess, "start", lambda worker: None)
    monkeypatch.setattr(WorkerProcess, "ask", lambda *_: Answer(kind="Other GPU"))
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


def test_calibration_counts_against_the_limit_of_training(folder):
    logs = sorted((folder / "logs").iterdir())
    for log in logs:
        edit(log, r"^  max_wallclock_seconds: .*", "  max_wallclock_seconds: 600")
    assert "clock" not in failed(folder)
    edit(logs[0], r"^(phase_times .*calibrate:)\S+", r"\g<1>700000ms")
    assert "clock" in failed(folder)


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


def test_the_spreads_of_a_row_are_found_by_name(monkeypatch):
    """Whatever the order of the fields of what a configuration scored and cost."""
    logs = sorted((ROOT / "records/sweeps/2026-11-22_Attention/logs").glob("dense_0.05_*"))
    runs = [runlog.parse_log(log) for log in logs]
    scores = sweep_table.scores_of(runs, 0)
    fields = sweep_table.RunFigures._fields
    assert len({getattr(scores, name).mean for name in fields}) == len(fields)
    monkeypatch.setattr(sweep_table, "RunFigures", namedtuple("Reversed", reversed(fields)))
    assert sweep_table.scores_of(runs, 0) == scores


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


def test_tables_need_no_torch(folder):
    """`record sweep FOLDER` in a process of its own, from another folder."""
    code = (
        "import sys\nfrom lab import sweep\n"
        f"assert sweep.main([{str(folder)!r}]) == 0\nassert 'torch' not in sys.modules"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "tools")}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "| ns5 |" in done.stdout, done.stderr
