"""GPTQ: codes by the inputs of a matrix, what training text says of those, and the clock that holds time for it."""

import dataclasses
import os
import re
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import train_gpt as t
from helpers import english_args, group_of_one, noisy_model, random_tokens, run_ranks, tiny

LIMIT = t.CODE_LIMIT["int6"]
BANKS = {s.name for s in t.MATRICES}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for f in dataclasses.fields(t.Config):
        monkeypatch.delenv(f.name.upper(), raising=False)


def problem(matrices=2, rows=5, columns=12, seed=0, scale=0.1):
    """Weights, steps and the gram of inputs that go together, float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    inputs = draw(matrices, 200, columns) @ draw(matrices, columns, columns)
    return draw(matrices, rows, columns), torch.full((matrices, rows, 1), scale).double(), inputs.mT @ inputs


def damped(gram):
    return (
        gram
        + 0.01 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * torch.eye(gram.size(-1)).double()
    )


def nearest(W, scale, limit=LIMIT):
    return (W / scale).round().clamp(-limit, limit)


def lost(W, codes, scale, gram):
    """The squared change of W x, summed over the inputs."""
    error = codes * scale - W
    return float((error @ gram * error).sum())


# ---------------------------------------------------------------- the codes


@pytest.mark.parametrize("scale", [0.1, 0.5, 0.02], ids=str)  # 0.02: many are clamped
def test_codes_by_their_definition(scale):
    """Column by column: what is not yet rounded stands where it makes up best for what is."""
    W, steps, gram = problem(scale=scale)
    codes = t.gptq(W, steps, gram, LIMIT)
    for w, s, H, got in zip(W.numpy(), steps.numpy(), damped(gram).numpy(), codes.numpy()):
        for row, step, found in zip(w, s[:, 0], got):
            done = np.zeros(0)
            for j in range(len(row)):
                best = row[j:] - np.linalg.solve(H[j:, j:], H[j:, :j] @ (done - row[:j])) if j else row
                done = np.append(done, step * np.clip(np.round(best[0] / step), -LIMIT, LIMIT))
            assert np.allclose(done, found * step, atol=1e-9)


def test_the_outputs_change_less():
    W, steps, gram = problem(rows=40, columns=48, scale=0.4)
    codes = t.gptq(W, steps, gram, LIMIT)
    assert lost(W, codes, steps, gram) < 0.5 * lost(W, nearest(W, steps), steps, gram)
    assert codes.abs().max() <= LIMIT and torch.equal(codes, codes.round())


def test_codes_stay_in_their_range():
    W, steps, gram = problem(scale=0.01)
    assert float(t.gptq(W, steps, gram, LIMIT).abs().max()) == LIMIT


@pytest.mark.parametrize(
    "gram", [torch.eye(12).double() * 3, torch.zeros(12, 12).double()], ids=["apart", "no input"]
)
def test_inputs_that_say_nothing_leave_the_nearest(gram):
    W, steps, _ = problem()
    assert torch.equal(t.gptq(W, steps, gram.expand(2, 12, 12), LIMIT), nearest(W, steps))


def test_weights_and_gram_are_left_alone():
    W, steps, gram = problem()
    kept = W.clone(), gram.clone()
    t.gptq(W, steps, gram, LIMIT)
    assert torch.equal(W, kept[0]) and torch.equal(gram, kept[1])


def test_quantize_takes_the_scales_of_the_clip_search():
    W, _, gram = (x.float() for x in problem(rows=8, columns=12))
    plain, by_gram = t.quantize(W, "int6", 0.3), t.quantize(W, "int6", 0.3, gram)
    assert torch.equal(plain[1], by_gram[1]) and by_gram[0].dtype == torch.int8
    assert torch.equal(by_gram[0], t.gptq(W, plain[1].float(), gram, LIMIT).to(torch.int8))
    assert not torch.equal(plain[0], by_gram[0])


def test_only_matrices_with_a_gram_change_in_an_artifact():
    h = tiny(int6_step=0.3)
    tensors = {k: p.detach() for k, p in noisy_model(h).named_parameters()}
    x = torch.randn(50, h.model_dim, generator=torch.Generator().manual_seed(1))
    gram = (x.T @ x + 20).expand(len(tensors["qo_bank"]), -1, -1)
    plain, changed = (
        t.unpack_artifact(t.compress(t.raw_artifact(tensors, h, g))) for g in ({}, {"qo_bank": gram})
    )
    assert {k for k in plain if not torch.equal(plain[k], changed[k])} == {"qo_bank"}
    assert t.pack_artifact(tensors, h) == t.compress(t.raw_artifact(tensors, h))


def test_fitting_uses_the_grams():
    h = tiny(model_dim=64, mlp_mult=8.0)
    tensors = {k: p.detach() for k, p in noisy_model(h, scale=0.2).named_parameters()}
    x = torch.randn(99, 64, generator=torch.Generator().manual_seed(1))
    grams = {"qo_bank": (x.T @ x + 20).expand(len(tensors["qo_bank"]), -1, -1)}
    for room in (10**9, int(0.8 * len(t.pack_artifact(tensors, h)))):
        blob, step = t.fit_artifact(tensors, h, room, lambda phase, fn, *args: fn(*args), grams)
        assert blob == t.compress(t.raw_artifact(tensors, dataclasses.replace(h, int6_step=step), grams))
        assert blob != t.pack_artifact(tensors, dataclasses.replace(h, int6_step=step)) and len(blob) <= room


# ---------------------------------------------------------------- what text says of inputs


class Seen(TorchFunctionMode):
    """The inputs of every F.linear, in order."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            self.inputs.append(args[0].detach().flatten(0, -2).double())
        return function(*args, **(kwargs or {}))


class Batches:
    """A loader of known batches."""

    def __init__(self, *batches):
        self.batches = list(batches)

    def next(self):
        return self.batches.pop(0)


def a_run(h, m, model):
    return t.Run(h, m, None, None, model, model.loss, model.nats, {}, {})


def test_grams_are_of_the_inputs_of_every_matrix():
    h = tiny(gptq_batches=2, attn_windows="4 0")
    rows = [random_tokens(h, (3, 17), seed=i) for i in range(3)]
    with group_of_one() as m:
        model = noisy_model(h)
        grams = t.calibrate(a_run(h, m, model), Batches(rows[:2], rows[2:]))
    assert set(grams) == BANKS and model.ops == t.Ops()
    expected = {name: torch.zeros_like(gram).double() for name, gram in grams.items()}
    L = h.num_layers
    for x in rows:
        with Seen() as seen, torch.no_grad():
            model.trunk(x[:, :-1])
        for i in range(L):  # two products of the embeddings come first
            qkv, o, up, down = (x.T @ x for x in seen.inputs[2 + 4 * i : 6 + 4 * i])
            for name, at, gram in (
                ("qo_bank", i, qkv),
                ("qo_bank", L + i, o),
                ("kv_bank", i, qkv),
                ("kv_bank", L + i, qkv),
                ("mlp_up_bank", i, up),
                ("mlp_down_bank", i, down),
            ):
                expected[name][at] += gram
    for name, gram in grams.items():
        assert gram.shape == (len(dict(model.named_parameters())[name]), *2 * gram.shape[-1:])
        assert gram.shape[-1] == dict(model.named_parameters())[name].shape[-1]
        assert torch.allclose(gram.double(), expected[name], rtol=1e-4, atol=1e-4), name


def grams_of_ranks(rank):
    h = tiny(gptq_batches=2)
    m = t.init_machine(h, os.environ)
    rows = random_tokens(h, (8, 17), seed=5)
    mine = rows[m.rank :: m.world_size].split(2)
    half = len(mine) // 2
    return t.calibrate(a_run(h, m, noisy_model(h)), Batches(mine[:half], mine[half:]))


def test_ranks_put_their_inputs_together():
    one, two = run_ranks(grams_of_ranks, 1), run_ranks(grams_of_ranks, 2)
    for name in BANKS:
        assert torch.equal(two[0][name], two[1][name])
        assert torch.allclose(one[0][name], two[0][name], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- a whole run


def trained(tmp_path, **knobs):
    """The log of a run of train with these knobs, and its artifact."""
    argv = english_args(**(dict(iterations=6, out_dir=tmp_path, int6_step=0.3) | knobs))
    assert t.main(["train", *argv]) == 0
    return (tmp_path / "run.txt").read_text(encoding="utf-8").rsplit("=" * 100, 1)[1], (
        tmp_path / "run.int6.xz"
    ).read_bytes()


def phase(log, name):
    return int(re.search(rf"^phase_times .*\b{name}:(\d+)ms", log, re.M)[1])


def test_the_switch_changes_the_artifact_and_nothing_of_training(tmp_path):
    runs = {n: trained(tmp_path / str(n), gptq_batches=n) for n in (0, 1, 3)}
    live = {re.search(r"^final_live (val_loss:\S+)", log, re.M)[1] for log, _ in runs.values()}
    averaged = {re.search(r"^final_ema (val_loss:\S+)", log, re.M)[1] for log, _ in runs.values()}
    assert len(live) == len(averaged) == 1
    tensors = {n: t.unpack_artifact(blob) for n, (_, blob) in runs.items()}
    for a, b in ((0, 1), (1, 3)):
        assert {k for k in tensors[a] if not torch.equal(tensors[a][k], tensors[b][k])} <= BANKS
        assert any(not torch.equal(tensors[a][k], tensors[b][k]) for k in BANKS)
    assert phase(runs[0][0], "calibrate") == 0 < phase(runs[3][0], "calibrate")


def test_the_text_is_what_training_would_read_next(tmp_path, monkeypatch):
    asked = []
    plain = t.TokenLoader.next
    monkeypatch.setattr(t.TokenLoader, "next", lambda self: (asked.append(self.index), plain(self))[1])
    trained(tmp_path, gptq_batches=2, warmup_steps=1)
    assert asked == [
        0,
        1,
        2,
        3,
        4,
        *range(6),
        6,
        7,
    ]  # warm-up's step and two rehearsals; training; calibration


def test_the_clock_holds_time_for_it(tmp_path, monkeypatch):
    plain, limit, takes = t.calibrate, 2.0, 0.4

    def slow(run, loader):
        time.sleep(takes)
        return plain(run, loader)

    monkeypatch.setattr(t, "calibrate", slow)
    log, _ = trained(tmp_path, iterations=100_000, max_wallclock_seconds=limit, train_log_every=1000)
    train, calibrate = phase(log, "train"), phase(log, "calibrate")
    assert calibrate >= 1000 * takes and 1000 * (limit - 2 * takes) < train
    assert train + calibrate <= 1000 * limit
    assert re.search(r"^stopping_early: wallclock_cap", log, re.M)


def test_rates_reach_their_end_before_it(tmp_path, monkeypatch):
    """The time that is held back is no part of the schedule: the last step has next to no rate."""
    plain, seen, hyper_at = t.calibrate, [], t.hyper_at

    def slow(run, loader):
        time.sleep(0.5)
        return plain(run, loader)

    monkeypatch.setattr(t, "calibrate", slow)
    monkeypatch.setattr(
        t, "hyper_at", lambda *args: (seen.append(hyper_at(*args).progress), hyper_at(*args))[1]
    )
    trained(tmp_path, iterations=100_000, max_wallclock_seconds=2.0, train_log_every=1000)
    assert seen[-1] > 0.9  # of the whole two seconds it is 0.62
