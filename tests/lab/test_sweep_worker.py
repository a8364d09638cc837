"""The worker of a sweep: it trains what train trains, on one device, and compiles a model once."""

import dataclasses
import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import train_gpt as t
from lab.training import worker as sweep_worker
from lab.training.worker import Worker, entropy_bytes, weights_sha256
from ledger.make import sweep_table
from ledger.prove import sweep_claims
from ledger.read import runlog
from script import TRAINER
from tests.helpers import english_args
from tests.lab.sweep_cases import LINE, STEPS, base, final, step_lines, tiny_plan


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
    entropy = 8 * entropy_bytes(codes) / len(codes)
    assert run.number("sweep_codes", "entropy") == pytest.approx(entropy, abs=1e-6)  # measured: 4e-7


@pytest.mark.long
def test_nothing_of_the_model_is_compiled_twice(worker, tmp_path, monkeypatch):
    """A new seed or rate compiles no graph, a new row only those of the matrix update."""
    from torch._dynamo.backends.debugging import aot_eager

    sweep_worker.allow_recompilation()
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
    plan = tiny_plan(base=base(iterations=4), rows=rows, rates=[0.02])
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

    def bind_attention(h, device, judge):
        bound.append(f"attention{h.head_dim}")
        return t.Bound(t.attend_sdpa, bound[-1])

    monkeypatch.setattr(t, "bind_attention", bind_attention)
    monkeypatch.setattr(t, "bind_qk", lambda h, device, judge: t.Bound(len, "qk"))
    monkeypatch.setattr(t, "bind_mlp", lambda h, device, judge: t.Bound(t.mlp, "mlp"))
    monkeypatch.setattr(worker, "m", dataclasses.replace(worker.m, device=torch.device("cuda")))
    m = worker.machine_for(t.load_config(["num_heads=4", "num_kv_heads=2"], {}))
    assert bound == ["attention128"]
    assert m.ops.qk is len
    assert m.binding.attention == "attention128"
    assert m.device_name == worker.m.device_name


def test_a_model_that_cannot_be_bound_is_refused_each_time(worker, tmp_path, monkeypatch):
    """Its second seed must not train with the kernels of an earlier model."""

    def refused(h):
        raise t.InputError("no attention kernel")

    monkeypatch.setattr(worker, "machine_for", refused)
    h = t.load_config([*english_args(), "attn_windows=4"], {})
    for _ in range(2):
        with pytest.raises(t.InputError, match="no attention kernel"):
            worker.prepare(h, t.Log(str(tmp_path / "log.txt"), None))


def test_a_fault_of_a_run_is_an_answer_as_bad_input_is(tmp_path, monkeypatch, capfd):
    def broken(*_):
        raise t.Fault("the device is gone")

    monkeypatch.setattr(sweep_worker.os, "dup2", lambda *_: None)  # prints stay where capfd reads them
    monkeypatch.setattr(sweep_worker, "load_script", lambda *_: t)
    monkeypatch.setattr(sweep_worker, "Worker", broken)
    monkeypatch.setattr(sweep_worker.sys, "stdin", io.StringIO('{"argv": []}\n'))
    assert sweep_worker.serve(tmp_path) == 0
    assert json.loads(capfd.readouterr().out) == {"refused": "the device is gone"}


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
