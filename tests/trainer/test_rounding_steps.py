"""Steps of columns and rows: how far apart an artifact's codes lie, by what training text says of them."""

import dataclasses

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.helpers import noisy_model, random_tokens, tiny
from tests.rank_cases import group_of_one
from tests.trainer.test_gptq import BANKS, Batches, differing, output_error, parameters_of, run_of

LIMIT = t.ENCODINGS["int6"].limit

pytestmark = pytest.mark.usefixtures("clean_environment")


def uneven_inputs(columns, tokens=4000, octaves=3.0):
    """Return correlated inputs (tokens, N) whose columns differ in size by up to `octaves` octaves."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp2(octaves * torch.rand(columns, generator=generator))
    mixing = torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ mixing * sizes


def entropy(codes):
    """Return the order-0 entropy of codes in bits a code, every column by its own counts."""
    bits = []
    for column in codes.flatten(0, -2).T:
        _, counts = np.unique(column.numpy(), return_counts=True)
        p = counts / counts.sum()
        bits.append(-(p * np.log2(p)).sum())
    return float(np.mean(bits))


def calibrated(h, sequences, model):
    """Return the Calibration of a model on these sequences, the same for inputs and gradients."""
    with group_of_one() as m:
        return t.calibrate(run_of(h, m, model), Batches([sequences], [sequences]))


# ---------------------------------------------------------------- columns


def test_column_steps_follow_the_errors_that_remain():
    """Without correlation, an error of column j changes outputs by its input's size: 2^(e/4) ~ 1 / size."""
    sizes = torch.tensor([1.0, 2.0, 4.0, 1.0, 0.5])
    exponents = t.column_exponents(t.inverse_factor((sizes**2).diag() * 1000))
    octaves = sizes.log2().mean() - sizes.log2()
    assert exponents.shape == (1, 5) and exponents.dtype == torch.int8
    # A rounded quarter, and the damping; measured: 0.15.
    assert (exponents[0] / 4 - octaves).abs().max() <= 0.25


def test_column_steps_have_limits_and_geometric_mean_one():
    sizes = torch.ones(400)
    sizes[:10] = 1e6
    exponents = t.column_exponents(t.inverse_factor((sizes**2).diag()))
    assert (exponents[0, :10] == -t.EXPONENT_LIMIT).all() and (exponents[0, 10:] <= t.EXPONENT_LIMIT).all()
    x = uneven_inputs(48)
    assert abs(float(t.column_exponents(t.inverse_factor(x.T @ x)).float().mean())) < 0.1  # measured: 0.062


def test_the_outputs_change_less_at_the_same_entropy():
    x = uneven_inputs(48)
    gram = x.T @ x
    W = torch.randn(400, 48, generator=torch.Generator().manual_seed(1))

    plain = t.quantize(W, "int6", 0.5, t.column_guide(gram, False))
    columns = t.quantize(W, "columns", 0.51, t.column_guide(gram, True))
    errors = {}
    for label, found in (("plain", plain), ("columns", columns)):
        steps = found.scales.float()
        if found.exponents is not None:
            steps = steps * t.column_sizes(found.exponents)
        errors[label] = output_error(W, found.codes.float(), steps, gram)
    assert entropy(columns.codes) <= entropy(plain.codes)
    assert errors["columns"] < 0.8 * errors["plain"]  # measured: 0.48


@pytest.mark.parametrize("codec", t.CODECS)
def test_column_steps_come_back_from_an_artifact(codec):
    h = tiny(column_steps=1, gptq_batches=1, int6_step=0.3, codec=codec)
    model = noisy_model(h)
    tensors = parameters_of(model)
    calibration = calibrated(h, random_tokens(h, (3, 17)), model)
    back = t.unpack_artifact(t.pack_artifact(tensors, h, calibration))
    for name in BANKS:
        guide = t.column_guide(calibration.grams[name], True)
        found = t.quantize(tensors[name], "columns", h.int6_step, guide)
        sizes = torch.exp2(found.exponents.float() / 4)
        # Measured: 0.
        assert torch.allclose(back[name], found.codes * found.scales.float() * sizes, rtol=1e-6)
        assert found.exponents.unique().numel() > 1

    plain = t.unpack_artifact(
        t.pack_artifact(tensors, dataclasses.replace(h, column_steps=False), calibration)
    )
    assert differing(plain, back) == BANKS


def test_only_what_has_a_gram_gets_column_steps():
    h = tiny(column_steps=1, gptq_batches=1)
    tensors = parameters_of(noisy_model(h))
    N = h.model_dim
    grams = {"qo_bank": torch.eye(N).expand(len(tensors["qo_bank"]), N, N)}
    header, _ = t.open_artifact(t.pack_artifact(tensors, h, t.Calibration(grams)))
    encodings = {name: encoding for name, encoding, *_ in header["tensors"]}
    assert encodings["qo_bank"] == "columns" and encodings["kv_bank"] == "int6"


@pytest.mark.parametrize("codec", t.CODECS)
def test_an_artifact_that_ends_in_its_exponents_is_refused(codec):
    h = tiny(column_steps=1, gptq_batches=1, codec=codec)
    model = noisy_model(h)
    blob = t.pack_artifact(parameters_of(model), h, calibrated(h, random_tokens(h, (3, 17)), model))
    header, payload = t.open_artifact(blob)
    last = t.read_entry(header["tensors"][-1])
    with pytest.raises(ValueError, match=f"tensor '{last.name}' is out of order, repeated or past the end"):
        t.read_tensors(header, payload[:-1])


def test_fitting_factorizes_each_gram_once(monkeypatch):
    """For the exponents and, divided by the column steps, for the codes: whatever the attempts at a step."""
    h = tiny(column_steps=1, row_steps=1, gptq_batches=1, model_dim=64)
    model = noisy_model(h)
    tensors = parameters_of(model)
    calibration = calibrated(h, random_tokens(h, (3, 17)), model)
    room = int(0.8 * len(t.pack_artifact(tensors, h, calibration)))
    calls = []

    def counted(gram):
        calls.append(gram.shape)
        return inverse_factor(gram)

    phases = []

    def time_phase(phase, fn, *args):
        phases.append(phase)
        return fn(*args)

    inverse_factor = t.inverse_factor
    monkeypatch.setattr(t, "inverse_factor", counted)
    blob, step = t.fit_artifact(tensors, h, room, time_phase, calibration)
    assert phases.count("compress") > 1 and len(calls) == 2 * len(BANKS)
    assert blob == t.pack_artifact(tensors, dataclasses.replace(h, int6_step=step), calibration)


# ---------------------------------------------------------------- rows


def test_sensitivities_are_the_squared_gradients_of_the_outputs():
    """With one token x and output gradient g, the gradient of a row is g x', of norm |g| |x|."""
    h = tiny(row_steps=1, gptq_batches=1, train_seq_len=1)
    sequences = random_tokens(h, (1, 2))
    model = noisy_model(h)
    calibration = calibrated(h, sequences, model)

    model.loss(sequences[:, :-1], sequences[:, 1:]).backward()
    parameters = dict(model.named_parameters())
    assert set(calibration.sensitivities) == BANKS
    for name, sensitivity in calibration.sensitivities.items():
        bank = parameters[name]
        inputs = calibration.grams[name].diagonal(dim1=-2, dim2=-1).sum(-1)[:, None]
        expected = bank.grad.square().sum(-1)
        assert sensitivity.shape == (*bank.shape[:2], 1)
        assert expected.max() > 0
        # Measured: 4 % of that.
        assert torch.allclose(sensitivity[..., 0] * inputs, expected, rtol=1e-5, atol=1e-9), name
    assert all(p.grad is None or name for name, p in parameters.items())


def test_queries_matter_once_there_are_two_keys():
    h = tiny(row_steps=1, gptq_batches=1)
    found = calibrated(h, random_tokens(h, (3, 17)), noisy_model(h)).sensitivities
    assert all((found[name] > 0).float().mean() > 0.9 for name in BANKS)


def test_calibration_leaves_no_gradient_behind():
    h = tiny(row_steps=1, gptq_batches=1)
    model = noisy_model(h)
    calibrated(h, random_tokens(h, (3, 17)), model)
    assert all(p.grad is None for p in model.parameters())


def test_row_steps_fall_with_the_root_of_the_sensitivity():
    h = tiny(row_steps=1, gptq_batches=1, int6_step=0.2)
    tensors = parameters_of(noisy_model(h))
    matrices, M, N = tensors["qo_bank"].shape
    grams = {"qo_bank": torch.eye(N).expand(matrices, N, N)}
    sensitivity = torch.ones(matrices, M, 1)
    sensitivity[0, 0] = 9.0
    sensitivity[0, 1] = 1e9

    calibration = t.Calibration(grams, {"qo_bank": sensitivity})
    factors = t.rounding_guide(tensors, h, calibration).row_factors["qo_bank"]
    rms = tensors["qo_bank"].square().mean(-1, keepdim=True).sqrt()
    steps = factors * rms
    assert torch.allclose(steps[0, 0] * 3, steps[1, 0], rtol=2e-6)  # measured: 1e-7
    assert factors[0, 1] == 1 / t.STEP_FACTOR_LIMIT and factors.max() <= t.STEP_FACTOR_LIMIT
    unlimited = factors[factors > 1 / t.STEP_FACTOR_LIMIT]
    assert abs(float(unlimited.log().mean())) < 0.5  # measured: 0.042

    even = t.unpack_artifact(t.pack_artifact(tensors, h, t.Calibration(grams)))
    uneven = t.unpack_artifact(t.pack_artifact(tensors, h, calibration))
    assert differing(even, uneven) == {"qo_bank"}


@pytest.mark.parametrize("key", ["column_steps", "row_steps", "gptq_embed"])
def test_steps_need_calibration(key):
    with pytest.raises(t.InputError, match=f"{key}=1 needs gptq_batches of at least 1, not 0"):
        tiny(gptq_batches=0, **{key: 1})
