"""The update as one launch: recording, its failure on one rank, lanes, what closes the process group; no GPU."""

import contextlib
import dataclasses
import itertools
import os
import weakref

import pytest
import torch

import train_gpt as t
from helpers import english_args, group_of_one, machine, noisy_model, random_tokens, run_ranks, tiny


class Launch:
    """What a recorder returns: a graph that can be launched and outlives nobody."""

    def __init__(self, fn, events):
        self.fn, self.events = fn, events

    def __call__(self):
        self.events.append("launch")
        self.fn()


def recorder(events, error=None):
    """fn -> Launch, as Machine.record; like a GPU's it runs nothing itself."""

    def record(fn):
        events.append("record")
        if error is not None:
            raise error
        return Launch(fn, events)

    return record


def grow(model, seed):
    """A gradient for every parameter."""
    model.loss(*(random_tokens(model.h, (2, 16), s) for s in (seed, seed + 100))).backward()


@pytest.fixture
def one():
    with group_of_one() as m:
        yield m


# ---------------------------------------------------------------- recording


def test_eager_first_then_recorded_once_then_replayed(one):
    events = []
    m = dataclasses.replace(one, record=recorder(events))
    run, failure = m.replay(lambda: events.append("run"))
    assert events == ["run"] * 3 + ["record"] and failure == ""
    run(), run()
    assert events == ["run"] * 3 + ["record"] + ["launch", "run"] * 2


def test_without_a_recorder_the_function_is_called_plainly():
    fn = lambda: pytest.fail("nobody asked for it")
    assert machine().replay(fn) == (fn, "")


def test_a_failed_recording_leaves_the_eager_function(one):
    events = []
    m = dataclasses.replace(one, record=recorder(events, RuntimeError("operation not permitted\nmore of it")))
    fn = lambda: events.append("run")
    assert m.replay(fn) == (fn, "rank 0: RuntimeError: operation not permitted")
    assert events == ["run"] * 3 + ["record"]


def test_errors_of_the_function_itself_are_not_hidden(one):
    def broken():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        dataclasses.replace(one, record=recorder([])).replay(broken)


@pytest.mark.parametrize("rule", t.STEP_RULES)
@pytest.mark.parametrize("error", [None, RuntimeError("no")], ids=["recorded", "failed"])
def test_training_is_the_same_bits_with_a_recorder(one, rule, error):
    """Binding runs the schedule and leaves no trace; every step is one launch; numbers stay where they are."""
    events, results = [], []
    h = tiny(step_rule=rule, ortho="polar_express", proj_init_std=0.1)
    for m in (one, dataclasses.replace(one, record=recorder(events, error))):
        model = noisy_model(h, seed=3)
        optimizer = t.Optimizer(model, h, m)
        before = noisy_model(h, seed=3)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))
        assert all(p.grad.abs().max() == 0 for p in model.parameters()) and optimizer.steps == 0
        assert all(x.abs().max() == 0 for x in (*optimizer.momentum.values(), *optimizer.second.values()))
        home = optimizer.numbers.data_ptr()
        for step in range(3):
            grow(model, step)
            hp = t.Hyper(0.0, 0.9, 0.5 + step / 10, 0.25)
            optimizer.step(hp)
            b1, b2 = 1 - h.adam_beta1 ** (step + 1), 1 - h.adam_beta2 ** (step + 1)
            torch.testing.assert_close(optimizer.numbers, torch.tensor([0.9, h.matrix_lr * (0.5 + step / 10), 0.25, b1, b2]))
            assert optimizer.numbers.data_ptr() == home
        results.append([x.clone() for x in optimizer.state()])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))
    assert events == ["record"] + ["launch"] * (3 if error is None else 0)
    assert optimizer.failure == ("rank 0: RuntimeError: no" if error else "")


def fail_on(rank, bad, world):
    """What this rank's training launched, its failure and its parameters when rank `bad` cannot record."""
    m, events = t.init_machine(tiny(), os.environ), []
    m = dataclasses.replace(m, record=recorder(events, OSError("driver") if rank == bad else None))
    model = noisy_model(tiny(), seed=3)
    optimizer = t.Optimizer(model, tiny(), m)
    for step in range(2):
        grow(model, step * world + rank)
        optimizer.step(t.hyper_at(tiny(), step, 0.0))
    return events, optimizer.failure, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("bad", [None, 0, 1])
def test_what_one_rank_cannot_record_no_rank_replays(bad):
    ranks = run_ranks(fail_on, 2, bad, 2)
    for events, failure, params in ranks:
        assert events == ["record"] + ["launch"] * (2 if bad is None else 0)
        assert failure == ("" if bad is None else f"rank {bad}: OSError: driver")
        assert all(torch.equal(p, q) for p, q in zip(params, ranks[0][2]))


# ---------------------------------------------------------------- in a whole run


def run_main(monkeypatch, tmp_path, record, **knobs):
    """main's training run on a machine with a recorder: (status, lines of the log)."""
    real = t.init_machine
    monkeypatch.setattr(t, "init_machine", lambda h, env: dataclasses.replace(real(h, env), record=record))
    status = t.main(english_args(out_dir=tmp_path, **(dict(iterations=3, train_log_every=1) | knobs)))
    return status, (tmp_path / "run.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("steps", [0, 2])
def test_recorded_before_the_clock_however_short_the_warmup(monkeypatch, tmp_path, steps):
    events, plain = [], t.train_step
    monkeypatch.setattr(t, "train_step", lambda *a: events.append("step") or plain(*a))
    status, lines = run_main(monkeypatch, tmp_path, recorder(events), warmup_steps=steps)
    assert status == 0 and events == ["record"] + ["step", "launch"] * (steps + 3)  # warm-up launches it, too
    assert not any(x.startswith("update:") for x in lines)


def test_a_failure_is_one_log_line(monkeypatch, tmp_path):
    status, lines = run_main(monkeypatch, tmp_path, recorder([], RuntimeError("capture\nfailed")))
    assert status == 0 and lines.count("update:eager, no graph (rank 0: RuntimeError: capture)") == 1
    assert sum("RuntimeError" in x for x in lines[-40:]) == 1


def test_the_machine_line_names_the_update(tmp_path):
    t.main(english_args(out_dir=tmp_path, iterations=1))
    line = next(x for x in (tmp_path / "run.txt").read_text().splitlines() if x.startswith("machine world_size"))
    assert line.endswith("compile:none update:eager")


@pytest.mark.parametrize("end", ["well", "input error", "crash"])
def test_no_graph_is_alive_when_the_process_group_closes(monkeypatch, tmp_path, end):
    """NCCL's communicators wait for the graphs that hold their kernels: closing them first would hang."""
    alive, checked, close = [], [], t.dist.destroy_process_group
    errors = {"input error": t.InputError("full"), "crash": ZeroDivisionError("crash")}

    def record(fn):
        launch = Launch(lambda: None, [])  # a graph does not hold the function either
        alive.append(weakref.ref(launch))
        return launch

    def log_step(*args):
        if end in errors:
            raise errors.pop(end)
        return 0.0

    monkeypatch.setattr(t, "log_step", log_step)
    monkeypatch.setattr(t.dist, "destroy_process_group", lambda: checked.append(alive[0]()) or close())
    with pytest.raises(ZeroDivisionError) if end == "crash" else contextlib.nullcontext():
        status, _ = run_main(monkeypatch, tmp_path, record)
        assert status == (2 if end == "input error" else 0)
    assert checked == [None]


# ---------------------------------------------------------------- lanes


class Stream:
    """A stream that writes down what it waits for."""

    def __init__(self, name, events):
        self.name, self.events = name, events

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")


def test_lanes_fork_from_the_current_stream_and_join_it(monkeypatch):
    events = []
    main, *streams = (Stream(name, events) for name in ("main", "a", "b", "c"))
    current = [main]

    @contextlib.contextmanager
    def entered(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", entered)
    m = dataclasses.replace(machine(), streams=tuple(streams))
    with m.lanes() as lane:
        for work in range(4):
            with lane():
                events.append(f"{work} on {current[-1].name}")
    forks = [f"{x} waits for main" for x in "abc"]
    joins = [f"main waits for {x}" for x in "abc"]
    assert events == forks + ["0 on a", "1 on b", "2 on c", "3 on a"] + joins
    events.clear()
    with m.lanes() as lane, lane(), m.lanes() as inner, inner():  # a schedule that runs in a lane itself
        events.append(f"on {current[-1].name}")
    assert events[3:6] == ["b waits for a", "c waits for a", "on b"] and events[-5:-3] == ["a waits for b", "a waits for c"]


def test_on_a_cpu_lanes_are_nothing():
    with machine().lanes() as lane:
        assert [type(x) for x in (lane(), lane())] == [contextlib.nullcontext] * 2


def test_the_schedule_queues_each_bank_in_a_lane_of_its_own(one, monkeypatch):
    """The small tensors and each bank; a bank is sent from its lane; gradients arrive outside."""
    now, seen, numbers = [None], [], itertools.count()

    @contextlib.contextmanager
    def lanes(self):
        @contextlib.contextmanager
        def lane():
            now[0] = next(numbers)
            yield
            now[0] = None

        yield lane

    monkeypatch.setattr(t.Machine, "lanes", lanes)
    model = noisy_model(tiny(), seed=3)
    optimizer = t.Optimizer(model, tiny(), one)
    for name, module in (("reduce_scatter", t), ("all_gather", t), ("adam_update", optimizer), ("matrix_update", optimizer)):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name, **k: seen.append((name, now[0])) or real(*a, **k))
    optimizer.step(t.hyper_at(tiny(), 0, 0.0))
    assert seen[:3] == [("reduce_scatter", None)] * 3 and len(seen) == 11
    assert seen[3] == ("adam_update", 0)
    one_shape, two = ("matrix_update", "all_gather"), ("matrix_update", "matrix_update", "all_gather")
    assert seen[4:] == [(name, i) for i, names in ((1, one_shape), (2, one_shape), (3, two)) for name in names]
