"""Pass and update as one launch each: capture, its failure on one rank, lanes, closing the group; no GPU."""

import contextlib
import dataclasses
import itertools
import os
import types
import weakref

import pytest
import torch

import train_gpt as t
from tests.helpers import (
    all_equal,
    english_args,
    machine,
    noisy_model,
    random_tokens,
    shard_folder,
    temporary_folder,
    tiny,
)
from tests.rank_cases import group_of_one, run_ranks


class Graph:
    """A captured graph: it can be launched and keeps only its function alive."""

    def __init__(self, fn, events):
        self.fn = fn
        self.events = events

    def __call__(self):
        self.events.append("launch")
        self.fn()


def capturer(events, error=None):
    """Return a graph_capture for a Machine, which notes in `events`; like a GPU's it runs nothing itself."""

    def capture(fn):
        events.append("capture")
        if error is not None:
            raise error
        return Graph(fn, events)

    return capture


def add_gradients(model, seed):
    """Add a gradient to every parameter's."""
    tokens = random_tokens(model.h, (2, 16), seed)
    targets = random_tokens(model.h, (2, 16), seed + 100)
    model.loss(tokens, targets).backward()


@pytest.fixture
def one():
    """Yield the Machine of a process group of one."""
    with group_of_one() as m:
        yield m


# ---------------------------------------------------------------- capture


def test_eager_first_then_captured_once_then_replayed(one):
    events = []
    m = dataclasses.replace(one, graph_capture=capturer(events))
    run, failure = m.capture(lambda: events.append("run"))
    assert events == ["run"] * 3 + ["capture"] and failure is None
    run()
    run()
    assert events == ["run"] * 3 + ["capture"] + ["launch", "run"] * 2


def test_without_graph_capture_the_function_is_called_itself():
    def fn():
        pytest.fail("nobody asked for it")

    assert machine().capture(fn) == (fn, None)


def test_a_failed_capture_leaves_the_eager_function(one):
    events = []
    error = RuntimeError("operation not permitted\nmore of it")
    m = dataclasses.replace(one, graph_capture=capturer(events, error))

    def fn():
        events.append("run")

    assert m.capture(fn) == (fn, "rank 0: RuntimeError: operation not permitted")
    assert events == ["run"] * 3 + ["capture"]


def test_errors_of_the_function_itself_are_not_hidden(one):
    def broken():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        dataclasses.replace(one, graph_capture=capturer([])).capture(broken)


@pytest.mark.parametrize("rule", t.STEP_RULES)
@pytest.mark.parametrize("error", [None, RuntimeError("no")], ids=["captured", "failed"])
def test_training_is_the_same_bits_when_captured(one, rule, error):
    """Compare with eager training: capture leaves no trace, and every step is one launch.

    The numbers of a step stay at one address.
    """
    events = []
    states = []
    h = tiny(step_rule=rule, ortho="polar_express", proj_init_std=0.1)
    before = noisy_model(h, seed=3)
    for m in (one, dataclasses.replace(one, graph_capture=capturer(events, error))):
        model = noisy_model(h, seed=3)
        optimizer = t.Optimizer(model, h, m)
        assert all_equal(model.parameters(), before.parameters())
        assert all(p.grad.abs().max() == 0 for p in model.parameters()) and optimizer.steps == 0
        assert all(x.abs().max() == 0 for x in (*optimizer.momentum.values(), *optimizer.rule_state.values()))

        address = optimizer.scalars.data_ptr()
        for step in range(3):
            add_gradients(model, step)
            lr_mul = 0.5 + step / 10
            optimizer.step(t.Hyper(0.0, 0.9, lr_mul, lr_mul / 2))
            correction1 = 1 - h.adam_beta1 ** (step + 1)
            correction2 = 1 - h.adam_beta2 ** (step + 1)
            rates = [h.matrix_lr * lr_mul, lr_mul / 2]
            expected = torch.tensor([0.9, *rates, 1.0, 1.0, correction1, correction2])
            torch.testing.assert_close(optimizer.scalars, expected)
            assert optimizer.scalars.data_ptr() == address
        states.append([x.clone() for x in optimizer.state()])

    assert all_equal(*states)
    assert not all_equal(model.parameters(), before.parameters())
    launches = 3 if error is None else 0
    assert events == ["capture"] + ["launch"] * launches
    assert optimizer.graph_failure == ("rank 0: RuntimeError: no" if error else None)


def fail_on(rank, bad, world):
    """Train two steps where rank `bad` cannot capture. Returns events, failure and parameters."""
    events = []
    error = OSError("driver") if rank == bad else None
    m = t.init_machine(tiny(), os.environ)
    m = dataclasses.replace(m, graph_capture=capturer(events, error))
    model = noisy_model(tiny(), seed=3)
    optimizer = t.Optimizer(model, tiny(), m)
    for step in range(2):
        add_gradients(model, step * world + rank)
        optimizer.step(t.hyper_at(tiny(), step, 0.0))
    params = [p.detach().clone() for p in model.parameters()]
    return types.SimpleNamespace(events=events, failure=optimizer.graph_failure, params=params)


@pytest.mark.parametrize("bad", [None, 0, 1])
def test_no_rank_replays_an_update_that_one_cannot_capture(bad):
    launches = 2 if bad is None else 0
    ranks = run_ranks(fail_on, 2, bad, 2)
    for rank in ranks:
        assert rank.events == ["capture"] + ["launch"] * launches
        assert rank.failure == (None if bad is None else f"rank {bad}: OSError: driver")
        assert all_equal(rank.params, ranks[0].params)


# ---------------------------------------------------------------- the pass


def train_passes(rank, folder, captures, bad=None):
    """Train three steps of four micro-batches over all ranks, with an eager update.

    captures: whether the machine captures graphs; it raises on rank `bad`. Returns the events until the pass
    is bound, those after it, why there is no graph, losses, state, and whether binding left no trace.
    """
    h = tiny(data_path=folder)
    m = t.init_machine(h, os.environ if "RANK" in os.environ else {})
    model = noisy_model(h, seed=3)
    optimizer = t.Optimizer(model, h, m)
    loader = t.TokenLoader(h, m)
    before = [x.clone() for x in optimizer.state()]
    events = []

    def loss_fn(tokens, targets):
        events.append("pass")
        return model.loss(tokens, targets)

    error = OSError("driver") if rank == bad else None
    graph_capture = capturer(events, error) if captures else None
    optimizer.m = dataclasses.replace(m, graph_capture=graph_capture)
    backward, failure = t.capture_pass(loss_fn, optimizer)
    bound = list(events)
    clean = optimizer.steps == 0 and all_equal(before, optimizer.state())
    clean &= all(not p.grad.any() for p in model.parameters())  # the passes before the capture left nothing

    losses = [t.train_step(backward, optimizer, loader.next(), t.hyper_at(h, step, 0.0)) for step in range(3)]
    share = backward(loader.next()[0], 1)
    clean &= share.grad_fn is None  # no activation is kept
    clean &= share is backward(loader.next()[0], 1)  # one tensor for all losses
    state = [x.clone() for x in optimizer.state()]
    return types.SimpleNamespace(
        bound=bound, events=events[len(bound) :], failure=failure, clean=clean, losses=losses, state=state
    )


@pytest.fixture(scope="module")
def shards():
    """Make a folder with two shards of random documents."""
    folder = temporary_folder() / "data"
    shard_folder(folder, tiny(), [60, 50])
    return str(folder)


def passes(world, *args):
    """Return the results of train_passes for each of `world` ranks."""
    if world > 1:
        return run_ranks(train_passes, world, *args)
    try:
        return [train_passes(0, *args)]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_a_captured_pass_is_launched_for_every_micro_batch_and_trains_the_same_bits(shards, world):
    micro = 3 * 4 // world + 2
    for eager, captured in zip(passes(world, shards, False), passes(world, shards, True)):
        assert eager.bound == [] and eager.events == ["pass"] * micro
        assert captured.bound == ["pass"] * 3 + ["capture"]
        assert captured.events == ["launch", "pass"] * micro
        assert eager.failure is captured.failure is None
        assert eager.clean
        assert captured.clean
        assert [x.item() for x in eager.losses] == [x.item() for x in captured.losses]
        assert len({x.item() for x in eager.losses}) == 3  # a step's loss is not overwritten by the next
        assert all_equal(eager.state, captured.state)


@pytest.mark.parametrize("world, bad", [(1, 0), (2, 0), (2, 1)])
def test_a_pass_that_one_rank_cannot_capture_is_eager_on_all(shards, world, bad):
    for eager, failed in zip(passes(world, shards, False), passes(world, shards, True, bad)):
        assert failed.failure == f"rank {bad}: OSError: driver" and failed.clean
        assert failed.bound == ["pass"] * 3 + ["capture"] and failed.events == eager.events
        assert [x.item() for x in eager.losses] == [x.item() for x in failed.losses]
        assert all_equal(eager.state, failed.state)


def test_the_loss_is_the_mean_and_gradients_are_its_gradients(one, shards):
    h = tiny(data_path=shards)
    model = noisy_model(h, seed=3)
    reference = noisy_model(h, seed=3)
    optimizer = t.Optimizer(model, h, one)
    batch = t.TokenLoader(h, one).next()
    backward, _ = t.capture_pass(model.loss, optimizer)
    assert len(batch) == 4
    loss = sum(backward(sequences, len(batch)).item() for sequences in batch)
    whole = torch.cat(batch)
    mean = reference.loss(whole[:, :-1], whole[:, 1:])
    mean.backward()
    assert loss == pytest.approx(mean.item(), rel=1e-6)  # measured: 7.5e-8
    for p, q in zip(model.parameters(), reference.parameters()):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-7, rtol=1e-5)  # measured: 10 % of that


# ---------------------------------------------------------------- in a whole run


def run_main(monkeypatch, tmp_path, graph_capture, **knobs):
    """Run main's training on a machine with this graph_capture. Returns its status and its log's lines."""
    init_machine = t.init_machine

    def init_machine_that_captures(h, env):
        return dataclasses.replace(init_machine(h, env), graph_capture=graph_capture)

    monkeypatch.setattr(t, "init_machine", init_machine_that_captures)
    status = t.main(english_args(out_dir=tmp_path, **(dict(iterations=3, train_log_every=1) | knobs)))
    return status, (tmp_path / "run.txt").read_text(encoding="utf-8").splitlines()


LOOP = dict(loop_layers="0 1", loop_times=2)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    "knobs,passes",
    [({}, 1), (LOOP, 2), (LOOP | dict(loop_frac=0), 1), (LOOP | dict(loop_frac=1), 1)],
    ids=str,
)
def test_captured_before_the_clock_however_short_the_warmup(monkeypatch, tmp_path, steps, knobs, passes):
    """A run whose loop begins on the way has two passes, both captured and launched in the warm-up."""
    events = []
    train_step = t.train_step

    def noted_step(*args):
        events.append("step")
        return train_step(*args)

    monkeypatch.setattr(t, "train_step", noted_step)
    status, lines = run_main(monkeypatch, tmp_path, capturer(events), warmup_steps=steps, **knobs)
    step = ["step"] + ["launch"] * 3  # two micro-batches and the update
    assert status == 0
    assert events == ["capture"] * (1 + passes) + step * (passes * steps + 3)  # warm-up launches them, too
    assert not any(x.startswith(("update:", "pass:")) for x in lines)


def test_a_failure_is_one_log_line(monkeypatch, tmp_path):
    status, lines = run_main(monkeypatch, tmp_path, capturer([], RuntimeError("capture\nfailed")))
    assert status == 0 and sum("RuntimeError" in x for x in lines[-40:]) == 2
    for part in ("pass", "update"):
        assert lines.count(f"{part}:eager, no graph (rank 0: RuntimeError: capture)") == 1


def test_a_pass_that_fails_leaves_the_update_captured(monkeypatch, tmp_path):
    events = []
    errors = [None, RuntimeError("out of memory")]  # the update is captured first

    def capture(fn):
        return capturer(events, errors.pop(0))(fn)

    status, lines = run_main(monkeypatch, tmp_path, capture, warmup_steps=0)
    assert status == 0
    assert errors == []
    assert events == ["capture"] * 2 + ["launch"] * 3
    assert lines.count("pass:eager, no graph (rank 0: RuntimeError: out of memory)") == 1
    assert not any(x.startswith("update:") for x in lines)


def test_a_run_is_the_same_bytes_when_captured(monkeypatch, tmp_path):
    blobs = []
    for name, graph_capture in (("captured", capturer([])), ("eager", None)):
        status, _ = run_main(monkeypatch, tmp_path / name, graph_capture)
        assert status == 0
        blobs.append((tmp_path / name / "run.int6.xz").read_bytes())
    assert blobs[0] == blobs[1]


@pytest.mark.parametrize("frac,visits", [(0, [6] * 6), (0.5, [2] * 3 + [6] * 3), (1, [2] * 6)])
def test_the_loop_begins_at_its_share_of_the_run(monkeypatch, tmp_path, frac, visits):
    """Count the layers that each step visits; scores and calibration visit all of the loop."""
    seen = []
    stage = ["warmup"]
    trunk = t.GPT.trunk
    train_step = t.train_step

    def noted_trunk(self, *args):
        seen.append((stage[0], len(self.layers)))
        return trunk(self, *args)

    def noted_step(backward, optimizer, batch, hp):
        stage[0] = "step"
        loss = train_step(backward, optimizer, batch[:1], hp)
        stage[0] = "score"
        return loss

    monkeypatch.setattr(t.GPT, "trunk", noted_trunk)
    monkeypatch.setattr(t, "train_step", noted_step)
    knobs = LOOP | dict(iterations=6, warmup_steps=0, loop_frac=frac, val_loss_every=2)
    status, lines = run_main(monkeypatch, tmp_path, None, **knobs)
    assert status == 0
    assert [count for where, count in seen if where == "step"] == visits
    assert {count for where, count in seen if where != "step"} == {6}
    begins = [x for x in lines if x.startswith("loop_begins ")]
    assert begins == (["loop_begins step:3 progress:0.500 visits:6"] if frac == 0.5 else [])


def tensors_in(fn):
    """Return the addresses of the tensors that a function closes over."""
    contents = [cell.cell_contents for cell in fn.__closure__ or ()]
    return [x.data_ptr() for x in contents if torch.is_tensor(x)]


def test_tensors_of_a_graph_keep_their_addresses(monkeypatch, tmp_path):
    """Check weights, gradients, tokens and loss at every launch.

    A run has warm-up's restore, validations and checkpoints; then it is resumed.
    """
    models = []
    captured = []
    launches = []
    gpt = t.GPT

    def noted_model(*args):
        models.append(gpt(*args))
        return models[-1]

    def addresses():
        return [(p.data_ptr(), p.grad.data_ptr()) for p in models[-1].parameters()]

    def capture(fn):
        own = tensors_in(fn)
        assert len(own) == (0 if "schedule" in fn.__name__ else 3)  # tokens, their number of parts, the loss
        at_capture = addresses()
        captured.append(at_capture)

        def launch():
            launches.append(fn.__name__)
            assert (at_capture, own) == (addresses(), tensors_in(fn))
            fn()

        return launch

    monkeypatch.setattr(t, "GPT", noted_model)
    knobs = dict(val_loss_every=1, checkpoint_every=1e-6)
    status, _ = run_main(monkeypatch, tmp_path, capture, **knobs)
    assert status == 0
    assert len(captured) == 2
    assert captured[0] == captured[1]
    assert launches == ["one_pass", "one_pass", "schedule"] * 5
    assert len({address for pair in captured[0] for address in pair}) == 2 * len(captured[0])

    last = list(tmp_path.glob("run.step3.*.ckpt"))
    assert sorted(tmp_path.glob("run.step2.*.ckpt")) and last
    for file in last:
        file.unlink()
    launches.clear()
    status, lines = run_main(monkeypatch, tmp_path, capture, resume="auto", **knobs)
    assert status == 0 and any(x.startswith("resumed step:2") for x in lines)
    assert launches == ["one_pass", "one_pass", "schedule"] * 3  # two of warm-up


def test_the_machine_line_names_pass_and_update(tmp_path):
    t.main(english_args(out_dir=tmp_path, iterations=1))
    lines = (tmp_path / "run.txt").read_text().splitlines()
    line = next(x for x in lines if x.startswith("machine world_size"))
    assert line.endswith("compile:none pass:eager update:eager")


@pytest.mark.parametrize("end", ["well", "input error", "crash"])
def test_no_graph_is_alive_when_the_process_group_closes(monkeypatch, tmp_path, end):
    """Free graphs first: NCCL waits for those that hold its kernels, so closing would hang."""
    graphs = []
    at_close = []
    destroy_process_group = t.dist.destroy_process_group
    errors = {"input error": t.InputError("full"), "crash": ZeroDivisionError("crash")}

    def capture(fn):
        graph = Graph(lambda: None, [])  # a graph does not hold the function either
        graphs.append(weakref.ref(graph))
        return graph

    def log_step(*args):
        if end in errors:
            raise errors.pop(end)
        return 0.0

    def close():
        at_close.extend(graph() for graph in graphs)
        destroy_process_group()

    monkeypatch.setattr(t, "log_step", log_step)
    monkeypatch.setattr(t.dist, "destroy_process_group", close)
    with pytest.raises(ZeroDivisionError) if end == "crash" else contextlib.nullcontext():
        status, _ = run_main(monkeypatch, tmp_path, capture)
        assert status == (2 if end == "input error" else 0)
    assert at_close == [None, None]  # the update's and the pass's


# ---------------------------------------------------------------- lanes


class Stream:
    """A stream that notes what it waits for."""

    def __init__(self, name, events):
        self.name = name
        self.events = events

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
    m = dataclasses.replace(machine(), lane_streams=tuple(streams))
    with m.lanes() as lane:
        for work in range(4):
            with lane():
                events.append(f"{work} on {current[-1].name}")
    forks = [f"{name} waits for main" for name in "abc"]
    joins = [f"main waits for {name}" for name in "abc"]
    assert events == forks + ["0 on a", "1 on b", "2 on c", "3 on a"] + joins

    events.clear()
    with m.lanes() as lane, lane(), m.lanes() as inner, inner():  # a schedule that runs in a lane itself
        events.append(f"on {current[-1].name}")
    assert events[3:6] == ["b waits for a", "c waits for a", "on b"]
    assert events[-5:-3] == ["a waits for b", "a waits for c"]


def test_a_binding_says_each_part_in_the_words_of_the_log():
    said = " ".join(f"{part}:{name}" for part, name in t.Binding(*"abcdef").parts.items())
    assert said == "attention:a qk:b mlp:c compile:d pass:e update:f"
    assert t.Binding(pass_launch="graph").parts["pass"] == "graph"


def test_lanes_do_nothing_on_a_cpu():
    with machine().lanes() as lane:
        assert [type(x) for x in (lane(), lane())] == [contextlib.nullcontext] * 2


def test_the_schedule_queues_each_bank_in_a_lane_of_its_own(one, monkeypatch):
    """Give the small tensors a lane and each bank one, from which it is sent; gradients arrive outside."""
    now = [None]
    seen = []
    numbers = itertools.count()

    @contextlib.contextmanager
    def lanes(self):
        @contextlib.contextmanager
        def lane():
            now[0] = next(numbers)
            yield
            now[0] = None

        yield lane

    def watch(owner, name):
        real = getattr(owner, name)

        def noted(*args, **named):
            seen.append((name, now[0]))
            return real(*args, **named)

        monkeypatch.setattr(owner, name, noted)

    monkeypatch.setattr(t.Machine, "lanes", lanes)
    optimizer = t.Optimizer(noisy_model(tiny(), seed=3), tiny(), one)
    watch(t, "reduce_scatter")
    watch(t, "all_gather")
    watch(optimizer, "adam_update")
    watch(optimizer, "matrix_update")
    optimizer.step(t.hyper_at(tiny(), 0, 0.0))

    assert seen[:3] == [("reduce_scatter", None)] * 3 and len(seen) == 11
    assert seen[3] == ("adam_update", 0)
    one_shape = ("matrix_update", "all_gather")
    two_shapes = ("matrix_update", "matrix_update", "all_gather")
    lanes_of_banks = ((1, one_shape), (2, one_shape), (3, two_shapes))
    assert seen[4:] == [(name, number) for number, names in lanes_of_banks for name in names]
