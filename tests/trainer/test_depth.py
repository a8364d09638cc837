"""One dial for depth: the rules against hand counts, and every depth as a model and an optimizer."""

import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as t
from tests.helpers import (
    OTHER_PARTS,
    as_arguments,
    english_args,
    english_dataset,
    machine,
    stop_one_line,
    tiny,
)
from tests.trainer.train_cases import read_run

DEPTHS = [*t.DEPTHS]


def config(**knobs):
    return t.load_config(as_arguments(knobs), {})


def size(depth, vocabulary):
    """Return the weights in products of a plain model: Q, K, V, O, an MLP of 4 x the width, the output."""
    width = math.ceil(64 * depth / 128) * 128
    return 12 * depth * width**2 + vocabulary * width


# ---------------------------------------------------------------- the rules


def test_depth_12_has_nanochats_shape_and_the_presets_rates():
    h = config(preset="h100x1", depth=12)
    assert (h.num_layers, h.model_dim, h.num_heads, h.num_kv_heads, h.head_dim) == (12, 768, 6, 6, 128)
    assert h.mlp_dim == 3072
    assert h.attn_windows == "512 512 512 0 512 512 512 0 512 512 512 0"
    assert (h.train_batch_tokens, h.micro_batch_tokens, h.tokens_per_param) == (524_288, 131_072, 12)
    assert h.iterations == 12 * (12 * 12 * 768**2 + 8192 * 768) // 524_288 == 2088
    assert (h.max_wallclock_seconds, h.eval_stride, h.codec, h.size_cap) == (0, 2048, "xz", t.NO_CAP)
    preset = config(preset="h100x1")
    for rate, decay in t.DECAYS.items():
        assert getattr(h, rate) == pytest.approx(getattr(preset, rate))
        assert getattr(h, decay) == pytest.approx(getattr(preset, decay))
    assert (h.vocab_size, h.step_rule, h.equalize_rows) == (8192, "muon", True)  # the preset's stack


def test_depth_26_by_hand():
    h = config(preset="h100x1", depth=26)
    ratio = size(26, 8192) / size(12, 8192)
    assert ratio == pytest.approx(9.6193, abs=1e-4)  # measured: 4.7e-5
    # Nearer to 2^20 than to 2^21; measured: 8.7e-5.
    assert 2**19 * ratio**0.383 == pytest.approx(1_247_600, rel=1e-3)
    assert (h.model_dim, h.num_heads, h.train_batch_tokens) == (1664, 13, 2**20)
    assert h.iterations == 12 * size(26, 8192) // 2**20 == 10_042
    assert h.matrix_lr == pytest.approx(0.02 * 2**0.5)
    assert h.scalar_lr == pytest.approx(0.02 * 2**0.5)
    assert h.embed_lr == pytest.approx(0.03 * 2**0.5 * (768 / 1664) ** 0.5)
    assert h.muon_wd == pytest.approx(0.085 * 2**0.5 / ratio)
    assert h.scalar_wd == pytest.approx(0.02 * 2**0.5 / ratio)


@pytest.mark.parametrize("power", [0, 0.5])
@pytest.mark.parametrize("depth", DEPTHS)
def test_decay_takes_the_same_share_of_every_run(depth, power):
    """What the decay alone leaves of a weight, (1 - rate * decay)^steps, is the same at every depth."""
    h = config(preset="h100x1", depth=depth, depth_lr_power=power)
    tuned = config(preset="h100x1", depth=12)
    decayed = h.matrix_lr * h.muon_wd * h.iterations
    # Measured: 4.4e-4.
    assert decayed == pytest.approx(tuned.matrix_lr * tuned.muon_wd * tuned.iterations, rel=0.01)


@pytest.mark.parametrize("depth,windows", [(2, "512 0"), (3, "512 512 0"), (5, "512 512 512 0 0")])
def test_the_last_layer_sees_every_token(depth, windows):
    assert config(depth=depth).attn_windows == windows
    assert config(depth=depth, preset="cpu").attn_windows == windows.replace("512", "128")


def test_the_last_layers_of_a_kind_keep_their_share():
    """11 of 11 layers of sp8192 are exclusive, 4 of 11 of record_sp1024, of which 2 have value embeddings."""
    assert [config(preset="sp8192", depth=depth).xsa_last_n for depth in (2, 12, 26)] == [2, 12, 26]
    small = [config(preset="record_sp1024", depth=depth) for depth in (2, 11, 22)]
    assert [h.xsa_last_n for h in small] == [1, 4, 8]
    assert [h.ve_last_n for h in small] == [1, 2, 4]
    assert not config(preset="sp8192", depth=12).has_loop


def test_given_knobs_win_and_the_others_follow_them():
    given = dict(matrix_lr=0.3, muon_wd=0.5, num_kv_heads=2, mlp_mult=3.0, iterations=7, size_cap=16_000_000)
    h = config(depth=16, max_wallclock_seconds=60, **given)
    assert {key: getattr(h, key) for key in given} == given
    assert h.max_wallclock_seconds == 60
    plain = config(depth=16)
    assert t.scaling_params(h) < t.scaling_params(plain) and h.model_dim == plain.model_dim

    quarter = config(depth=12, train_batch_tokens=2**17)
    assert quarter.embed_lr == pytest.approx(config(depth=12).embed_lr / 2)
    assert quarter.muon_wd == pytest.approx(config(depth=12).muon_wd / 2)
    assert quarter.iterations == pytest.approx(4 * config(depth=12).iterations, abs=4)  # measured: 0
    assert t.load_config(["depth=12"], {"MATRIX_LR": "0.7"}).matrix_lr == 0.7


def test_a_race_stays_a_race():
    h = config(preset="gpt2_124m", depth=12)
    assert (h.target_loss, h.size_cap, h.max_wallclock_seconds) == (3.28, 0, 0)


def test_tokens_per_param_alone_sets_only_the_length():
    preset = config(preset="h100x1")
    h = config(preset="h100x1", tokens_per_param=2.5)
    assert h.iterations == int(2.5 * t.scaling_params(preset)) // 131_072
    changed = {key for key, value in vars(h).items() if value != getattr(preset, key)}
    assert changed == {"iterations", "max_wallclock_seconds", "tokens_per_param"}
    assert config(tokens_per_param=2.5, max_wallclock_seconds=9).max_wallclock_seconds == 9
    assert config(tokens_per_param=1e-9).iterations == 1
    twice = 2 * config(depth=4).iterations
    assert config(depth=4, tokens_per_param=24).iterations == pytest.approx(twice, abs=1)  # measured: 0


def test_without_dials_a_preset_stays_as_it_is():
    assert config(preset="h100x1", depth=0, tokens_per_param=0) == config(preset="h100x1")


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["depth=1"], "depth: 1 must be 0 or from 2 to 26"),
        (["depth=27"], "depth: 27 must be 0 or from 2 to 26"),
        ([f"depth={2**53 - 1}"], "depth: 9007199254740991 must be"),
        (["depth=-12"], "depth: -12 must be at least 0"),
        (["tokens_per_param=-1"], "tokens_per_param: -1"),
        (["tokens_per_param=1e7"], "tokens_per_param: 1e+07 must be at most 1e6"),
        (["depth=12", "num_layers=11"], "depth=12 and num_layers=11 differ; leave one out"),
        (["depth=12", "preset=warp"], "preset: 'warp'"),
        (["depth=12", "train_batch_tokens=0"], "train_batch_tokens: 0 must be at least 1"),
        (
            ["tokens_per_param=1", "start_batch_tokens=98304"],
            "tokens_per_param=1 needs start_batch_tokens=0, not 98304",
        ),
    ],
)
def test_a_dial_that_cannot_be_is_one_line(arguments, words, capsys):
    assert words in stop_one_line(["config", *arguments], capsys)


def test_eval_refuses_depth(capsys):
    """The artifact fixes the model."""
    assert "depth=12: the artifact fixes this knob" in stop_one_line(["eval", "x.xz", "depth=12"], capsys)


def test_config_prints_what_follows(capsys):
    assert t.main(["config", "preset=h100x1", "depth=12"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model_dim: 768" in lines and "iterations: 2088" in lines
    assert lines[-1] == (
        "# 91,226,112 of 91,273,032 parameters in products, 1,094,713,344 tokens, 646,447,104 FLOPs each, "
        "7.08e+17 in all; 1.83 GB to train, activations aside"
    )


# ---------------------------------------------------------------- FLOPs


def test_flops_by_hand():
    """4 layers of 32 with 2 heads of keys, an MLP of 64, 96 tokens, a bigram and a value projection."""
    matrices = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 2 * 32 * 64)
    weights = matrices + 96 * 32 + 32 * 8 + 16 * 8
    assert t.scaling_params(tiny()) == weights
    assert t.flops_per_token(tiny()) == 6 * weights + 12 * 32 * 4 * 16
    windows = tiny(attn_windows="4 4 0 64")  # 64 are more than the 16 of a sequence
    assert t.flops_per_token(windows) == 6 * weights + 12 * 32 * (4 + 4 + 16 + 16)

    loop = tiny(loop_layers="1 2", loop_times=2, attn_windows="4 8 16 16")
    assert t.scaling_params(loop) == weights
    assert t.flops_per_token(loop, loops=False) == 6 * weights + 12 * 32 * (4 + 8 + 16 + 16)
    visited = weights + matrices  # 4 further visits to 4 layers
    assert t.flops_per_token(loop) == 6 * visited + 12 * 32 * (4 + 3 * 8 + 3 * 16 + 16)


@pytest.fixture
def on_meta(monkeypatch):
    """Let models be made of shapes alone."""
    monkeypatch.setattr(t, "init_tensor", lambda shape, init, generator: torch.empty(shape, device="meta"))


@pytest.mark.parametrize(
    "knobs",
    [
        dict(preset="record"),
        dict(preset="h100x1"),
        dict(preset="record_sp1024"),
        OTHER_PARTS | dict(attn_gate_dims=0),  # its products are too small to count
    ],
    ids=lambda knobs: knobs.get("preset", "other parts"),
)
def test_flops_are_those_that_pytorch_counts(on_meta, knobs):
    h = config(**knobs | dict(depth=4, attn_windows="", train_seq_len=256))
    model = t.GPT(h)
    tokens = torch.zeros(2, 256, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens, tokens).backward()
    assert counter.get_total_flops() == tokens.numel() * t.flops_per_token(h)


# ---------------------------------------------------------------- every depth


@pytest.mark.parametrize("preset", t.PRESETS)
def test_every_depth_of_every_preset_is_a_valid_run(preset):
    for depth in DEPTHS:
        h = config(preset=preset, depth=depth)
        for world in (1, 2, 4, 8):
            t.cut_batch(h, world)
        assert h.model_dim <= 3136  # what the fp8 step of a normalized input holds
        assert h.iterations * h.train_batch_tokens <= 12 * t.scaling_params(h)
        assert (h.iterations + 1) * h.train_batch_tokens > 12 * t.scaling_params(h)


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_depth_as_shapes(on_meta, depth):
    """The model's parameters, and the banks, gradients and moments that the first of 8 ranks holds."""
    h = config(preset="h100x1", depth=depth)
    model = t.GPT(h)
    params = sum(p.numel() for p in model.parameters())
    assert t.scaling_params(h) == size(depth, 8192)
    assert params - size(depth, 8192) < 0.003 * params  # scales and gates; measured: 0.001

    own = machine(world=8)
    optimizer = t.Optimizer(model, h, t.replace(own, device=torch.device("meta")))
    layers = 12 * depth * h.model_dim**2
    for name, bank in optimizer.bank.items():
        rows = sum(len(getattr(model, s.name)) for s in t.MATRICES if s.buffer == name)
        assert bank.shape[1] == math.ceil(rows / 8)
        for matrices in optimizer.owned[name]:
            scalars = t.StepScalars(*[0.1] * len(t.StepScalars._fields))
            t.matrix_update(matrices, 0.1, scalars, h)

    tensors = [*optimizer.state(), *optimizer.bank_grad.values(), optimizer.flat_grad]
    held = sum(tensor.numel() * 4 for tensor in tensors)
    padded = sum(bank.numel() for bank in optimizer.bank.values()) - layers
    small = params - layers
    # Weights and gradients whole, an eighth of the momentum, both moments of what AdamW updates.
    expected = 4 * (2 * (layers + padded) + (layers + padded) / 8 + 4 * small)
    assert held == pytest.approx(expected, rel=1e-3)  # measured: 4.2e-5
    assert held <= t.TRAINING_BYTES * (params + padded)


@pytest.mark.parametrize("depth", [2, 7, 12])
def test_a_pass_of_a_depth_as_shapes(on_meta, depth):
    h = config(preset="record", depth=depth)
    tokens = torch.zeros(1, h.train_seq_len, dtype=torch.long, device="meta")
    model = t.GPT(h)
    assert [spec.window for spec in model.layers][-1] == 0
    model.loss(tokens, tokens).backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


# ---------------------------------------------------------------- a run


def test_depth_2_trains_on_a_cpu(tmp_path):
    """The English vocabulary of 320 and short sequences; only the batch is given, to be small."""
    data = english_dataset()
    knobs = dict(
        preset="cpu",
        depth=2,
        data_path=data.path,
        vocab_size=data.vocab_size,
        run_id="run",
        out_dir=tmp_path,
        train_seq_len=32,
        eval_seq_len=32,
        eval_batch_tokens=512,
        train_batch_tokens=512,
        micro_batch_tokens=256,
        tokens_per_param=0.03,
        gptq_batches=1,
        val_loss_every=0,
        train_log_every=1,
    )
    h = config(**knobs)
    assert h.iterations == int(0.03 * t.scaling_params(h)) // 512 == 26
    run = read_run(tmp_path, t.main(as_arguments(knobs)))
    assert run.status == 0
    losses = [float(loss) for loss in re.findall(r"^step:\d+/26 train_loss:([\d.]+)", run.log, re.M)]
    assert losses[-1] < losses[0] - 1
    assert run.lines[-1].startswith("final_score metric:int6_lzma_chunked ")
    assert t.open_artifact(run.blob)[0]["config"]["model_dim"] == 128

    again = dict(data_path=data.path, out_dir=tmp_path, run_id="again", preset="cpu", eval_batch_tokens=512)
    env = english_args()  # the rank's environment plays no part
    assert env and t.main(["eval", str(tmp_path / "run.int6.xz"), *as_arguments(again)]) == 0
