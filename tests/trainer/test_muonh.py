"""All of MuonH, `preset=muonh`: norms that stay, gains, output scales from zero, a schedule of its own."""

import math

import pytest
import torch

import train_gpt as t
from tests.helpers import all_equal, random_tokens, tiny
from tests.rank_cases import group_of_one, run_ranks
from tests.trainer.schedule_cases import TOLERANCE, data_folder, env_machine, parameters
from tests.trainer.test_train import eval_again, score_by_hand
from tests.trainer.train_cases import finished_with, value

RECIPE = dict(preset="muonh")
HYPERBALL = dict(step_rule="hyperball", matrix_lr=0.02)
GAINS = ("attn_gain", "mlp_gain")


def trained(m, steps, change=lambda model: None, **knobs):
    """Train from the initial weights, changed by `change`. Returns the parameters before and after."""
    h = tiny(**knobs)
    model = t.GPT(h)
    change(model)
    before = parameters(model)
    optimizer = t.Optimizer(model, h, m)
    loader = t.TokenLoader(h, m)
    backward, _ = t.capture_pass(model.loss, optimizer)
    for step in range(steps):
        t.train_step(backward, optimizer, loader.next(), t.hyper_at(h, step, 0.0))
    return before, parameters(model)


# ---------------------------------------------------------------- what it trains


def test_every_matrix_keeps_its_norm_and_turns():
    with group_of_one() as m:
        before, after = trained(m, 12, data_path=data_folder(), **RECIPE)
    for spec in t.MATRICES:
        norms = [torch.linalg.matrix_norm(p[spec.name]) for p in (before, after)]
        assert norms[0].min() > 0.1
        torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)  # measured: 5.3e-7
        turned = torch.linalg.matrix_norm(after[spec.name] - before[spec.name]) / norms[0]
        assert turned.min() > 0.01, spec.name


def test_output_scales_start_at_zero_and_everything_moves():
    """At first nothing but the embedding reaches the output."""
    h = tiny(**RECIPE)
    model = t.GPT(h)
    tokens = random_tokens(h, (2, 16))
    # Measured: 3.8e-6.
    torch.testing.assert_close(model.trunk(tokens), t.rms_norm(model.embed(tokens)), atol=1e-5, rtol=0)
    with group_of_one() as m:
        before, after = trained(m, 4, data_path=data_folder(), **RECIPE)
    assert all(before[name].abs().max() == 0 for name in ("attn_scale", "mlp_scale"))
    assert not [name for name, p in after.items() if torch.equal(p, before[name])]


@pytest.mark.parametrize("start,moves", [(0.0, False), (1.0, True)])
def test_a_gain_of_zero_before_the_squared_activation_never_moves(start, moves):
    """What it scales is squared: at zero it has no gradient. A gain of the attention has one."""

    def set_gains(model):
        for name in GAINS:
            getattr(model, name).data.fill_(start)

    with group_of_one() as m:
        _, after = trained(m, 6, set_gains, data_path=data_folder(), **RECIPE)
    assert bool((after["mlp_gain"] != start).any()) == moves
    assert (after["attn_gain"] != start).any()


KNOBS = [
    dict(matrix_warmdown_frac=1.0),
    dict(matrix_warmup_frac=0.5),
    dict(norm_gains=1),
    dict(out_scale_init=0.0),
    dict(out_scale_init=0.5),
]


@pytest.mark.parametrize("knob", KNOBS, ids=str)
def test_each_part_changes_what_is_trained(knob):
    base = HYPERBALL | dict(data_path=data_folder())
    with group_of_one() as m:
        start, default = trained(m, 6, **base)
        same_start, other = trained(m, 6, **base, **knob)
    assert torch.equal(start["qo_bank"], same_start["qo_bank"])
    assert (default["qo_bank"] - other["qo_bank"]).norm() > 1e-3 * default["qo_bank"].norm()


def test_gains_have_a_rate_of_their_own():
    ends = []
    with group_of_one() as m:
        for rate in (0.0, 0.001, 0.1):
            knobs = HYPERBALL | dict(norm_gains=1, norm_gain_lr=rate, scalar_wd=0.0)
            ends.append(trained(m, 6, data_path=data_folder(), **knobs)[1])
    frozen, slow, fast = ([(end[name] - 1).abs().max().item() for name in GAINS] for end in ends)
    assert frozen == [0.0, 0.0]
    assert all(0 < a <= 0.007 and b > 10 * a for a, b in zip(slow, fast))  # measured: 0.0057


def recipe_rank(rank, folder):
    """Train the recipe on this rank and return its parameters."""
    m = env_machine(tiny())
    return trained(m, 6, data_path=folder, **RECIPE)[1]


def test_two_ranks_train_the_weights_of_one():
    with group_of_one() as m:
        before, alone = trained(m, 6, data_path=data_folder(), **RECIPE)
    first, second = run_ranks(recipe_rank, 2, data_folder())
    assert all_equal(first.values(), second.values())
    for name, expected in alone.items():
        moved = (expected - before[name]).norm()
        error = (first[name] - expected).norm()
        assert error <= TOLERANCE * expected.norm() and moved > 100 * error, name


# ---------------------------------------------------------------- the preset and its dial


@pytest.mark.parametrize("depth", [2, 12, 24])
def test_the_rate_falls_with_depth(depth):
    h = t.load_config(["preset=muonh", f"depth={depth}"], {})
    batch = math.sqrt(h.train_batch_tokens / 2**19)
    assert h.matrix_lr == pytest.approx(0.02 * 12 / depth * batch)
    assert h.norm_gain_lr == pytest.approx(t.Config.norm_gain_lr * batch)
    assert (h.norm_gains, h.out_scale_init, h.num_layers) == (True, 0.0, depth)

    half = t.load_config(["preset=muonh", f"depth={depth}", "depth_lr_power=0.5"], {})
    assert half.matrix_lr == pytest.approx(0.02 * math.sqrt(12 / depth) * batch)
    flat = t.load_config(["preset=muonh", f"depth={depth}", "depth_lr_power=0"], {})
    assert flat.matrix_lr == pytest.approx(0.02 * batch)


def test_without_the_dial_the_presets_rate_counts():
    h = t.load_config(["preset=muonh"], {})
    assert (h.matrix_lr, h.num_layers, h.model_dim) == (0.02, 11, 512)
    assert {h.muon_wd, h.embed_wd, h.scalar_wd} == {0.0}
    middle = t.hyper_at(h, h.iterations // 2, 0.0)
    assert (middle.matrix_lr_mul, middle.adam_lr_mul) == (pytest.approx(0.5), 1.0)  # measured: 0


def test_gains_are_counted():
    """Two vectors of the width a layer; they are in no product."""
    plain = t.parameter_table(tiny())
    gained = t.parameter_table(tiny(norm_gains=1))
    assert {name: gained[name].shape for name in gained.keys() - plain.keys()} == dict.fromkeys(
        GAINS, (4, 32)
    )
    assert t.scaling_params(tiny(norm_gains=1)) == t.scaling_params(tiny())
    assert t.flops_per_token(tiny(norm_gains=1)) == t.flops_per_token(tiny())


# ---------------------------------------------------------------- whole runs


def test_the_artifact_of_a_run_scores_what_its_log_says(tmp_path):
    """Compare with a model that is loaded from the file: gains come back as float16, and they matter."""
    run = finished_with(**RECIPE, iterations=24, gptq_batches=1)
    assert float(run.final["val_loss"]) < float(value(run, r"unigram val_loss:([\d.]+)")) - 0.5
    header, _ = t.open_artifact(run.blob)
    tensors = t.unpack_artifact(run.blob)
    assert header["config"]["norm_gains"] is True
    for name in GAINS:
        assert (tensors[name] - 1).abs().max() > 0.01
        assert torch.equal(tensors[name], tensors[name].half().float())

    loss, _ = score_by_hand(run.blob, 32)
    # Measured: 4.7e-9.
    assert float(value(run, r"final_int6_roundtrip_exact val_loss:([\d.]+)")) == pytest.approx(loss, abs=5e-8)

    model = t.GPT(t.make_config({"eval_batch_tokens": 512}, header["config"]))
    tokens = random_tokens(model.h, (4, 33))
    losses = []
    for gains in (tensors, {name: torch.ones_like(tensors[name]) for name in GAINS}):
        model.load_state_dict(tensors | gains)
        losses.append(model.loss(tokens[:, :-1], tokens[:, 1:]).item())
    assert abs(losses[0] - losses[1]) > 1e-3

    line = eval_again(run, tmp_path, "again", "preset=muonh", "eval_batch_tokens=512")
    assert f"val_loss:{run.final['val_loss']} val_bpb:{run.final['val_bpb']} " in line
