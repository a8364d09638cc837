"""GPTQ: codes by the inputs of a matrix, calibration on training text, and its time on the clock."""

import dataclasses
import gc
import os
import re
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import train_gpt as t
from tests.helpers import english_args, gaussian, noisy_model, random_tokens, tiny
from tests.rank_cases import group_of_one, run_ranks

LIMIT = t.ENCODINGS["int6"].limit
BANKS = {spec.name for spec in t.MATRICES}


pytestmark = pytest.mark.usefixtures("clean_environment")


class Problem(NamedTuple):
    """Weights, the steps of their rows and the gram of the inputs."""

    W: torch.Tensor  # (b, M, N)
    steps: torch.Tensor  # (b, M, 1)
    gram: torch.Tensor  # (b, N, N)


def problem(matrices=2, rows=5, columns=12, scale=0.1):
    """Return a random Problem in float64, with correlated inputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = draw(matrices, 200, columns) @ draw(matrices, columns, columns)
    W = draw(matrices, rows, columns)
    return Problem(W, torch.full((matrices, rows, 1), scale).double(), inputs.mT @ inputs)


def damped(gram):
    """Add 1 % of the mean diagonal to the diagonal of each gram."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return gram + 0.01 * mean * torch.eye(gram.size(-1)).double()


def nearest(W, steps):
    """Return the nearest codes."""
    return (W / steps).round().clamp(-LIMIT, LIMIT)


def output_error(W, codes, steps, gram):
    """Return the squared change of W x, summed over the inputs x."""
    error = codes * steps - W
    return float((error @ gram * error).sum())


def input_gram(rows, columns):
    """Return the gram of random, correlated inputs, (N, N) float32."""
    x = gaussian(rows, columns, seed=1)
    return x.T @ x + 20


def parameters_of(model):
    """Return the parameters of a model by name, without gradients."""
    return {name: p.detach() for name, p in model.named_parameters()}


# ---------------------------------------------------------------- the codes


@pytest.mark.parametrize("scale", [0.1, 0.5, 0.02], ids=str)  # 0.02: many codes are clamped
def test_codes_by_their_definition(scale):
    """Round column by column, with the columns not yet rounded where they make up best for the others."""
    W, steps, gram = problem(scale=scale)
    codes = t.gptq(W, steps, t.inverse_factor(gram), LIMIT)
    for w, matrix_steps, H, found in zip(W.numpy(), steps.numpy(), damped(gram).numpy(), codes.numpy()):
        for row, (step,), row_codes in zip(w, matrix_steps, found):
            rounded = np.zeros(0)
            for j in range(len(row)):
                best = row[j:]
                if j > 0:
                    best = best - np.linalg.solve(H[j:, j:], H[j:, :j] @ (rounded - row[:j]))
                code = np.clip(np.round(best[0] / step), -LIMIT, LIMIT)
                rounded = np.append(rounded, step * code)
            assert np.allclose(rounded, row_codes * step, rtol=0, atol=1e-9)  # measured: 0


def test_the_outputs_change_less():
    W, steps, gram = problem(rows=40, columns=48, scale=0.4)
    codes = t.gptq(W, steps, t.inverse_factor(gram), LIMIT)
    # Measured: 0.46.
    assert output_error(W, codes, steps, gram) < 0.5 * output_error(W, nearest(W, steps), steps, gram)
    assert codes.abs().max() <= LIMIT and torch.equal(codes, codes.round())


def test_codes_stay_in_their_range():
    W, steps, gram = problem(scale=0.01)
    assert float(t.gptq(W, steps, t.inverse_factor(gram), LIMIT).abs().max()) == LIMIT


UNINFORMATIVE_GRAMS = {
    "uncorrelated": torch.eye(12).double() * 3,
    "no input": torch.zeros(12, 12).double(),
}


@pytest.mark.parametrize("gram", UNINFORMATIVE_GRAMS.values(), ids=UNINFORMATIVE_GRAMS.keys())
def test_uninformative_inputs_leave_the_nearest_codes(gram):
    W, steps, _ = problem()
    assert torch.equal(t.gptq(W, steps, t.inverse_factor(gram.expand(2, 12, 12)), LIMIT), nearest(W, steps))


def test_weights_and_gram_are_left_alone():
    W, steps, gram = problem()
    W_before = W.clone()
    gram_before = gram.clone()
    t.gptq(W, steps, t.inverse_factor(gram), LIMIT)
    assert torch.equal(W, W_before) and torch.equal(gram, gram_before)


def test_quantize_takes_the_scales_of_the_clip_search():
    W, _, gram = (tensor.float() for tensor in problem(rows=8, columns=12))
    plain_codes, plain_scales, _ = t.quantize(W, "int6", 0.3)
    codes, scales, _ = t.quantize(W, "int6", 0.3, t.column_guide(gram, False))
    assert torch.equal(plain_scales, scales) and codes.dtype == torch.int8
    assert torch.equal(codes, t.gptq(W, scales.float(), t.inverse_factor(gram), LIMIT).to(torch.int8))
    assert not torch.equal(plain_codes, codes)


def test_only_matrices_with_a_gram_change_in_an_artifact():
    h = tiny(int6_step=0.3)
    tensors = parameters_of(noisy_model(h))
    grams = {"qo_bank": input_gram(50, h.model_dim).expand(len(tensors["qo_bank"]), -1, -1)}

    plain = t.unpack_artifact(t.pack_artifact(tensors, h))
    changed = t.unpack_artifact(t.pack_artifact(tensors, h, t.Calibration(grams)))
    assert differing(plain, changed) == {"qo_bank"}
    assert t.pack_artifact(tensors, h) == t.pack_xz(t.raw_artifact(tensors, h))


def differing(one, other):
    """Return the names of the tensors that differ between two artifacts."""
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_fitting_uses_the_grams():
    h = tiny(model_dim=64, mlp_mult=8.0)
    tensors = parameters_of(noisy_model(h, scale=0.2))
    grams = {"qo_bank": input_gram(99, 64).expand(len(tensors["qo_bank"]), -1, -1)}

    def untimed(phase, fn, *args):
        return fn(*args)

    for room in (10**9, int(0.8 * len(t.pack_artifact(tensors, h)))):
        blob, step = t.fit_artifact(tensors, h, room, untimed, t.Calibration(grams))
        fitted = dataclasses.replace(h, int6_step=step)
        assert blob == t.pack_artifact(tensors, fitted, t.Calibration(grams))
        assert blob != t.pack_artifact(tensors, fitted) and len(blob) <= room


# ---------------------------------------------------------------- calibration


class LinearInputs(TorchFunctionMode):
    """A mode that keeps the inputs of every F.linear, in order, as (tokens, N) float64."""

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


def run_of(h, m, model):
    """Return a Run of a model, without data; its log writes nothing."""
    return t.Run(
        h=h,
        m=m,
        log=t.Log("", None),
        dataset=None,
        model=model,
        loss_fn=model.loss,
        plain_loss_fn=model.loss,
        nats_fn=model.nats,
        phases={},
        splits={},
    )


@pytest.mark.parametrize(
    "knobs,order",
    [
        ({}, [0, 1, 2, 3]),
        (dict(loop_layers="1 2", loop_times=2, bigram_vocab_size=0), [0, 1, 2, 1, 2, 1, 2, 3]),
        (dict(loop_layers="3", loop_times=1, ve_last_n=0), [0, 1, 2, 3, 3]),
        (dict(norm_gains=1), [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_grams_are_of_the_inputs_of_every_matrix(knobs, order):
    """Those of a layer that is visited several times sum over its visits; a gain scales them."""
    h = tiny(gptq_batches=2, attn_windows="4 0", **knobs)
    micro_batches = [random_tokens(h, (3, 17), seed=i) for i in range(3)]
    with group_of_one() as m:
        model = noisy_model(h)
        grams = t.calibrate(run_of(h, m, model), Batches(micro_batches[:2], micro_batches[2:])).grams
    assert set(grams) == BANKS and model.ops == t.Ops()

    expected = {name: torch.zeros_like(gram).double() for name, gram in grams.items()}
    L = h.num_layers
    for tokens in micro_batches:
        with LinearInputs() as seen, torch.no_grad():
            model.trunk(tokens[:, :-1])
        embeddings = (h.ve_last_n > 0) + (h.bigram_vocab_size > 0)  # products
        for visit, i in enumerate(order):
            first = embeddings + 4 * visit
            qkv, o, up, down = (x.T @ x for x in seen.inputs[first : first + 4])
            if h.norm_gains:
                qkv *= torch.outer(model.attn_gain[i], model.attn_gain[i]).detach()
                up *= torch.outer(model.mlp_gain[i], model.mlp_gain[i]).detach()
            expected["qo_bank"][i] += qkv
            expected["qo_bank"][L + i] += o
            expected["kv_bank"][i] += qkv
            expected["kv_bank"][L + i] += qkv
            expected["mlp_up_bank"][i] += up
            expected["mlp_down_bank"][i] += down

    parameters = dict(model.named_parameters())
    for name, gram in grams.items():
        assert gram.shape == (len(parameters[name]), *2 * gram.shape[-1:])
        assert gram.shape[-1] == parameters[name].shape[-1]
        # Measured: 6 % of that.
        assert torch.allclose(gram.double(), expected[name], rtol=1e-4, atol=1e-4), name


def test_inputs_are_told_apart_by_their_matrix_and_not_by_the_order_of_calls(monkeypatch):
    def feed_first(streams, x0, w, attend, feed):
        x = t.residual_mix(t.join(streams), x0, w.resid_mix)
        z = t.rms_norm(x)
        fed = feed(z)
        return (x + attend(z) + fed,)

    h = tiny(gptq_batches=1, parallel_last_n=2, parallel_form="one_stream")
    tokens = random_tokens(h, (3, 17))
    grams = []
    for form in (t.one_stream, feed_first):
        monkeypatch.setitem(t.FORMS, "one_stream", form)
        with group_of_one() as m:
            grams.append(t.calibrate(run_of(h, m, noisy_model(h)), Batches([tokens])).grams)
    assert all(torch.equal(gram, grams[1][name]) for name, gram in grams[0].items())


def test_the_gram_of_the_output_layer_is_of_its_inputs():
    micro_batches = [random_tokens(tiny(), (3, 17), seed=i) for i in range(3)]
    grams = {}
    for knob in ("0", "1"):
        h = tiny(gptq_batches=2, gptq_embed=knob)
        with group_of_one() as m:
            model = noisy_model(h)
            loader = Batches(micro_batches[:2], micro_batches[2:])
            grams[knob] = t.calibrate(run_of(h, m, model), loader).grams
    assert set(grams["0"]) == BANKS and set(grams["1"]) == BANKS | {"tok_emb"}
    assert all(torch.equal(grams["0"][name], grams["1"][name]) for name in BANKS)

    expected = torch.zeros(h.model_dim, h.model_dim).double()
    with torch.no_grad():
        for tokens in micro_batches:
            with LinearInputs() as seen:
                model.logits(tokens[:, :-1])
            expected += seen.inputs[-1].T @ seen.inputs[-1]
    # Measured: 6 % of that.
    assert torch.allclose(grams["1"]["tok_emb"].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [6, 7, 8])
def test_the_logits_change_less(bits):
    """An embedding rounded by the inputs of the output layer, on inputs that it was not rounded by."""
    h = tiny(model_dim=64, vocab_size=200, embed_bits=bits, embed_clip_sd=4.0, gptq_embed=1)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.logspace(0, -2, 64)[:, None] * torch.randn(
        64, 64, generator=generator
    )  # correlated inputs
    seen, unseen = (torch.randn(4000, 64, generator=generator) @ mixing for _ in range(2))
    tensors = parameters_of(noisy_model(h))
    W = tensors["tok_emb"]

    errors = {}
    for label, grams in (("nearest", {}), ("guided", {"tok_emb": seen.T @ seen})):
        back = t.unpack_artifact(t.pack_artifact(tensors, h, t.Calibration(grams)))["tok_emb"]
        errors[label] = float((unseen @ (back - W).T).square().mean())
    assert errors["guided"] < 0.7 * errors["nearest"]  # measured: 0.2


def test_memory_does_not_grow_with_the_batches():
    h = tiny(gptq_batches=12)
    squares = []  # numbers in square matrices

    class Counted(Batches):
        def next(self):
            found = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.dim() >= 2]
            squares.append(sum(x.numel() for x in found if x.size(-1) == x.size(-2)))
            return super().next()

    micro_batch = random_tokens(h, (3, 17))
    with group_of_one() as m:
        t.calibrate(run_of(h, m, noisy_model(h)), Counted(*[[micro_batch]] * h.gptq_batches))
    assert squares[1] >= 4 * h.num_layers * h.model_dim**2 and squares[-1] == squares[1]


def calibrate_rank(rank):
    """Calibrate on this rank's part of eight sequences, in two batches. Returns the grams."""
    h = tiny(gptq_batches=2)
    m = t.init_machine(h, os.environ)
    sequences = random_tokens(h, (8, 17), seed=5)
    own = sequences[m.rank :: m.world_size].split(2)
    half = len(own) // 2
    return t.calibrate(run_of(h, m, noisy_model(h)), Batches(own[:half], own[half:])).grams


def test_ranks_put_their_inputs_together():
    (alone,) = run_ranks(calibrate_rank, 1)
    first, second = run_ranks(calibrate_rank, 2)
    for name in BANKS:
        assert torch.equal(first[name], second[name])
        assert torch.allclose(alone[name], first[name], rtol=1e-4, atol=1e-4)  # measured: 3 % of that


# ---------------------------------------------------------------- a whole run


class Outcome(NamedTuple):
    """The files of a run: its log after the machine's report, and its artifact."""

    log: str
    blob: bytes


def trained(tmp_path, **knobs):
    """Run `train` with knobs and return its Outcome."""
    argv = english_args(**(dict(iterations=6, out_dir=tmp_path, int6_step=0.3) | knobs))
    assert t.main(["train", *argv]) == 0
    text = (tmp_path / "run.txt").read_text(encoding="utf-8")
    return Outcome(text.rsplit("=" * 100, 1)[1], (tmp_path / "run.int6.xz").read_bytes())


def phase(log, name):
    """Return the milliseconds of a phase."""
    return int(re.search(rf"^phase_times .*\b{name}:(\d+)ms", log, re.M)[1])


def delay_calibration(monkeypatch, seconds):
    """Make every calibration take longer."""
    calibrate = t.calibrate

    def slow(run, loader):
        time.sleep(seconds)
        return calibrate(run, loader)

    monkeypatch.setattr(t, "calibrate", slow)


def test_the_knob_changes_the_artifact_and_nothing_of_training(tmp_path):
    runs = {batches: trained(tmp_path / str(batches), gptq_batches=batches) for batches in (0, 1, 3)}
    for label in ("final_live", "final_ema"):
        losses = {re.search(rf"^{label} (val_loss:\S+)", run.log, re.M)[1] for run in runs.values()}
        assert len(losses) == 1

    tensors = {batches: t.unpack_artifact(run.blob) for batches, run in runs.items()}
    for one, other in ((0, 1), (1, 3)):
        different = differing(tensors[one], tensors[other])
        assert different <= BANKS
        assert different
    assert phase(runs[0].log, "calibrate") == 0 < phase(runs[3].log, "calibrate")


def test_the_knob_of_the_embedding_changes_it_alone(tmp_path):
    plain, guided = (trained(tmp_path / knob, gptq_embed=knob) for knob in ("0", "1"))
    assert differing(t.unpack_artifact(plain.blob), t.unpack_artifact(guided.blob)) == {"tok_emb"}


def test_the_text_is_what_training_would_read_next(tmp_path, monkeypatch):
    indices = []
    next_batch = t.TokenLoader.next

    def noted(self, count=0):
        indices.append(self.index // self.shape.accum)
        return next_batch(self, count)

    monkeypatch.setattr(t.TokenLoader, "next", noted)
    trained(tmp_path, gptq_batches=2, warmup_steps=1)
    fitting = [0, 1]  # a rehearsal that shows whether calibration fits the memory
    warmup = [0]
    rehearsal = [1, 2]
    training = [*range(6)]
    calibration = [6, 7]
    assert indices == fitting + warmup + rehearsal + training + calibration


def test_the_clock_holds_time_for_it(tmp_path, monkeypatch):
    limit = 2.0
    takes = 0.4
    delay_calibration(monkeypatch, takes)
    log, _ = trained(tmp_path, iterations=100_000, max_wallclock_seconds=limit, train_log_every=1000)
    train_ms = phase(log, "train")
    calibrate_ms = phase(log, "calibrate")
    assert calibrate_ms >= 1000 * takes and 1000 * (limit - 2 * takes) < train_ms
    assert train_ms + calibrate_ms <= 1000 * limit
    assert re.search(r"^stopping_early: wallclock_cap", log, re.M)


def test_rates_reach_their_end_before_it(tmp_path, monkeypatch):
    """The time that is held back is no part of the schedule: the rate of the last step is close to zero."""
    delay_calibration(monkeypatch, 0.5)
    progress = []
    hyper_at = t.hyper_at

    def noted(*args):
        hp = hyper_at(*args)
        progress.append(hp.progress)
        return hp

    monkeypatch.setattr(t, "hyper_at", noted)
    trained(tmp_path, iterations=100_000, max_wallclock_seconds=2.0, train_log_every=1000)
    assert progress[-1] > 0.9  # of the whole two seconds it would be 0.62
