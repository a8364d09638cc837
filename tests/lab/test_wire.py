"""The wire tool: planted schedules with known counts, real steps of 2 and 4 ranks, the prediction by hand."""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter

import pytest
import torch
import torch.distributed as dist

import train_gpt as t
from lab import wire
from lab.network import one_step, predict
from lab.network.predict import StepTimes
from lab.shared import collectives
from lab.shared.collectives import Collective, MatrixBatch, Scope, Wait
from script import TRAINER, BadInput
from tests.helpers import TINY, machine, tiny
from tests.rank_cases import run_ranks

KNOBS = tuple(f"{k}={v}" for k, v in TINY.items())
# Optimizer.step on one node: one for each bank; all-reduce: the small tensors together, and the norm
STEP = {"reduce-scatter": 3, "all-gather": 3, "all-reduce": 2}
EIGHT = tuple(range(8))


# ---------------------------------------------------------------- counting


def test_bytes_per_link_of_a_ring():
    def wired(kind, n):
        return Collective(kind, 1000, tuple(range(n)), "float32").wire

    assert [wired(kind, 4) for kind in ("reduce-scatter", "all-gather", "all-to-all")] == [750, 750, 750]
    assert wired("all-reduce", 4) == 1500
    assert wired("broadcast", 4) == wired("reduce", 4) == 1000
    assert [wired(kind, 1) for kind in ("all-reduce", "all-gather", "broadcast")] == [0, 0, 0]


def test_every_function_is_wrapped_with_arguments_that_it_has():
    found = [name for name in collectives.FUNCTIONS if hasattr(dist, name)]
    assert {kind for kind, _, _ in (collectives.FUNCTIONS[name] for name in found)} == {
        "all-reduce", "reduce-scatter", "all-gather", "all-to-all", "broadcast", "reduce",
    }  # fmt: skip
    for name in found:
        _, given, whole = collectives.FUNCTIONS[name]
        assert {given, whole, "group"} <= set(inspect.signature(getattr(dist, name)).parameters), name


def planted(rank):
    """Run a schedule with known counts on one rank of four. Returns its events and the bank's final sum."""
    t.init_machine(tiny(), dict(RANK=str(rank), WORLD_SIZE="4"))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    recorder = collectives.Recorder(waits=True, zeros=True)
    before = dist.all_reduce
    bank = torch.ones(8, 3, 5)
    shard = torch.zeros(2, 3, 5)
    bank[6:] = 0  # padding
    with recorder.installed():
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        dist.all_reduce(torch.ones(1))  # not recorded
        with recorder.recording() as events:
            arrival = scatter(shard, bank, dist.ReduceOp.SUM, async_op=True)
            dist.all_reduce(torch.ones(7, dtype=torch.float64), group=pairs[rank // 2])
            arrival.wait()
            gather(bank, shard, async_op=True).wait()
            dist.broadcast(torch.zeros(3), 0)
        dist.all_reduce(torch.ones(1))
    assert dist.all_reduce is before
    assert not isinstance(before, collectives.Waited)
    return events, float(bank.sum())


def test_a_planted_schedule():
    ranks = run_ranks(planted, 4)
    steps = [events for events, _ in ranks]
    assert {total for _, total in ranks} == {6 * 15 * 4.0}  # they still do what they did
    everyone = (0, 1, 2, 3)
    for rank, events in enumerate(steps):
        pair = (0, 1) if rank < 2 else (2, 3)
        lost = 120 if rank == 3 else 0  # the last rank owns the padding
        assert events == [
            Collective("reduce-scatter", 480, everyone, "float32", "cpu", 480, 120),
            Collective("all-reduce", 56, pair, "float64", "cpu", 56, 0),
            Wait(1),
            Wait(0),
            Collective("all-gather", 480, everyone, "float32", "cpu", 120, lost),
            Wait(4),
            Collective("broadcast", 12, everyone, "float32", "cpu", 12, 12),
            Wait(6),
        ]
    found = collectives.totals(steps[0], 2)
    assert found.counts == {"reduce-scatter": 1, "all-reduce": 1, "all-gather": 1, "broadcast": 1}
    assert found.payload == 480 + 56 + 480 + 12
    assert found.wire == {Scope.WITHIN_NODE: 56, Scope.ACROSS_NODES: 360 + 360 + 12}
    assert collectives.totals(steps[0], 4).wire == {
        Scope.WITHIN_NODE: 56 + 360 + 360 + 12,
        Scope.ACROSS_NODES: 0,
    }
    assert collectives.totals(steps[2], 1).wire[Scope.WITHIN_NODE] == 0
    assert collectives.padding(steps) == (4 * (120 + 12) + 120) / (4 * (480 + 56 + 120 + 12))


def test_the_scope_of_a_group():
    groups = [(0, 1, 2, 3), (4, 6), (3, 4), (0, 4)]
    assert [collectives.scope(ranks, 4) for ranks in groups] == [
        Scope.WITHIN_NODE,
        Scope.WITHIN_NODE,
        Scope.ACROSS_NODES,
        Scope.ACROSS_NODES,
    ]


# ---------------------------------------------------------------- real steps


def steps_of(world, node_ranks=None, script=TRAINER, knobs=KNOBS):
    """Take a real step on `world` ranks and return their results. node_ranks: ranks of a node (all)."""
    port = one_step.free_port()
    task = one_step.RankTask(script, knobs, world, node_ranks or world, 0, port)
    return one_step.in_processes(one_step.real_step, [task._replace(rank=rank) for rank in range(world)])


@pytest.fixture(scope="module")
def real():
    """Take real steps on one node. Returns {number of ranks: results}."""
    return {world: steps_of(world) for world in (2, 4)}


@pytest.mark.parametrize("world", [2, 4])
def test_a_real_step(real, world):
    """Collectives, bytes and matrices follow from the shapes. With one more collective this fails."""
    table = t.parameter_table(tiny())
    matrices = Counter()  # of a bank
    numel = {}  # of one matrix of a bank
    for spec in t.MATRICES:
        count, rows, columns = table[spec.name][0]
        matrices[spec.buffer] += count
        numel[spec.buffer] = rows * columns
    share = {bank: math.ceil(count / world) for bank, count in matrices.items()}
    padded_bytes = sum(4 * world * share[bank] * numel[bank] for bank in matrices)
    full_bytes = sum(4 * count * numel[bank] for bank, count in matrices.items())

    ranks = real[world]
    assert len({result.digest for result in ranks}) == 1
    owned = []
    for result in ranks:
        found = collectives.totals(result.events, world)
        assert found.counts == STEP, found.counts
        assert found.wire[Scope.ACROSS_NODES] == 0

        calls = collectives.collectives_of(result.events)
        assert {call.ranks for call in calls} == {tuple(range(world))}
        for kind in ("reduce-scatter", "all-gather"):
            assert sum(call.payload for call in calls if call.kind == kind) == padded_bytes
        zeros = sum(call.zeros for call in calls if call.kind == "reduce-scatter")
        assert zeros == padded_bytes - full_bytes

        waits = [event.of for event in result.events if isinstance(event, Wait)]
        calls_at = [i for i, event in enumerate(result.events) if isinstance(event, Collective)]
        assert Counter(waits) == dict.fromkeys(calls_at, 1)

        batches = collectives.batches_of(result.events)
        owned.append(sum(batch.real for batch in batches))
        assert sum(batch.slots for batch in batches) == owned[-1] <= sum(share.values())
    assert sum(owned) == matrices.total()


def test_padding_is_seen():
    """With 3 layers on 4 ranks, part of the banks is padding: it travels and costs no work."""
    ranks = steps_of(4, knobs=(*KNOBS, "num_layers=3"))
    batches = [batch for result in ranks for batch in collectives.batches_of(result.events)]
    assert sum(batch.real for batch in batches) == 3 * 6
    assert sum(batch.slots for batch in batches) == 3 * 6
    assert 0.1 < collectives.padding([r.events for r in ranks]) < 0.3  # measured: 0.225


def changed(folder, lines):
    """Write a copy of train_gpt.py with `lines` before its last statement and return its path."""
    source = TRAINER.read_text(encoding="utf-8")
    head, main, tail = source.rpartition('\nif __name__ == "__main__":')
    (folder / "train_gpt.py").write_text(head + "\n" + lines + main + tail, encoding="utf-8")
    return folder / "train_gpt.py"


PATCH = """
_step = Optimizer.step
def _patched(self, hp):
    {before}
    _step(self, hp)
    {after}
Optimizer.step = _patched
"""


def test_one_collective_more_is_counted(tmp_path):
    script = changed(tmp_path, PATCH.format(before="dist.all_reduce(torch.ones(4))", after="pass"))
    for r in steps_of(2, script=script):
        found = collectives.totals(r.events, 2)
        assert found.counts != STEP and found.counts["all-reduce"] == STEP["all-reduce"] + 1


def bare(event):
    """Return the event without the figures that need data."""
    if isinstance(event, Collective):
        return event._replace(given=0, zeros=0)
    if isinstance(event, MatrixBatch):
        return event._replace(real=0)
    return event


NODES = """
_init = init_machine
def init_machine(h, env):
    global NODE, ACROSS
    m, n, here = _init(h, env), int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"])
    NODE = [dist.new_group(list(range(i, i + here))) for i in range(0, n, here)][m.rank // here]
    ACROSS = [dist.new_group(list(range(i, n, here))) for i in range(here)][m.rank % here]
    return m
"""


def test_groups_of_nodes(tmp_path):
    """Traffic inside a node is told from traffic between nodes, with data and without."""
    own = "dist.all_reduce(torch.ones(10), group=NODE); dist.all_reduce(torch.ones(100), group=ACROSS)"
    script = changed(tmp_path, NODES + PATCH.format(before=own, after="pass"))
    ranks = steps_of(4, 2, script)
    calls = collectives.collectives_of(ranks[3].events)[:2]
    assert [call.ranks for call in calls] == [(2, 3), (1, 3)]
    found = collectives.totals(ranks[3].events, 2).wire
    plain = collectives.totals(ranks[3].events[4:], 2).wire
    assert found[Scope.WITHIN_NODE] - plain[Scope.WITHIN_NODE] == 40
    assert found[Scope.ACROSS_NODES] - plain[Scope.ACROSS_NODES] == 400
    dry = one_step.in_processes(one_step.dry_steps, [(one_step.RankTask(script, KNOBS, 4, 2),)])[0]
    for events, r in zip(dry.steps[0], ranks):
        assert [bare(e) for e in events] == [bare(e) for e in r.events]


@pytest.mark.parametrize("world", [2, 4])
def test_a_step_without_data_is_the_real_one(real, world):
    asked = (one_step.RankTask(TRAINER, KNOBS, world, world), one_step.RankTask(TRAINER, KNOBS, 1, 1))
    dry = one_step.in_processes(one_step.dry_steps, [asked])[0]
    assert len(dry.steps[0]) == world and len(dry.steps[1]) == 1
    for events, r in zip(dry.steps[0], real[world]):
        assert [bare(e) for e in events] == [bare(e) for e in r.events]
    assert {name: tuple(shape) for name, (shape, _) in t.parameter_table(tiny()).items()} == dry.shapes
    rows, columns = dry.shapes["qo_bank"][1:]
    n = min(rows, columns)
    m = max(rows, columns)
    assert dry.flops[rows, columns] == 5 * (2 * n * n * m + 2 * n**3 + 2 * n * n * m)


# ---------------------------------------------------------------- the published schedule


def test_the_published_schedule_on_the_record_shapes():
    h = t.load_config(["preset=record_sp1024"], {})
    shapes = {name: tuple(shape) for name, (shape, _) in t.parameter_table(h).items()}
    events = predict.published_schedule(shapes, 8)
    found = collectives.totals(events, 8)
    small = [name for name in shapes if not name.endswith("_bank")]
    assert found.counts == {"reduce-scatter": 4, "all-gather": 4, "all-reduce": len(small)}
    banks = 2 * (24 * 512 * 512 + 24 * 256 * 512 + 2 * 16 * 1536 * 512)  # 22 -> 24, 11 -> 16 slots of bf16
    small_bytes = 4 * sum(torch.Size(shapes[name]).numel() for name in small)
    assert found.payload == 2 * banks + small_bytes
    assert found.wire[Scope.WITHIN_NODE] == pytest.approx(2 * banks * 7 / 8 + small_bytes * 7 / 4)
    padded = 2 * (2 * 512 * 512 + 2 * 256 * 512 + 2 * 5 * 1536 * 512)
    given = banks + banks / 8 + small_bytes
    assert collectives.padding([events]) == pytest.approx((padded + padded / 8) / given)
    assert [w.slots for w in collectives.batches_of(events)] == [2, 2, 3, 3]  # largest bank first
    matrices = [predict.published_batches(shapes, 8, rank) for rank in range(8)]
    assert sum(w.real for rank in matrices for w in rank) == 66
    assert [sum(w.real for w in rank) for rank in matrices] == [10, 10, 10, 10, 10, 8, 6, 2]
    gather = [i for i, e in enumerate(events) if isinstance(e, Collective) and e.kind == "all-gather"]
    work = [i for i, e in enumerate(events) if isinstance(e, MatrixBatch)]
    assert Wait(gather[0]) in events[: work[1]] and Wait(gather[1]) not in events[: work[1]]


# ---------------------------------------------------------------- the prediction


def test_a_walk_by_hand():
    a = Collective("reduce-scatter", 1, EIGHT, "f")
    b = Collective("all-gather", 1, EIGHT, "f")
    events = [
        a,
        a,
        Wait(0),
        MatrixBatch((1, 1), 1, 1),
        b,
        MatrixBatch((1, 1), 1, 1),
        b,
        Wait(4),
        Wait(6),
        Wait(1),
    ]
    lanes = dict.fromkeys((0, 1, 4, 6), Scope.WITHIN_NODE)
    got = predict.walk(events, {0: 2.0, 1: 3.0, 4: 4.0, 6: 1.0}, lanes, {3: 10.0, 5: 2.0})
    # arrivals end at 2 and 5; directions 2-12, 12-14; gathers 12-16, 16-17
    assert got == StepTimes(end=17.0, before=2.0, update=12.0, exposed=5.0, communication=10.0)
    got = predict.walk(
        events, {0: 2.0, 1: 3.0, 4: 4.0, 6: 1.0}, lanes | {6: Scope.ACROSS_NODES}, {3: 10.0, 5: 2.0}
    )
    assert got.end == 16.0  # the second gather on a link of its own: 14-15
    assert predict.walk([a, Wait(0)], {0: 2.0}, {0: Scope.WITHIN_NODE}, {}).before == 2.0
    assert predict.walk([], {}, {}, {}) == StepTimes(
        end=0.0, before=0.0, update=0.0, exposed=0.0, communication=0
    )


def test_the_cost_of_a_collective():
    a = predict.Assumptions(nvlink_gbps=100.0, nvlink_latency_ms=0.5, nic_gbps=10.0, nic_latency_ms=2.0)

    def call(*ranks):
        return Collective("broadcast", 1_000_000_000, ranks, "float32")

    ms = [predict.collective_ms(c, 8, a) for c in (call(0), call(*EIGHT), call(0, 8), call(0, 1, 8, 9))]
    assert ms == [0.0, 10.5, 102.0, 52.0]
    assert predict.collective_ms(call(*range(32)), 8, a) == 2.0 + 1000 / 80  # eight adapters of a node
    assert predict.collective_ms(call(*range(32)), 16, a) == 2.0 + 1000 / 100  # no faster than NVLink


def test_the_update_runs_through_the_measured_points():
    a = predict.Assumptions()
    assert predict.update_ms(1.0, 0.166, a) == a.update_ms
    assert predict.update_ms(0.166, 0.166, a) == pytest.approx(a.eighth_ms)
    assert predict.update_ms(0.583, 0.166, a) == pytest.approx((a.update_ms + a.eighth_ms) / 2)


def test_every_assumption_has_a_source():
    assert set(predict.SOURCES) == set(predict.Assumptions.__dataclass_fields__)


# ---------------------------------------------------------------- the command


def called(*args):
    """Run `record wire` in this process and return its exit status."""
    return wire.main([*map(str, args)])


def test_the_command(tmp_path, capfd):
    out = tmp_path / "wire.md"
    assert called("--ranks", 4, "--nodes", 2, "--assume", "nic_gbps=25", "--out", out, *KNOBS) == 0
    text = out.read_text()
    assert capfd.readouterr().out == text
    assert [p.name for p in tmp_path.iterdir()] == ["wire.md"]
    for line in (
        r"\| all-reduce \| \d+ \| 14 \|",
        r"\| collectives \| \d+ \| 22 \|",
        r"\| nic_gbps \| 25 \| given \|",
        r"bit-equal on all 4 ranks",
        r"\| here \| 4 x 8 \|",
        r"\| inter \|",
    ):
        assert re.search(line, text), (line, text)
    assert "NOT" not in text


def test_ranks_that_disagree(tmp_path, capfd):
    script = changed(tmp_path, PATCH.format(before="pass", after="self.flat += self.m.rank"))
    assert called("--ranks", 2, "--script", script, *KNOBS) == 1
    assert "NOT bit-equal on all 2 ranks" in capfd.readouterr().out


def refused(capfd, *args):
    """Return the one line with which `record wire` refuses these arguments."""
    assert called(*args) == 2
    err = capfd.readouterr().err
    assert err.startswith("record: "), err
    assert err.count("\n") == 1, err
    return err


def test_bad_input_is_one_line(tmp_path, capfd):
    assert "1 to 64" in refused(capfd, "--ranks", 0)
    assert "must divide" in refused(capfd, "--ranks", 8, "--nodes", 3)
    assert "no such folder" in refused(capfd, "--out", tmp_path / "no" / "x.md")
    assert "is a folder; name a file in it" in refused(capfd, "--out", tmp_path)
    assert "one of nvlink_gbps" in refused(capfd, "--assume", "speed=3")
    assert "positive number" in refused(capfd, "--assume", "nic_gbps=fast")
    assert "unknown config key" in refused(capfd, "sed=1")
    assert "cannot read the script" in refused(capfd, "--script", tmp_path / "no.py")


@pytest.mark.parametrize("failure, reason", [("os._exit(3)", "status 3"), ("1 / 0", "ZeroDivisionError")])
def test_a_rank_that_fails(tmp_path, failure, reason):
    """The others wait for it in a collective. All are ended, and one line gives the reason."""
    script = changed(tmp_path, PATCH.format(before=f"self.m.rank == 1 and {failure}", after="pass"))
    with pytest.raises(BadInput, match="rank 1 of 2: .*" + reason):
        steps_of(2, script=script)


def test_a_machine_of_helpers_is_enough():
    """Nothing of the tool is left in the script that other tests import."""
    assert t.orthogonalize.__module__ == "train_gpt" and machine().world_size == 1
    assert not hasattr(dist.all_reduce, "_told")
