"""Pass and update, one launch each: recording, its failure on one rank, lanes, what closes the process group; no GPU."""

import contextlib
import dataclasses
import itertools
import os
import types
import weakref

import pytest
import torch

import train_gpt as t
from helpers import (
    english_args,
    group_of_one,
    machine,
    noisy_model,
    random_tokens,
    run_ranks,
    shard_folder,
    temporary_folder,
    tiny,
)


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
    m = dataclasses.replace(one, graph_capture=recorder(events))
    run, failure = m.captured(lambda: events.append("run"))
    assert events == ["run"] * 3 + ["record"] and failure == ""
    run(), run()
    assert events == ["run"] * 3 + ["record"] + ["launch", "run"] * 2


def test_without_a_recorder_the_function_is_called_plainly():
    fn = lambda: pytest.fail("nobody asked for it")
    assert machine().captured(fn) == (fn, "")


def test_a_failed_recording_leaves_the_eager_function(one):
    events = []
    m = dataclasses.replace(
        one, graph_capture=recorder(events, RuntimeError("operation not permitted\nmore of it"))
    )
    fn = lambda: events.append("run")
    assert m.captured(fn) == (fn, "rank 0: RuntimeError: operation not permitted")
    assert events == ["run"] * 3 + ["record"]


def test_errors_of_the_function_itself_are_not_hidden(one):
    def broken():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        dataclasses.replace(one, graph_capture=recorder([])).captured(broken)


@pytest.mark.parametrize("rule", t.STEP_RULES)
@pytest.mark.parametrize("error", [None, RuntimeError("no")], ids=["recorded", "failed"])
def test_training_is_the_same_bits_with_a_recorder(one, rule, error):
    """Binding runs the schedule and leaves no trace; every step is one launch; numbers stay where they are."""
    events, results = [], []
    h = tiny(step_rule=rule, ortho="polar_express", proj_init_std=0.1)
    for m in (one, dataclasses.replace(one, graph_capture=recorder(events, error))):
        model = noisy_model(h, seed=3)
        optimizer = t.Optimizer(model, h, m)
        before = noisy_model(h, seed=3)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))
        assert all(p.grad.abs().max() == 0 for p in model.parameters()) and optimizer.steps == 0
        assert all(x.abs().max() == 0 for x in (*optimizer.momentum.values(), *optimizer.second.values()))
        home = optimizer.numbers.data_ptr()
        for step in range(3):
            grow(model, step)
            lr_mul = 0.5 + step / 10
            optimizer.step(t.Hyper(0.0, 0.9, lr_mul))
            b1, b2 = 1 - h.adam_beta1 ** (step + 1), 1 - h.adam_beta2 ** (step + 1)
            torch.testing.assert_close(
                optimizer.numbers, torch.tensor([0.9, h.matrix_lr * lr_mul, lr_mul, b1, b2])
            )
            assert optimizer.numbers.data_ptr() == home
        results.append([x.clone() for x in optimizer.state()])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))
    assert events == ["record"] + ["launch"] * (3 if error is None else 0)
    assert optimizer.failure == ("rank 0: RuntimeError: no" if error else "")


def fail_on(rank, bad, world):
    """What this rank's training launched, its failure and its parameters when rank `bad` cannot record."""
    m, events = t.init_machine(tiny(), os.environ), []
    m = dataclasses.replace(m, graph_capture=recorder(events, OSError("driver") if rank == bad else None))
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


# ---------------------------------------------------------------- the pass


def train_passes(rank, folder, record, bad=None):
    """Three steps of four micro-batches over all ranks, the update eager: events, why no graph, losses, state.

    record: whether the machine has a recorder; it raises on rank `bad`."""
    h, events = tiny(data_path=folder), []
    m = t.init_machine(h, os.environ if "RANK" in os.environ else {})
    model = noisy_model(h, seed=3)
    optimizer, loader = t.Optimizer(model, h, m), t.TokenLoader(h, m)
    before = [x.clone() for x in optimizer.state()]
    loss_fn = lambda x, y: events.append("pass") or model.loss(x, y)
    record = recorder(events, OSError("driver") if rank == bad else None) if record else None
    optimizer.m = dataclasses.replace(m, graph_capture=record)
    backward, failure = t.bind_pass(loss_fn, optimizer)
    bound = list(events)
    clean = optimizer.steps == 0 and all(torch.equal(a, b) for a, b in zip(before, optimizer.state()))
    clean &= all(not p.grad.any() for p in model.parameters())  # the passes before the recording left nothing
    losses = [t.train_step(backward, optimizer, loader.next(), t.hyper_at(h, step, 0.0)) for step in range(3)]
    share = backward(loader.next()[0])
    clean &= share.grad_fn is None and share is backward(loader.next()[0])  # no activation is kept, one place
    state = [x.clone() for x in optimizer.state()]
    return types.SimpleNamespace(
        bound=bound, events=events[len(bound) :], failure=failure, clean=clean, losses=losses, state=state
    )


@pytest.fixture(scope="module")
def shards():
    folder = temporary_folder() / "data"
    shard_folder(folder, tiny(), [60, 50])
    return str(folder)


def passes(world, *args):
    if world > 1:
        return run_ranks(train_passes, world, *args)
    try:
        return [train_passes(0, *args)]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_a_recorded_pass_is_launched_for_every_micro_batch_and_trains_the_same_bits(shards, world):
    micro = 3 * 4 // world + 2
    for eager, recorded in zip(passes(world, shards, False), passes(world, shards, True)):
        assert eager.bound == [] and eager.events == ["pass"] * micro
        assert recorded.bound == ["pass"] * 3 + ["record"] and recorded.events == ["launch", "pass"] * micro
        assert eager.failure == recorded.failure == "" and eager.clean and recorded.clean
        assert [x.item() for x in eager.losses] == [x.item() for x in recorded.losses]
        assert (
            len({x.item() for x in eager.losses}) == 3
        )  # a step's loss is its own, not the next one's place
        assert all(torch.equal(a, b) for a, b in zip(eager.state, recorded.state))


@pytest.mark.parametrize("world, bad", [(1, 0), (2, 0), (2, 1)])
def test_a_pass_that_one_rank_cannot_record_is_eager_on_all(shards, world, bad):
    for eager, failed in zip(passes(world, shards, False), passes(world, shards, True, bad)):
        assert failed.failure == f"rank {bad}: OSError: driver" and failed.clean
        assert failed.bound == ["pass"] * 3 + ["record"] and failed.events == eager.events
        assert [x.item() for x in eager.losses] == [x.item() for x in failed.losses]
        assert all(torch.equal(a, b) for a, b in zip(eager.state, failed.state))


def test_the_loss_is_the_mean_and_gradients_are_its_gradients(one, shards):
    h = tiny(data_path=shards)
    model, plain = noisy_model(h, seed=3), noisy_model(h, seed=3)
    optimizer, batch = t.Optimizer(model, h, one), t.TokenLoader(h, one).next()
    backward, _ = t.bind_pass(model.loss, optimizer)
    assert len(batch) == 4
    loss = sum(backward(rows).item() for rows in batch)
    tokens = torch.cat(batch)
    mean = plain.loss(tokens[:, :-1], tokens[:, 1:])
    mean.backward()
    assert loss == pytest.approx(mean.item(), rel=1e-5)
    for p, q in zip(model.parameters(), plain.parameters()):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------- in a whole run


def run_main(monkeypatch, tmp_path, record, **knobs):
    """main's training run on a machine with a recorder: (status, lines of the log)."""
    real = t.init_machine
    monkeypatch.setattr(
        t, "init_machine", lambda h, env: dataclasses.replace(real(h, env), graph_capture=record)
    )
    status = t.main(english_args(out_dir=tmp_path, **(dict(iterations=3, train_log_every=1) | knobs)))
    return status, (tmp_path / "run.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("steps", [0, 2])
def test_recorded_before_the_clock_however_short_the_warmup(monkeypatch, tmp_path, steps):
    events, plain = [], t.train_step
    monkeypatch.setattr(t, "train_step", lambda *a: events.append("step") or plain(*a))
    status, lines = run_main(monkeypatch, tmp_path, recorder(events), warmup_steps=steps)
    step = ["step"] + ["launch"] * 3  # two micro-batches and the update
    assert status == 0 and events == ["record"] * 2 + step * (steps + 3)  # warm-up launches them, too
    assert not any(x.startswith(("update:", "pass:")) for x in lines)


def test_a_failure_is_one_log_line(monkeypatch, tmp_path):
    status, lines = run_main(monkeypatch, tmp_path, recorder([], RuntimeError("capture\nfailed")))
    assert status == 0 and sum("RuntimeError" in x for x in lines[-40:]) == 2
    for what in ("pass", "update"):
        assert lines.count(f"{what}:eager, no graph (rank 0: RuntimeError: capture)") == 1


def test_each_that_fails_is_eager_alone(monkeypatch, tmp_path):
    """The update is recorded first; here the pass cannot be."""
    events, errors = [], [None, RuntimeError("out of memory")]
    record = lambda fn: recorder(events, errors.pop(0))(fn)
    status, lines = run_main(monkeypatch, tmp_path, record, warmup_steps=0)
    assert status == 0 and errors == [] and events == ["record"] * 2 + ["launch"] * 3
    assert lines.count("pass:eager, no graph (rank 0: RuntimeError: out of memory)") == 1
    assert not any(x.startswith("update:") for x in lines)


def test_a_run_is_the_same_bytes_with_a_recorder(monkeypatch, tmp_path):
    runs = [
        run_main(monkeypatch, tmp_path / name, record) for name, record in (("a", recorder([])), ("b", None))
    ]
    blobs = [(tmp_path / name / "run.int6.xz").read_bytes() for name in "ab"]
    assert [status for status, _ in runs] == [0, 0] and blobs[0] == blobs[1]


def test_what_a_graph_reads_and_writes_stays_where_it_is(monkeypatch, tmp_path):
    """Over warm-up's restore, validations, checkpoints and a resumed run: weights, gradients, tokens' place and loss."""
    models, homes, launches, real = [], [], [], t.GPT
    place = lambda: [(p.data_ptr(), p.grad.data_ptr()) for p in models[-1].parameters()]

    def record(fn):
        own = lambda: [
            c.cell_contents.data_ptr() for c in fn.__closure__ or () if torch.is_tensor(c.cell_contents)
        ]
        assert len(own()) == (0 if "schedule" in fn.__name__ else 2)
        homes.append(place())
        kept = homes[-1], own()

        def launch():
            launches.append(fn.__name__)
            assert kept == (place(), own())
            fn()

        return launch

    monkeypatch.setattr(t, "GPT", lambda *a: models.append(real(*a)) or models[-1])
    knobs = dict(val_loss_every=1, checkpoint_every=1e-6)
    status, _ = run_main(monkeypatch, tmp_path, record, **knobs)
    assert status == 0 and len(homes) == 2 and homes[0] == homes[1]
    assert launches == ["both_ways", "both_ways", "schedule"] * 5
    assert len({x for pair in homes[0] for x in pair}) == 2 * len(homes[0])
    files = sorted(tmp_path.glob("run.step2.*.ckpt"))
    assert files and [f.unlink() for f in tmp_path.glob("run.step3.*.ckpt")]
    launches.clear()
    status, lines = run_main(monkeypatch, tmp_path, record, resume="auto", **knobs)
    assert status == 0 and any(x.startswith("resumed step:2") for x in lines)
    assert launches == ["both_ways", "both_ways", "schedule"] * 3  # two of warm-up


def test_the_machine_line_names_pass_and_update(tmp_path):
    t.main(english_args(out_dir=tmp_path, iterations=1))
    line = next(
        x for x in (tmp_path / "run.txt").read_text().splitlines() if x.startswith("machine world_size")
    )
    assert line.endswith("compile:none pass:eager update:eager")


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
    monkeypatch.setattr(
        t.dist, "destroy_process_group", lambda: checked.extend(x() for x in alive) or close()
    )
    with pytest.raises(ZeroDivisionError) if end == "crash" else contextlib.nullcontext():
        status, _ = run_main(monkeypatch, tmp_path, record)
        assert status == (2 if end == "input error" else 0)
    assert checked == [None, None]  # the update's and the pass's


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
    assert events[3:6] == ["b waits for a", "c waits for a", "on b"] and events[-5:-3] == [
        "a waits for b",
        "a waits for c",
    ]


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
    for name, module in (
        ("reduce_scatter", t),
        ("all_gather", t),
        ("adam_update", optimizer),
        ("matrix_update", optimizer),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, real=real, name=name, **k: seen.append((name, now[0])) or real(*a, **k)
        )
    optimizer.step(t.hyper_at(tiny(), 0, 0.0))
    assert seen[:3] == [("reduce_scatter", None)] * 3 and len(seen) == 11
    assert seen[3] == ("adam_update", 0)
    one_shape, two = ("matrix_update", "all_gather"), ("matrix_update", "matrix_update", "all_gather")
    assert seen[4:] == [
        (name, i) for i, names in ((1, one_shape), (2, one_shape), (3, two)) for name in names
    ]
