"""The optimizer on 1, 2 and 4 gloo ranks, snapshot and warm-up, clipping, schedules and the average."""

import contextlib
import dataclasses
import math
import os
from functools import cache

import numpy as np
import pytest
import torch

import train_gpt as t
from helpers import (
    group_of_one,
    machine,
    noisy_model,
    padding_of,
    random_tokens,
    run_ranks,
    shard_folder,
    temporary_folder,
    tiny,
)  # fmt: skip

STEPS = 6
# Ranks and micro-batches sum the same numbers in another order: float32 rounding, 6e-8 a sum. Newton-Schulz
# stretches small singular values of a gradient, and its rounding, by up to 3.4445^5 = 485. Measured after six
# steps: at most 3e-6 of a parameter's norm; a rank that is left out or counted twice changes it by over 1e-2.
TOLERANCE = 3e-5


@cache
def data_folder():
    folder = temporary_folder() / "data"
    shard_folder(folder, tiny(), [60, 40], seed=5)
    return str(folder)


def setup(m, **knobs):
    """A noisy model (all gradients alive), its optimizer, average and loader."""
    if "data_path" not in knobs:  # a rank is told: a folder of its own would outlive it
        knobs["data_path"] = data_folder()
    h = tiny(**({"grad_clip": 0.3} | knobs))
    model = noisy_model(h, seed=3)
    optimizer = t.Optimizer(model, h, m)
    return model, optimizer, t.Ema(model, h), t.TokenLoader(h, m)


def parameters(model):
    return {k: p.detach().clone() for k, p in model.named_parameters()}


def env_machine(h, per_node=0):
    """The Machine of this torchrun-like process; per_node: on nodes of so many, where torchrun says more."""
    place = int(os.environ["RANK"]) % (per_node or 1)
    more = dict(LOCAL_WORLD_SIZE=str(per_node), LOCAL_RANK=str(place)) if per_node else {}
    return t.init_machine(h, os.environ | more)


COLLECTIVES = ((t, "reduce_scatter"), (t, "all_gather"), (t.dist, "all_reduce"))


@contextlib.contextmanager
def watch_collectives():
    """Yields a list that gets (name, bytes of the whole buffer, its dtype, ranks that share it) of each collective."""
    calls = []

    def watched(name, real):
        def launch(out, *rest, **named):
            whole = rest[0] if name == "reduce_scatter" else out
            group = named.get("group") or (rest[1] if name == "all_gather" and len(rest) > 1 else None)
            calls.append(
                (name, whole.numel() * whole.element_size(), whole.dtype, t.dist.get_world_size(group))
            )
            return real(out, *rest, **named)

        return launch

    with pytest.MonkeyPatch.context() as patch:
        for module, name in COLLECTIVES:
            patch.setattr(module, name, watched(name, getattr(module, name)))
        yield calls


def train_rank(rank, folder, knobs, per_node=0):
    """STEPS training steps on this rank; parameters, clip factors, padding, and what restore gives."""
    knobs = knobs | {"data_path": folder}
    m = env_machine(tiny(**knobs), per_node)
    assert m.rank == rank
    model, optimizer, ema, loader = setup(m, **knobs)
    factors, clip_factor = [], optimizer.clip_factor
    optimizer.clip_factor = lambda: factors.append(clip_factor()) or factors[-1]
    backward, losses, saved = t.bind_pass(model.loss, optimizer)[0], [], None
    for step in range(STEPS):
        if step == 2:
            saved = optimizer.snapshot()
        loss = t.train_step(backward, optimizer, loader.next(), t.hyper_at(optimizer.h, step, 0.0))
        ema.update(step / STEPS)
        t.dist.all_reduce(loss, t.dist.ReduceOp.AVG)
        losses.append(loss.item())
    first = parameters(model)
    padding = {k: padding_of(optimizer, model, k).abs().sum().item() for k in optimizer.bank}
    state = [x.clone() for x in optimizer.state()]
    optimizer.restore(saved)
    loader.seek(2)
    for step in range(2, STEPS):
        t.train_step(backward, optimizer, loader.next(), t.hyper_at(optimizer.h, step, 0.0))
    again = all(torch.equal(a, b) for a, b in zip(state, optimizer.state()))
    with watch_collectives() as calls:
        optimizer.step(t.hyper_at(optimizer.h, 0, 0.0))
    groups = [t.dist.get_process_group_ranks(level[0] or t.dist.group.WORLD) for level in m.levels]
    return dict(
        params=first, ema=[x.clone() for x in ema.average], factors=[x.item() for x in factors], padding=padding, losses=losses,
        again=again, steps=optimizer.steps - 1, agreed=m.agree(rank + 0.5, rank), calls=calls, groups=groups,
        sizes=[b.numel() * 4 for b in optimizer.bank.values()], owned={k: len(v) for k, v in optimizer.momentum.items()},
        ours=[part for _, _, part in m.levels],
    )  # fmt: skip


CASES = {
    "four layers": {},
    "one layer": dict(num_layers=1, xsa_last_n=1, ve_last_n=1),
    "three layers": dict(num_layers=3),
}


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "_"))
def worlds(request):
    """world size -> results of its ranks."""
    return {w: run_ranks(train_rank, w, data_folder(), CASES[request.param]) for w in (1, 2, 4)}


def test_ranks_hold_the_same_bits(worlds):
    for world, ranks in worlds.items():
        for other in ranks[1:]:
            assert all(torch.equal(p, other["params"][k]) for k, p in ranks[0]["params"].items()), world
            assert all(torch.equal(a, b) for a, b in zip(ranks[0]["ema"], other["ema"]))
            assert other["factors"] == ranks[0]["factors"] and other["losses"] == ranks[0]["losses"]
        assert [r["agreed"] for r in ranks] == [(0.5, world - 1)] * world  # rank 0's clock, the highest flag


def test_the_world_size_changes_only_rounding(worlds):
    one = worlds[1][0]
    start = {k: p.detach() for k, p in noisy_model(tiny(num_layers=one["params"]["q_gain"].size(0), xsa_last_n=1,
                                                       ve_last_n=one["params"]["ve_layer_scale"].size(0)), seed=3).named_parameters()}  # fmt: skip
    for world in (2, 4):
        for k, p in worlds[world][0]["params"].items():
            moved = (one["params"][k] - start[k]).norm().item()
            error = (p - one["params"][k]).norm().item()
            assert error <= TOLERANCE * one["params"][k].norm().item(), (world, k, error, moved)
            assert k == "skip_weights" or moved > 100 * error, k  # training moved it, and far more than that
        assert worlds[world][0]["losses"] == pytest.approx(one["losses"], rel=1e-5)


def test_padding_stays_zero(worlds):
    """One layer on four ranks: two ranks own nothing but padding, of the MLP's bank the middle ones."""
    for ranks in worlds.values():
        assert all(v == 0.0 for r in ranks for v in r["padding"].values())
        assert all(torch.isfinite(p).all() for p in ranks[0]["params"].values())


def test_restore_and_train_again_is_bit_equal(worlds):
    assert all(r["again"] and r["steps"] == STEPS for ranks in worlds.values() for r in ranks)


def test_clipping_acts_on_the_global_norm_of_the_mean_gradient(worlds):
    """The factor of the first step against a float64 norm over all parameters on the whole batch."""
    params = worlds[1][0]["params"]
    h = tiny(data_path=data_folder(), num_layers=params["q_gain"].size(0), xsa_last_n=min(2, params["q_gain"].size(0)),
             ve_last_n=params["ve_layer_scale"].size(0))  # fmt: skip
    with group_of_one() as m:
        rows = torch.cat(t.TokenLoader(h, m).next())
    model = noisy_model(h, seed=3, dtype=torch.float64)
    model.loss(rows[:, :-1], rows[:, 1:]).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
    assert norm > 0.6  # it does clip
    for ranks in worlds.values():
        assert ranks[0]["factors"][0] == pytest.approx(0.3 / norm, rel=1e-4)


# ---------------------------------------------------------------- work


def flops(b, M, N):
    """Of b matrices in one step of a quintic iteration: XX', A^2 and a product with X, n the short side."""
    n, m = sorted((M, N))
    return b * (4 * n * n * m + 2 * n**3)


# world: (the busiest rank's work over the mean, the same with a bank for each parameter)
BALANCE = {1: (1.0, 1.0), 2: (1.0, 1.060), 4: (1.091, 1.091), 8: (1.091, 1.330), 16: (1.455, 1.455)}


@pytest.mark.parametrize("world", BALANCE)
def test_the_busiest_rank(world):
    """11 layers in the shape of the record preset: every matrix has one owner, few owners have two MLP shapes."""
    h = tiny(num_layers=11, mlp_mult=3.0)  # F = 3 D and kv = D / 2 as there, so the shares are the same
    model, work, seen = t.GPT(h), [], {s.name: 0 for s in t.MATRICES}
    for rank in range(world):
        optimizer = t.Optimizer(model, h, machine(rank, world))
        work.append(sum(flops(*W.shape) for owned in optimizer.owned.values() for W, *_ in owned))
        for name, momentum in optimizer.momentum.items():
            seen[name] += len(momentum)
            assert momentum.shape[1:] == getattr(model, name).shape[1:]
        assert len(optimizer.owned["mlp"]) <= (2 if world == 1 else 1)
        assert all(bank.shape[:2] == (world, -(-22 // world)) for bank in optimizer.bank.values())
    shapes = {s.name: getattr(model, s.name).shape for s in t.MATRICES}
    assert seen == {name: shape[0] for name, shape in shapes.items()}
    total = sum(flops(*shape) for shape in shapes.values())
    before = sum(flops(-(-shape[0] // world), *shape[1:]) for shape in shapes.values())
    assert sum(work) == total
    assert (max(work) * world / total, before * world / total) == pytest.approx(BALANCE[world], abs=5e-4)


# ---------------------------------------------------------------- the wire


WIRE_STEPS = 12


def wire_rank(rank, folder, dtype):
    """WIRE_STEPS steps: parameters, the mean loss of the last four, the collectives of the last step."""
    m = env_machine(tiny(data_path=folder))
    knobs = dict(step_rule="muon", matrix_lr=0.025, mix_tokens=0)  # what the bounds below were found with
    model, optimizer, _, loader = setup(m, data_path=folder, wire_dtype=dtype, **knobs)
    state = {str(x.dtype) for x in optimizer.state()}
    same = all(
        optimizer.wire[k] is g for k, g in (optimizer.bank_grad | {"flat": optimizer.flat_grad}).items()
    )
    backward, losses = t.bind_pass(model.loss, optimizer)[0], []
    for step in range(WIRE_STEPS):
        batch, hp = loader.next(), t.hyper_at(optimizer.h, step, 0.0)
        with watch_collectives() as calls:
            loss = t.train_step(backward, optimizer, batch, hp)
        t.dist.all_reduce(loss, t.dist.ReduceOp.AVG)
        losses.append(loss.item())
    clear = all(g.abs().max() == 0 for g in (*optimizer.bank_grad.values(), optimizer.flat_grad))
    return dict(params=parameters(model), losses=losses, calls=calls, state=state, same=same, clear=clear)


@pytest.fixture(scope="module")
def wires():
    """(dtype, world size) -> results of its ranks."""
    return {
        (d, w): run_ranks(wire_rank, w, data_folder(), d) for d in ("float32", "bfloat16") for w in (1, 2, 4)
    }


def test_the_schedule_of_one_node(wires):
    """Gradients biggest first, the small tensors behind them, one norm; banks go back cheapest first."""
    for (dtype, world), ranks in wires.items():
        for rank in ranks:
            assert [c[0] for c in rank["calls"]] == ["reduce_scatter"] * 3 + ["all_reduce"] * 2 + [
                "all_gather"
            ] * 3
            sizes = [c[1] for c in rank["calls"]]
            assert sizes[:3] == sorted(sizes[:3], reverse=True) and sizes[5:] == sorted(sizes[5:])
            assert all(c[3] == world for c in rank["calls"])
            assert (
                rank["clear"] and rank["state"] == {"torch.float32"} and rank["same"] == (dtype == "float32")
            )


def test_bfloat16_halves_the_bytes_of_gradients_and_of_nothing_else(wires):
    for world in (1, 2, 4):
        wide, narrow = (wires[d, world][0]["calls"] for d in ("float32", "bfloat16"))
        assert [c[1] for c in wide[:4]] == [2 * c[1] for c in narrow[:4]]
        assert wide[4:] == narrow[4:] and {c[2] for c in wide[:4]} == {torch.float32}
        assert {c[2] for c in narrow[:4]} == {torch.bfloat16} and {c[2] for c in narrow[5:]} == {
            torch.float32
        }


# Of a parameter's norm and of the loss after twelve steps, bfloat16 against float32: eight bits of a gradient, which
# Newton-Schulz stretches where singular values are small and Adam where a gradient changes sign.
# Measured: at most 0.027 (bigram_scale on 4 ranks) and 8e-5.
WIRE_BOUND, WIRE_LOSS = 0.05, 5e-4


def test_bfloat16_gradients_train_the_same_model_to_their_precision(wires):
    exact = wires["float32", 1][0]
    for (dtype, world), ranks in wires.items():
        for other in ranks[1:]:
            assert all(torch.equal(p, other["params"][k]) for k, p in ranks[0]["params"].items()), (
                dtype,
                world,
            )
        bound = TOLERANCE if dtype == "float32" else WIRE_BOUND
        for k, p in ranks[0]["params"].items():
            assert (p - exact["params"][k]).norm() <= bound * exact["params"][k].norm(), (dtype, world, k)
        assert np.mean(ranks[0]["losses"][-4:]) == pytest.approx(np.mean(exact["losses"][-4:]), rel=WIRE_LOSS)
        assert np.mean(ranks[0]["losses"][-4:]) < np.mean(ranks[0]["losses"][:4])
    narrow = wires["bfloat16", 1][0]["params"]
    assert any(not torch.equal(p, narrow[k]) for k, p in exact["params"].items())


def test_what_arrives_in_bfloat16_is_added_up_in_float32():
    """A bfloat16 gradient gives the bits that its float32 copy gives: no sum or product is rounded to eight bits."""
    h, generator = tiny(step_rule="normuon", ortho="polar_express"), torch.Generator().manual_seed(0)
    g = torch.randn(2, 24, 16, generator=generator).bfloat16()
    s = t.StepScalars(*(torch.tensor(x) for x in (0.3, 0.9, 0.02, 1.0, 0.1, 0.05)))
    ends = []
    for sent in (g, g.float()):
        W, momentum, second = torch.ones(2, 24, 16), torch.full((2, 24, 16), 0.1), torch.zeros(2, 24, 1)
        flat = [
            torch.ones(sent.numel()),
            sent.flatten(),
            *(torch.full((sent.numel(),), 0.1) for _ in range(4)),
        ]
        t.matrix_update(W, sent, momentum, s, h, second)
        t.adam_update(tuple(flat), s, h)
        ends.append([W, momentum, second, flat[0], *flat[2:]])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


# ---------------------------------------------------------------- several nodes


NODES = [(4, 2, "four layers"), (4, 2, "one layer"), (4, 2, "three layers"), (4, 1, "three layers"), (4, 4, "three layers"),
         (6, 3, "three layers")]  # fmt: skip


@pytest.fixture(scope="module", params=NODES, ids=lambda x: f"{x[0] // x[1]}x{x[1]}_{x[2].replace(' ', '_')}")
def nodes(request):
    world, per_node, case = request.param
    knobs = CASES[case] | (dict(train_batch_tokens=192) if world == 6 else {})
    one = run_ranks(train_rank, 1, data_folder(), knobs)[0]
    return per_node, one, run_ranks(train_rank, world, data_folder(), knobs, per_node)


def test_nodes_train_the_model_of_one_rank(nodes):
    _, one, ranks = nodes
    for r in ranks:
        assert all(torch.equal(p, r["params"][k]) for k, p in ranks[0]["params"].items())
        assert all(torch.equal(a, b) for a, b in zip(ranks[0]["ema"], r["ema"]))
        assert r["factors"] == ranks[0]["factors"] and r["again"] and not any(r["padding"].values())
    for k, p in ranks[0]["params"].items():
        assert (p - one["params"][k]).norm() <= TOLERANCE * one["params"][k].norm(), k
    assert ranks[0]["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert ranks[0]["factors"] == pytest.approx(one["factors"], rel=1e-5)
    for k, p in one["params"].items():  # each matrix has one owner in the whole world
        assert k not in {s.name for s in t.MATRICES} or sum(r["owned"].get(k, 0) for r in ranks) == len(p)


def test_what_crosses_nodes_is_a_nodes_share(nodes):
    """Inside a node all of a bank, between the ranks of one place 1 / per_node of it; one node has one level."""
    per_node, _, ranks = nodes
    world, count = len(ranks), len(ranks) // per_node
    inward = (
        [(per_node, 1), (count, per_node)] if count > 1 else [(world, 1)]
    )  # (ranks, the divisor of the bytes)
    for rank, r in enumerate(ranks):
        place, node = rank % per_node, rank // per_node
        groups = [list(range(node * per_node, (node + 1) * per_node)), list(range(place, world, per_node))]
        assert r["groups"] == groups[: len(inward)]
        assert r["sizes"] == sorted(r["sizes"], reverse=True)
        expected = [("reduce_scatter", size // cut, n) for size in r["sizes"] for n, cut in inward]
        expected += [("all_gather", size // cut, n) for size in r["sizes"][::-1] for n, cut in inward[::-1]]
        assert [(c[0], c[1], c[3]) for c in r["calls"] if c[0] != "all_reduce"] == expected
        assert [c[3] for c in r["calls"] if c[0] == "all_reduce"] == [
            world
        ] * 2  # the small tensors, the norm
    shares = [r["ours"][-1] for r in ranks]
    assert sorted(x.start for x in shares) == list(range(world)) and all(
        x.stop - x.start == 1 for x in shares
    )


@pytest.mark.parametrize(
    "place", [dict(LOCAL_WORLD_SIZE="3"), dict(LOCAL_WORLD_SIZE="2", LOCAL_RANK="1")], ids=str
)
def test_unequal_nodes_are_refused(place):
    env = dict(WORLD_SIZE="8", RANK="4", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1") | place
    with pytest.raises(t.InputError, match=r"^RANK=4 LOCAL_WORLD_SIZE=\d: .*--nproc_per_node"):
        t.init_machine(tiny(), env)


# ---------------------------------------------------------------- one process


@pytest.fixture
def one():
    with group_of_one() as m:
        yield m


def test_a_step_is_the_float64_step(one):
    """Three steps of the whole optimizer against AdamW by hand and SVD-based Newton-Schulz, per parameter."""
    model, optimizer, _, loader = setup(one, step_rule="muon")
    h = optimizer.h
    params = {k: p.detach().double().numpy() for k, p in parameters(model).items()}
    m1, m2 = ({k: np.zeros_like(p) for k, p in params.items()} for _ in range(2))
    rows, backward = {s.name: s for s in t.PARAM_TABLE}, t.bind_pass(model.loss, optimizer)[0]
    for step in range(1, 4):
        batch, hp = loader.next(), t.Hyper(0.0, 0.9, 0.8 / step)
        exact = noisy_model(h, dtype=torch.float64)
        with torch.no_grad():
            for k, p in exact.named_parameters():
                p.copy_(torch.from_numpy(params[k]))
        tokens = torch.cat(batch)
        exact.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        grads = {k: p.grad.numpy() for k, p in exact.named_parameters()}
        clip = min(1.0, h.grad_clip / math.sqrt(sum((g**2).sum() for g in grads.values())))
        for k, g in grads.items():
            lr, wd, g = (
                getattr(h, rows[k].lr) * hp.lr_mul,
                h.adam_wd if rows[k].buffer == "flat" else h.muon_wd,
                clip * g,
            )
            if rows[k].buffer == "flat":
                m1[k] = h.adam_beta1 * m1[k] + (1 - h.adam_beta1) * g
                m2[k] = h.adam_beta2 * m2[k] + (1 - h.adam_beta2) * g * g
                update = (
                    m1[k]
                    / (1 - h.adam_beta1**step)
                    / (np.sqrt(m2[k] / (1 - h.adam_beta2**step)) + h.adam_eps)
                )
                params[k] = params[k] * (1 - lr * wd) - lr * update
                continue
            m1[k] = 0.9 * m1[k] + 0.1 * g
            for i in range(len(g)):
                U, S, Vh = np.linalg.svd(0.1 * g[i] + 0.9 * m1[k][i], full_matrices=False)
                S = S / np.linalg.norm(S)
                for _ in range(5):
                    S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
                scale = math.sqrt(max(1.0, g[i].shape[0] / g[i].shape[1]))
                params[k][i] = params[k][i] * (1 - lr * wd) - lr * scale * (U * S) @ Vh
        t.train_step(backward, optimizer, batch, hp)
        for k, p in model.named_parameters():
            got, expected = p.detach().double().numpy(), params[k]
            # Adam divides by sqrt(v): where a gradient is near zero its rounding decides the sign
            bad = np.abs(got - expected) > 1e-4 + 1e-3 * np.abs(expected)
            assert bad.mean() <= 0.002, (step, k, np.abs(got - expected).max())


def test_gradients_accumulate_over_micro_batches_and_are_cleared(one):
    results = []
    for micro in (16, 128):
        model, optimizer, _, loader = setup(one, micro_batch_tokens=micro)
        batch = loader.next()
        assert len(batch) == 128 // micro
        loss = t.train_step(
            t.bind_pass(model.loss, optimizer)[0], optimizer, batch, t.hyper_at(optimizer.h, 0, 0.0)
        )
        results.append((loss.item(), optimizer.flat.clone()))
        assert all(p.grad.abs().max() == 0 for p in model.parameters())
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=2e-3, rtol=0)


def test_parameters_live_in_the_optimizers_buffers(one):
    model, optimizer, _, _ = setup(one)
    buffers = {s.name: s.buffer for s in t.PARAM_TABLE}
    for k, p in model.named_parameters():
        home, grad = (
            optimizer.bank.get(buffers[k], optimizer.flat),
            optimizer.bank_grad.get(buffers[k], optimizer.flat_grad),
        )
        assert p.untyped_storage().data_ptr() == home.untyped_storage().data_ptr(), k
        assert p.grad.untyped_storage().data_ptr() == grad.untyped_storage().data_ptr(), k
        assert p.data_ptr() % 64 == 0 and p.is_contiguous() and p.grad.is_contiguous()
    assert {s.name for s in t.PARAM_TABLE} == dict(model.named_parameters()).keys()
    torch.manual_seed(0)
    before = parameters(noisy_model(optimizer.h, seed=3))
    assert all(torch.equal(p, before[k]) for k, p in model.named_parameters())  # moving kept the contents


def test_snapshot_is_exact_and_a_copy(one):
    model, optimizer, _, loader = setup(one)
    backward, _ = t.bind_pass(model.loss, optimizer)
    step = lambda i: t.train_step(backward, optimizer, loader.next(), t.hyper_at(optimizer.h, i, 0.0))
    step(0), step(1)
    saved = optimizer.snapshot()
    frozen = [x.clone() for x in saved[1]]
    step(2)
    assert optimizer.steps == 3 and any(not torch.equal(a, b) for a, b in zip(saved[1], optimizer.state()))
    assert all(torch.equal(a, b) for a, b in zip(saved[1], frozen))  # a copy, not a view
    model.loss(
        *(random_tokens(optimizer.h, (2, 16), s) for s in (1, 2))
    ).backward()  # half a step's gradients
    optimizer.restore(saved)
    assert optimizer.steps == 2 and all(torch.equal(a, b) for a, b in zip(frozen, optimizer.state()))
    assert all(p.grad.abs().max() == 0 for p in model.parameters())
    named = {x.data_ptr() for x in optimizer.state()}  # nothing that a step changes is left out
    kept = [
        optimizer.flat,
        optimizer.flat_m,
        optimizer.flat_v,
        *optimizer.bank.values(),
        *optimizer.momentum.values(),
        *optimizer.second.values(),
    ]
    assert optimizer.second
    assert {x.data_ptr() for x in kept} == named


def test_warmup_leaves_no_trace(one):
    model, optimizer, ema, loader = setup(one, warmup_steps=3)
    lines, calls = [], []
    nats = lambda x, y, last: calls.append((tuple(x.shape), last)) or model.nats(x, y, last)
    run = t.Run(optimizer.h, one, lines.append, None, model, model.loss, nats, {}, {})
    before = [x.clone() for x in optimizer.state()], [x.clone() for x in ema.average]
    reference = [x.clone() for x in loader.build(0)]
    hidden = []
    real = optimizer.step
    optimizer.step = lambda hp: (
        real(hp) or hidden.append(any(not torch.equal(a, b) for a, b in zip(before[0], optimizer.state())))
    )
    t.warmup(run, optimizer, ema, loader)
    assert hidden == [True] * 3  # it did train
    assert all(torch.equal(a, b) for a, b in zip(before[0], optimizer.state())) and optimizer.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before[1], ema.average)) and ema.progress == 0
    assert all(p.grad.abs().max() == 0 for p in model.parameters())
    assert loader.index == 0 and all(torch.equal(a, b) for a, b in zip(reference, loader.next()))
    assert calls and calls[0][0] == (4, 16)  # the scoring forward is warm, too
    assert "warmup_step:3/3" in lines


@pytest.mark.parametrize("clip", [0.05, 1e9])
@pytest.mark.parametrize("knobs", [{}, dict(bigram_vocab_size=600_000)], ids=["tiny", "5 million"])
def test_clip_factor(one, clip, knobs):
    """A float32 sum over millions would be short by more than the tolerance."""
    model, optimizer, _, _ = setup(one, grad_clip=clip, **knobs)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad.copy_(torch.randn(p.shape, generator=generator))
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    assert optimizer.clip_factor().item() == pytest.approx(min(1.0, clip / norm), rel=1e-5)


# ---------------------------------------------------------------- schedules


def test_hyper_at_is_pure_and_falls_to_the_floor():
    h = tiny(iterations=200, warmdown_frac=0.4, min_lr_frac=0.1, muon_momentum_warmup_frac=0.2,
             muon_momentum_start=0.8, muon_momentum=0.95)  # fmt: skip
    points = [t.hyper_at(h, i, 0.0) for i in range(201)]
    assert points == [t.hyper_at(h, i, 0.0) for i in range(201)]
    lr = [p.lr_mul for p in points]
    assert lr[:121] == [1.0] * 121 and lr[200] == 0.1
    assert all(a > b or b == 0.1 for a, b in zip(lr[120:], lr[121:]))
    assert lr[160] == pytest.approx(0.5) and lr[140] == pytest.approx(0.75)  # linear
    momentum = [p.momentum for p in points]
    assert (
        momentum[0] == 0.8
        and momentum[20] == pytest.approx(0.875)
        and momentum[40:] == pytest.approx([0.95] * 161)
    )
    assert all(a < b for a, b in zip(momentum[:40], momentum[1:41]))
    assert t.hyper_at(h, 500, 0.0).progress == 1.0
    assert t.hyper_at(dataclasses.replace(h, min_lr_frac=0.0), 200, 0.0).lr_mul == 0.0
    assert t.hyper_at(dataclasses.replace(h, muon_momentum_warmup_frac=0.0), 0, 0.0).momentum == 0.95


def test_the_multiplier_drives_every_parameter(one):
    for lr_mul in (0.0, 1.0):
        model, optimizer, _, loader = setup(one)
        before = parameters(model)
        t.train_step(
            t.bind_pass(model.loss, optimizer)[0], optimizer, loader.next(), t.Hyper(0.0, 0.9, lr_mul)
        )
        moved = {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}
        assert moved == ({s.name for s in t.PARAM_TABLE} if lr_mul else set())


# ---------------------------------------------------------------- rates of zero


def steps_of(one, count, model=None, **knobs):
    """Parameters at the start and after each of `count` steps at full rate."""
    h = tiny(data_path=data_folder(), **knobs)
    model = model or t.GPT(h)
    optimizer, loader = t.Optimizer(model, h, one), t.TokenLoader(h, one)
    backward, out = t.bind_pass(model.loss, optimizer)[0], [parameters(model)]
    for _ in range(count):
        t.train_step(backward, optimizer, loader.next(), t.Hyper(0.0, 0.9, 1.0))
        out.append(parameters(model))
    return model, out


@pytest.mark.parametrize("rate", ["embed_lr", "scalar_lr"])
def test_what_has_a_rate_of_zero_is_frozen(one, rate):
    """No gradient is made for it, no decay moves it, and the others train."""
    model, states = steps_of(one, 4, **{rate: 0.0}, adam_wd=0.5, proj_init_std=0.1)
    frozen = {s.name for s in t.SMALL if s.lr == rate}
    for name in frozen:
        p = getattr(model, name)
        assert (
            not p.requires_grad and p.grad.abs().max() == 0 and torch.equal(states[0][name], states[-1][name])
        )
    learning = {k for k, p in model.named_parameters() if p.requires_grad}
    assert frozen and learning == {s.name for s in t.PARAM_TABLE} - frozen
    assert all(not torch.equal(states[0][k], states[-1][k]) for k in learning)


def test_the_tighter_budget_drives():
    h = tiny(iterations=100, max_wallclock_seconds=10.0)
    assert t.hyper_at(h, 10, 5000.0).progress == 0.5  # time is shorter
    assert t.hyper_at(h, 80, 5000.0).progress == 0.8  # iterations are
    assert t.hyper_at(h, 0, 99_000.0) == t.hyper_at(h, 100, 0.0)  # both end at 1
    unlimited = tiny(iterations=100, max_wallclock_seconds=0.0)
    assert t.hyper_at(unlimited, 10, 1e9).progress == 0.1


# ---------------------------------------------------------------- the average


def averaged(steps, frac):
    """The average at the end of a run whose weights follow one trajectory of progress."""
    h = tiny(num_layers=1, xsa_last_n=1, ve_last_n=1, ema_frac=frac)
    model = t.GPT(h)
    start = parameters(model)
    ema = t.Ema(model, h)
    for i in range(1, steps + 1):
        x = i / steps
        with torch.no_grad():
            for k, p in model.named_parameters():
                p.copy_(start[k] + 1 + x + math.sin(3 * x))
        ema.update(x)
    return ema.average[0] - start["mlp_up_bank"]


@pytest.mark.parametrize("frac", [0.05, 0.3])
def test_the_horizon_is_a_share_of_the_run(frac):
    """100 and 1000 steps agree to the step length; the limit is the integral of exp(-age / frac)."""
    short, long = (averaged(n, frac).mean().item() for n in (100, 1000))
    x = (np.arange(200_000) + 0.5) / 200_000
    weight = np.exp((x - 1) / frac) / frac / 200_000
    limit = (
        weight * (1 + x + np.sin(3 * x))
    ).sum()  # the start's share decays with weight exp(-1 / frac) of 0
    assert long == pytest.approx(limit, abs=0.005) and short == pytest.approx(limit, abs=0.05)
    assert abs(averaged(100, 2 * frac).mean().item() - short) > 0.01  # another horizon is another average


def test_average_and_reset():
    h = tiny()
    model = noisy_model(h)
    ema = t.Ema(model, h)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    live = parameters(model)
    ema.update(0.5)
    assert all(p is q.data or torch.equal(p, q) for p, q in zip(ema.params, model.parameters()))
    assert not any(torch.equal(x, p) for x, p in zip(ema.average, live.values()))
    ema.reset()
    assert ema.progress == 0.0 and all(torch.equal(x, p) for x, p in zip(ema.average, live.values()))


def test_no_progress_no_change():
    model = noisy_model(tiny())
    ema = t.Ema(model, tiny())
    before = [x.clone() for x in ema.average]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, ema.average))
