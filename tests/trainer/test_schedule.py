"""The optimizer's schedule on 1, 2 and 4 gloo ranks: who works on what, and what goes over the wire."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.helpers import all_equal, gaussian, machine, noisy_model, padding_of, tiny
from tests.rank_cases import group_of_one, run_ranks
from tests.trainer.schedule_cases import (
    STEPS,
    TOLERANCE,
    Call,
    data_folder,
    env_machine,
    parameters,
    setup,
    watch_collectives,
)


class Trained(NamedTuple):
    """What a rank has after STEPS steps, for tests to compare with other ranks, world sizes and schedules."""

    params: dict[str, torch.Tensor]
    ema: list[torch.Tensor]
    losses: list[float]
    padding: dict[str, float]  # sum of magnitudes of the padded rows, by bank
    state: list[torch.Tensor]  # of the optimizer
    middle: Any  # the optimizer's snapshot after step MIDDLE


class Schedule(NamedTuple):
    """What a rank does in one step of its optimizer."""

    calls: list[Call]
    groups: list[list[int]]  # the ranks of each level
    sizes: list[int]  # of the banks, in bytes
    owned: dict[str, int]  # matrices, by bank
    parts: list[slice]  # that the rank keeps of each level's


class RankResult(NamedTuple):
    """What a rank returns."""

    trained: Trained
    factors: list[float]  # by which each step clipped its gradients, those trained again and watched too
    repeats: bool  # whether the steps after MIDDLE, trained again from a snapshot, gave the same bits
    steps: int  # that the optimizer counted
    schedule: Schedule
    agreed: t.Agreed
    of_rank_0: float
    largest: int


MIDDLE = 2  # steps before the snapshot


def run_steps(optimizer, backward, loader, steps, after=lambda step, loss: None):
    """Train these steps, each followed by after(step, loss)."""
    for step in steps:
        after(step, t.train_step(backward, optimizer, loader.next(), t.hyper_at(optimizer.h, step, 0.0)))


def note_factors(optimizer):
    """Return a list to which every step of the optimizer appends the factor of its gradients."""
    gradient_factor = optimizer.gradient_factor
    factors = []

    def noted_factor(squares):
        factors.append(gradient_factor(squares))
        return factors[-1]

    optimizer.gradient_factor = noted_factor
    return factors


def train_steps(model, optimizer, ema, loader, backward):
    """Train STEPS steps and return what came out."""
    losses = []

    def note(step, loss):
        ema.update(step / STEPS)
        t.dist.all_reduce(loss, t.dist.ReduceOp.AVG)
        losses.append(loss.item())

    run_steps(optimizer, backward, loader, range(MIDDLE), note)
    middle = optimizer.snapshot()
    run_steps(optimizer, backward, loader, range(MIDDLE, STEPS), note)
    return Trained(
        params=parameters(model),
        ema=[x.clone() for x in ema.average],
        losses=losses,
        padding={name: padding_of(optimizer, model, name).abs().sum().item() for name in optimizer.bank},
        state=[x.clone() for x in optimizer.state()],
        middle=middle,
    )


def repeats_from_snapshot(trained, optimizer, loader, backward):
    """Return whether the steps after MIDDLE, trained again, give the same bits."""
    optimizer.restore(trained.middle)
    loader.seek(MIDDLE * loader.shape.accum)
    run_steps(optimizer, backward, loader, range(MIDDLE, STEPS))
    return all_equal(trained.state, optimizer.state())


def watch_schedule(optimizer, m):
    """Return what one more step of the optimizer does."""
    with watch_collectives() as calls:
        optimizer.step(t.hyper_at(optimizer.h, 0, 0.0))
    return Schedule(
        calls=calls,
        groups=[t.dist.get_process_group_ranks(level.group or t.dist.group.WORLD) for level in m.levels],
        sizes=[bank.numel() * 4 for bank in optimizer.bank.values()],
        owned={name: len(momentum) for name, momentum in optimizer.momentum.items()},
        parts=[level.kept for level in m.levels],
    )


def train_rank(rank, folder, knobs, per_node=0):
    """Train on this rank, train the last steps again, then watch a step. Returns a RankResult."""
    knobs = knobs | {"data_path": folder}
    m = env_machine(tiny(**knobs), per_node)
    assert m.rank == rank
    model, optimizer, ema, loader = setup(m, **knobs)
    backward, _ = t.capture_pass(model.loss, optimizer)

    factors = note_factors(optimizer)
    trained = train_steps(model, optimizer, ema, loader, backward)
    repeats = repeats_from_snapshot(trained, optimizer, loader, backward)
    schedule = watch_schedule(optimizer, m)
    return RankResult(
        trained=trained._replace(state=[], middle=None),
        factors=[x.item() for x in factors],
        repeats=repeats,
        steps=optimizer.steps - 1,
        schedule=schedule,
        agreed=m.agree(rank + 0.5, t.Stop(min(rank, 2))),
        of_rank_0=m.number_of_rank_0(rank + 0.5),
        largest=m.largest(rank),
    )


CASES = {
    "four layers": {},
    "one layer": dict(num_layers=1, xsa_last_n=1, ve_last_n=1),
    "three layers": dict(num_layers=3),
}


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "_"))
def worlds(request):
    """Return the results of train_rank by world size and rank."""
    return {world: run_ranks(train_rank, world, data_folder(), CASES[request.param]) for world in (1, 2, 4)}


def start_of(params):
    """Return what training started from, for parameters of any number of layers."""
    layers = params["q_gain"].size(0)
    ve_layers = params["ve_layer_scale"].size(0)
    h = tiny(num_layers=layers, xsa_last_n=min(2, layers), ve_last_n=ve_layers)
    return parameters(noisy_model(h, seed=3))


def size_of(name, p, start):
    """Return the norm of a parameter: what its error is compared with.

    Three layers take ve_scale, a single number, from 0.086 to 0.001. Its rounding errors are those of the
    values on the way, 70 times as large as what is left, so it is compared with its way from `start`.
    """
    way = (p - start).norm().item()
    if name == "ve_scale" and p.norm().item() < way / 20:
        return way
    return p.norm().item()


def assert_same_parameters(params):
    """Check that all ranks hold the same bits. params: the parameters of each rank, by name."""
    first, *others = params
    for other in others:
        assert all(torch.equal(p, other[name]) for name, p in first.items()), len(params)


def test_ranks_hold_the_same_bits(worlds):
    for world, ranks in worlds.items():
        assert_same_parameters([r.trained.params for r in ranks])
        for other in ranks[1:]:
            assert all_equal(ranks[0].trained.ema, other.trained.ema)
            assert other.factors == ranks[0].factors
            assert other.trained.losses == ranks[0].trained.losses
        for r in ranks:
            assert r.agreed == t.Agreed(clock_ms=0.5, stop=t.Stop(min(world - 1, 2)))
            assert isinstance(r.agreed.stop, t.Stop)
            assert (r.of_rank_0, r.largest) == (0.5, world - 1)


def test_the_world_size_changes_only_rounding(worlds):
    alone = worlds[1][0]
    start = start_of(alone.trained.params)
    for world in (2, 4):
        for name, p in worlds[world][0].trained.params.items():
            expected = alone.trained.params[name]
            moved = (expected - start[name]).norm().item()
            error = (p - expected).norm().item()
            assert error <= TOLERANCE * size_of(name, expected, start[name]), (world, name, error, moved)
            # Training moved it, and far more than that.
            assert name == "skip_weights" or moved > 100 * error, name
        # Measured: 1.1e-7.
        assert worlds[world][0].trained.losses == pytest.approx(alone.trained.losses, rel=2e-6)


def test_padding_stays_zero(worlds):
    """Cover one layer on four ranks: two ranks own only padding, the middle ones for the MLP's bank."""
    for ranks in worlds.values():
        assert all(total == 0.0 for r in ranks for total in r.trained.padding.values())
        assert all(torch.isfinite(p).all() for p in ranks[0].trained.params.values())


def test_restore_and_train_again_is_bit_equal(worlds):
    assert all(r.repeats and r.steps == STEPS for ranks in worlds.values() for r in ranks)


def test_clipping_acts_on_the_global_norm_of_the_mean_gradient(worlds):
    """Compare the factor of the first step with a float64 norm over all parameters on the whole batch."""
    params = worlds[1][0].trained.params
    layers = params["q_gain"].size(0)
    ve_layers = params["ve_layer_scale"].size(0)
    h = tiny(data_path=data_folder(), num_layers=layers, xsa_last_n=min(2, layers), ve_last_n=ve_layers)
    with group_of_one() as m:
        sequences = torch.cat(t.TokenLoader(h, m).next())
    model = noisy_model(h, seed=3, dtype=torch.float64)
    model.loss(sequences[:, :-1], sequences[:, 1:]).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
    assert norm > 0.6  # it does clip
    for ranks in worlds.values():
        assert ranks[0].factors[0] == pytest.approx(0.3 / norm, rel=1e-5)  # measured: 1e-6


# ---------------------------------------------------------------- work


def flops(b, M, N):
    """Return the work of b matrices in one step of a quintic: XX', A^2 and a product with X."""
    short, long = sorted((M, N))
    return b * (4 * short * short * long + 2 * short**3)


# World size: the busiest rank's work over the mean, and the same with a bank for each parameter.
BALANCE = {1: (1.0, 1.0), 2: (1.0, 1.060), 4: (1.091, 1.091), 8: (1.091, 1.330), 16: (1.455, 1.455)}


@pytest.mark.parametrize("world", BALANCE)
def test_the_busiest_rank(world):
    """Use 11 layers in the shape of `record_sp1024`.

    Every matrix has one owner, and few owners have two MLP shapes.
    """
    h = tiny(num_layers=11, mlp_mult=3.0)  # F = 3 D and kv = D / 2 as there, so the shares are the same
    model = t.GPT(h)
    work = []
    seen = {spec.name: 0 for spec in t.MATRICES}
    for rank in range(world):
        optimizer = t.Optimizer(model, h, machine(rank, world))
        owned = [own for matrices in optimizer.owned.values() for own in matrices]
        work.append(sum(flops(*own.weights.shape) for own in owned))
        for name, momentum in optimizer.momentum.items():
            seen[name] += len(momentum)
            assert momentum.shape[1:] == getattr(model, name).shape[1:]
        assert len(optimizer.owned["mlp"]) <= (2 if world == 1 else 1)
        assert all(bank.shape[:2] == (world, -(-22 // world)) for bank in optimizer.bank.values())

    shapes = {spec.name: getattr(model, spec.name).shape for spec in t.MATRICES}
    assert seen == {name: shape[0] for name, shape in shapes.items()}
    total = sum(flops(*shape) for shape in shapes.values())
    busiest_apart = sum(flops(-(-shape[0] // world), *shape[1:]) for shape in shapes.values())
    assert sum(work) == total
    balance = (max(work) * world / total, busiest_apart * world / total)
    assert balance == pytest.approx(BALANCE[world], abs=5e-4)  # measured: 4.8e-4


# ---------------------------------------------------------------- the wire


WIRE_STEPS = 12


class WireResult(NamedTuple):
    """What a rank returns after WIRE_STEPS steps with gradients of a dtype."""

    params: dict[str, torch.Tensor]
    losses: list[float]  # of each step
    again: float  # the loss on the first batch, after training
    calls: list[Call]  # the collectives of the last step
    state: set[str]  # dtypes of the optimizer's state
    same: bool  # whether what is sent are the gradients themselves, not copies
    clear: bool  # whether all gradients are zero after the last step


def wire_rank(rank, folder, dtype):
    """Train WIRE_STEPS steps on this rank."""
    m = env_machine(tiny(data_path=folder))
    # The bounds below were found with these.
    knobs = dict(step_rule="muon", matrix_lr=0.025, mix_tokens=0, seed=2)
    model, optimizer, _, loader = setup(m, data_path=folder, wire_dtype=dtype, **knobs)
    state = {str(x.dtype) for x in optimizer.state()}
    gradients = optimizer.bank_grad | {"flat": optimizer.flat_grad}
    same = all(optimizer.wire[name] is gradient for name, gradient in gradients.items())
    backward, _ = t.capture_pass(model.loss, optimizer)
    losses = []
    for step in range(WIRE_STEPS):
        batch = loader.next()
        hp = t.hyper_at(optimizer.h, step, 0.0)
        with watch_collectives() as calls:
            loss = t.train_step(backward, optimizer, batch, hp)
        t.dist.all_reduce(loss, t.dist.ReduceOp.AVG)
        losses.append(loss.item())
    clear = all(gradient.abs().max() == 0 for gradient in gradients.values())
    loader.seek(0)
    with torch.no_grad():
        again = torch.stack([model.loss(x[:, :-1], x[:, 1:]) for x in loader.next()]).mean()
    t.dist.all_reduce(again, t.dist.ReduceOp.AVG)
    return WireResult(
        params=parameters(model),
        losses=losses,
        again=again.item(),
        calls=calls,
        state=state,
        same=same,
        clear=clear,
    )


@pytest.fixture(scope="module")
def wires():
    """Return the results of wire_rank by (dtype, world size) and rank."""
    return {
        (dtype, world): run_ranks(wire_rank, world, data_folder(), dtype)
        for dtype in ("float32", "bfloat16")
        for world in (1, 2, 4)
    }


def test_the_schedule_of_one_node(wires):
    """Send gradients biggest first and the small tensors after them, then one norm.

    Banks return cheapest first.
    """
    expected = ["reduce_scatter"] * 3 + ["all_reduce"] * 2 + ["all_gather"] * 3
    for (dtype, world), ranks in wires.items():
        for rank in ranks:
            assert [call.name for call in rank.calls] == expected
            sizes = [call.bytes for call in rank.calls]
            assert sizes[:3] == sorted(sizes[:3], reverse=True)
            assert sizes[5:] == sorted(sizes[5:])
            assert all(call.ranks == world for call in rank.calls)
            assert rank.clear and rank.state == {"torch.float32"}
            assert rank.same == (dtype == "float32")


def test_bfloat16_halves_the_bytes_of_gradients_and_of_nothing_else(wires):
    for world in (1, 2, 4):
        wide = wires["float32", world][0].calls
        narrow = wires["bfloat16", world][0].calls
        assert [call.bytes for call in wide[:4]] == [2 * call.bytes for call in narrow[:4]]
        assert wide[4:] == narrow[4:]
        assert {call.dtype for call in wide[:4]} == {torch.float32}
        assert {call.dtype for call in narrow[:4]} == {torch.bfloat16}
        assert {call.dtype for call in narrow[5:]} == {torch.float32}


WIRE_BOUND = 0.05  # seeds 1 to 3 come to 0.035; of seed 1337 ve_emb comes to 0.0501

WIRE_LOSS = 5e-4  # measured: 7.8e-5


def test_bfloat16_gradients_train_the_same_model_to_their_precision(wires):
    exact = wires["float32", 1][0]
    for (dtype, world), ranks in wires.items():
        assert_same_parameters([r.params for r in ranks])
        bound = TOLERANCE if dtype == "float32" else WIRE_BOUND
        for name, p in ranks[0].params.items():
            expected = exact.params[name]
            assert (p - expected).norm() <= bound * expected.norm(), (dtype, world, name)
        last = np.mean(ranks[0].losses[-4:])
        assert last == pytest.approx(np.mean(exact.losses[-4:]), rel=WIRE_LOSS)
        assert ranks[0].again < ranks[0].losses[0] - 0.1  # of one batch: batches differ by more
    narrow = wires["bfloat16", 1][0].params
    assert any(not torch.equal(p, narrow[name]) for name, p in exact.params.items())


def test_gradients_in_bfloat16_are_added_up_in_float32():
    """Compare a bfloat16 gradient with its float32 copy: no sum or product is rounded to eight bits."""
    h = tiny(step_rule="normuon", ortho="polar_express")
    gradient = gaussian(2, 24, 16).bfloat16()
    scalars = t.StepScalars(*(torch.tensor(x) for x in (0.9, 0.02, 1.0, 1.0, 1.0, 0.1, 0.05)))

    factor = torch.tensor(0.3)
    ends = []
    for sent in (gradient, gradient.float()):
        W = torch.ones(2, 24, 16)
        momentum = torch.full((2, 24, 16), 0.1)
        second = torch.zeros(2, 24, 1)
        t.matrix_update(t.OwnedMatrices(W, sent, momentum, second), factor, scalars, h)

        p = torch.ones(sent.numel())
        others = [torch.full((sent.numel(),), 0.1) for _ in range(4)]
        t.adam_update(t.FlatBuffers(p, sent.flatten(), *others), factor, scalars, h)
        ends.append([W, momentum, second, p, *others])
    assert all_equal(*ends)


# ---------------------------------------------------------------- several nodes


# World size, ranks on a node, case.
NODES = [
    (4, 2, "four layers"),
    (4, 2, "one layer"),
    (4, 2, "three layers"),
    (4, 1, "three layers"),
    (4, 4, "three layers"),
    (6, 3, "three layers"),
]


@pytest.fixture(scope="module", params=NODES, ids=lambda x: f"{x[0] // x[1]}x{x[1]}_{x[2].replace(' ', '_')}")
def nodes(request):
    """Return the ranks of a node, the results of train_rank alone, and those of every rank."""
    world, per_node, case = request.param
    knobs = dict(CASES[case])
    if world == 6:
        knobs["train_batch_tokens"] = 384  # with 192, an AMD EPYC rounds bigram_emb to 3.8e-5 of its norm
    alone = run_ranks(train_rank, 1, data_folder(), knobs)[0]
    return per_node, alone, run_ranks(train_rank, world, data_folder(), knobs, per_node)


def test_nodes_train_the_model_of_one_rank(nodes):
    _, alone, ranks = nodes
    first = ranks[0]
    start = start_of(alone.trained.params)
    for r in ranks:
        assert all(torch.equal(p, r.trained.params[name]) for name, p in first.trained.params.items())
        assert all_equal(first.trained.ema, r.trained.ema)
        assert r.factors == first.factors
        assert r.repeats
        assert not any(r.trained.padding.values())
    for name, p in first.trained.params.items():
        expected = alone.trained.params[name]
        assert (p - expected).norm() <= TOLERANCE * size_of(name, expected, start[name]), name
    assert first.trained.losses == pytest.approx(alone.trained.losses, rel=2e-6)  # measured: 1e-7
    assert first.factors == pytest.approx(alone.factors, rel=2e-6)  # measured: 1.2e-7
    matrices = {spec.name for spec in t.MATRICES}
    for name, p in alone.trained.params.items():  # each matrix has one owner in the whole world
        assert name not in matrices or sum(r.schedule.owned.get(name, 0) for r in ranks) == len(p)


def test_only_a_nodes_share_crosses_nodes(nodes):
    """Share a whole bank inside a node, and 1 / per_node of it among the ranks of equal local rank.

    A single node has one level.
    """
    per_node, _, ranks = nodes
    world = len(ranks)
    count = world // per_node
    # Ranks of a group, and the divisor of the bytes that they share, down the levels.
    inward = [(per_node, 1), (count, per_node)] if count > 1 else [(world, 1)]
    for rank, r in enumerate(ranks):
        node, local_rank = divmod(rank, per_node)
        inside = list(range(node * per_node, (node + 1) * per_node))
        across = list(range(local_rank, world, per_node))
        assert r.schedule.groups == [inside, across][: len(inward)]

        sizes = r.schedule.sizes
        assert sizes == sorted(sizes, reverse=True)
        expected = [("reduce_scatter", size // cut, n) for size in sizes for n, cut in inward]
        expected += [("all_gather", size // cut, n) for size in sizes[::-1] for n, cut in inward[::-1]]
        of_banks = [call for call in r.schedule.calls if call.name != "all_reduce"]
        assert [(call.name, call.bytes, call.ranks) for call in of_banks] == expected
        others = [call.ranks for call in r.schedule.calls if call.name == "all_reduce"]
        assert others == [world] * 2  # the small tensors, the norm

    owned = [r.schedule.parts[-1] for r in ranks]
    assert sorted(part.start for part in owned) == list(range(world))
    assert all(part.stop - part.start == 1 for part in owned)


def rank_slices(rank, per_node):
    """Return the slices (whole, part) of this rank's levels."""
    m = env_machine(tiny(), per_node)
    return [(level.whole, level.kept) for level in m.levels]


def test_levels_are_as_drawn():
    """Check the drawing in Level's docstring: rank 5 of eight, local rank 1 of node 1."""
    ranks = run_ranks(rank_slices, 8, 4)
    assert ranks[5] == [(slice(0, 8), slice(2, 4)), (slice(2, 4), slice(3, 4))]
    assert sorted(levels[-1][1].start for levels in ranks) == list(range(8))


@pytest.mark.parametrize(
    "variables", [dict(LOCAL_WORLD_SIZE="3"), dict(LOCAL_WORLD_SIZE="2", LOCAL_RANK="1")], ids=str
)
def test_unequal_nodes_are_refused(variables):
    env = dict(WORLD_SIZE="8", RANK="4", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    with pytest.raises(t.InputError, match=r"^RANK=4 LOCAL_WORLD_SIZE=\d: .*--nproc_per_node"):
        t.init_machine(tiny(), env | variables)
