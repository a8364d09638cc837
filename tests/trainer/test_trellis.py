"""Trellis codes: weights that may lie half a step beside their codes, as the codes above them decide."""

import dataclasses
import math
import re
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.helpers import noisy_model, random_tokens, tiny
from tests.trainer.test_gptq import BANKS, differing, output_error, parameters_of, trained
from tests.trainer.test_rounding_steps import calibrated, entropy, uneven_inputs

LIMIT = t.ENCODINGS["trellis"].limit

pytestmark = pytest.mark.usefixtures("clean_environment")


def normal(*shape, seed=0):
    """Return normal numbers of this shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def multiples_of(codes):
    """Return the multiples of the scale that codes (M, N) stand for, each shift worked out bit by bit."""
    out = np.empty(codes.shape)
    for column in range(codes.shape[1]):
        register = [0] * 8  # the newest bit first
        for row, code in enumerate(codes[:, column].tolist()):
            shifted = sum(register[k] for k in range(8) if 0o362 >> (k + 1) & 1) % 2
            out[row, column] = code + shifted * (0.5 if row % 2 == 0 else -0.5)
            flip = sum(register[k] for k in range(8) if 0o515 >> (k + 1) & 1)
            register = [(code + flip) % 2, *register[:-1]]
    return out


def test_shifts_are_those_of_the_register():
    codes = (3 * normal(40, 5)).round().to(torch.int8).numpy()
    shifts = t.trellis_shifts(codes)
    assert np.array_equal(codes + shifts, multiples_of(codes))
    assert 0.2 < (shifts[10:] != 0).mean() < 0.8  # measured: 0.47
    stacked = np.stack([codes, codes[::-1].copy()])
    assert np.array_equal(t.trellis_shifts(stacked)[0], shifts)


def test_no_sequence_of_codes_has_a_smaller_error():
    """All sequences of the five nearest codes in each of six rows."""
    x = 2 * normal(6, 1)
    choices = [range(math.floor(v) - 2, math.floor(v) + 3) for v in x.flatten().tolist()]
    sequences = np.array(list(product(*choices)), np.int8).T
    errors = ((multiples_of(sequences) - x.numpy()) ** 2).sum(0)
    found = t.trellis_multiples(x, torch.ones(6, 1), LIMIT)
    assert float((found - x).square().sum()) == pytest.approx(errors.min(), abs=1e-6)  # measured: 3.4e-8


def test_multiples_are_read_back_from_their_codes():
    found = t.trellis_multiples(3 * normal(2, 3, 50, 1), torch.full((50, 1), 0.7), LIMIT)
    codes = t.trellis_codes(found)
    assert torch.equal(codes, codes.round())
    stored = codes.to(torch.int8).numpy()
    assert np.array_equal(stored + t.trellis_shifts(stored), found.numpy())


@pytest.mark.parametrize("size", (1e6, -1e6))
def test_codes_stay_within_the_limit(size):
    found = t.trellis_multiples(torch.full((30, 1), size), torch.ones(30, 1), LIMIT)
    codes = t.trellis_codes(found)
    assert LIMIT - 1 <= float(codes.abs().min()) and float(codes.abs().max()) <= LIMIT
    stored = codes.to(torch.int8).numpy()
    assert np.array_equal(stored + t.trellis_shifts(stored), found.numpy())


def test_the_error_at_equal_entropy_is_a_decibel_smaller():
    x = normal(40, 300, 1)
    plain = t.nearest_codes(x, torch.tensor(0.43), LIMIT)
    found = t.trellis_multiples(x, torch.full((300, 1), 0.43), LIMIT)
    errors = [float((multiples * 0.43 - x).square().mean()) for multiples in (plain, found)]
    rates = [entropy(codes.flatten()[:, None]) for codes in (plain, t.trellis_codes(found))]
    decibels = 10 * math.log10(errors[0] / errors[1]) - 20 * math.log10(2) * (rates[1] - rates[0])
    assert 1.0 < decibels < 1.53


def test_the_outputs_change_less_at_the_same_entropy():
    x = uneven_inputs(24)
    gram = x.T @ x
    guide = t.column_guide(gram, True)
    W = normal(200, 24)
    errors = {}
    entropies = {}
    for encoding, step in (("columns", 0.5), ("trellis", 0.51)):
        rounding = t.trellis_gptq if encoding == "trellis" else t.gptq
        found = t.quantize(W, encoding, step, guide, round_columns=rounding)
        shifts = torch.zeros(found.codes.shape)
        if encoding == "trellis":
            shifts = torch.from_numpy(t.trellis_shifts(found.codes.numpy()))
        steps = found.scales.float() * t.column_sizes(found.exponents)
        errors[encoding] = output_error(W, found.codes.float() + shifts, steps, gram)
        entropies[encoding] = entropy(found.codes.flatten()[:, None])
    assert entropies["trellis"] <= entropies["columns"]
    assert errors["trellis"] < 0.88 * errors["columns"]  # measured: 0.77


@pytest.mark.parametrize("codec", t.CODECS)
def test_trellis_codes_come_back_from_an_artifact(codec):
    h = tiny(column_steps=1, trellis=1, gptq_batches=1, int6_step=0.3, codec=codec)
    model = noisy_model(h)
    tensors = parameters_of(model)
    calibration = calibrated(h, random_tokens(h, (3, 17)), model)
    blob = t.pack_artifact(tensors, h, calibration)
    header, _ = t.open_artifact(blob)
    encodings = {name: encoding for name, encoding, *_ in header["tensors"]}
    back = t.unpack_artifact(blob)
    for name in BANKS:
        assert encodings[name] == "trellis"
        guide = t.column_guide(calibration.grams[name], True)
        found = t.quantize(tensors[name], "trellis", h.int6_step, guide, round_columns=t.trellis_gptq)
        multiples = found.codes + torch.from_numpy(t.trellis_shifts(found.codes.numpy()))
        sizes = t.column_sizes(found.exponents)
        assert torch.allclose(back[name], multiples * found.scales.float() * sizes, rtol=1e-6)  # measured: 0

    plain = t.unpack_artifact(t.pack_artifact(tensors, dataclasses.replace(h, trellis=False), calibration))
    assert differing(plain, back) == BANKS


def test_a_trellis_needs_column_steps():
    with pytest.raises(t.InputError, match="trellis=1 needs column_steps=1"):
        t.make_config(dict(trellis=True, column_steps=False, row_steps=False))


def test_a_run_takes_it(tmp_path):
    """Training is the same; the artifact's banks differ, and the log says what rounded them."""
    plain, coded = (trained(tmp_path / knob, iterations=2, column_steps=1, trellis=knob) for knob in "01")
    assert differing(t.unpack_artifact(plain.blob), t.unpack_artifact(coded.blob)) == BANKS
    assert re.search(r"^artifact weights:ema int6_step:\S+$", plain.log, re.M)
    assert re.search(r"^artifact weights:ema int6_step:\S+ trellis:torch$", coded.log, re.M)
    losses = [run.log[run.log.index("final_ema") :].split(" eval_time")[0] for run in (plain, coded)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("limit, most", [("MAX_TRELLIS_ROWS", 34), ("MAX_TRELLIS_CODES", 69)])
def test_rows_and_codes_have_a_limit(limit, most, monkeypatch):
    entries = [["a", "trellis", [30, 2], 0], ["b", "trellis", [5, 2], 122]]
    payload = bytes(122 + 22)
    t.read_tensors({"tensors": entries}, payload)
    monkeypatch.setattr(t, limit, most + 1)
    t.read_tensors({"tensors": entries}, payload)
    monkeypatch.setattr(t, limit, most)
    with pytest.raises(ValueError, match=f"artifact: more than .*{most}.* trellis codes"):
        t.read_tensors({"tensors": entries}, payload)


def test_a_model_that_no_reader_would_decode_is_refused_before_it_trains():
    t.load_config(["preset=h100x1", "trellis=1", "codec=xz", "num_layers=20"], {})
    with pytest.raises(t.InputError, match="artifact of trellis=1 holds at most 6.71e[+]07"):
        t.load_config(["preset=h100x1", "trellis=1", "codec=xz", "num_layers=22"], {})
    t.load_config(["preset=h100x1", "codec=xz", "num_layers=22"], {})

    # The matrices of a layer have F + D + D + D / 2 rows here.
    wide = ["preset=h100x1", "num_layers=1", "xsa_last_n=1", "model_dim=512"]
    t.load_config([*wide, "trellis=1", "mlp_mult=29"], {})
    with pytest.raises(t.InputError, match="at most 16384 rows .* mlp_mult=30 make 16640"):
        t.load_config([*wide, "trellis=1", "mlp_mult=30"], {})
    t.load_config([*wide, "mlp_mult=30"], {})


def fused_and_exact(device):
    """Return what the kernel and its reference make of the same columns, and the columns."""
    x = (2 * normal(3, 70, 1)).to(device)
    scale = torch.full((70, 1), 0.5, device=device)
    return t.trellis_multiples_fused(x, scale, LIMIT), t.trellis_multiples(x, scale, LIMIT), x / scale


def every_half_step(W, scale, limit):
    """Round to the nearest half step, which no sequence of codes gives."""
    return (2 * W / scale).round() / 2


def codes_alone(W, scale, limit):
    """Round to even multiples: with no odd code, no state shifts a weight."""
    return 2 * (W / scale / 2).round()


@pytest.mark.parametrize(
    "fused,reason",
    [
        (t.trellis_multiples, ""),
        (every_half_step, "unreadable"),
        (codes_alone, r"error_[\d.]+_for_[\d.]+"),
        (lambda *args: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_wrong_kernel_is_not_bound(fused, reason, monkeypatch):
    """Reject codes that are read back as other weights, and a larger error than that of the reference."""
    monkeypatch.setattr(t, "trellis_multiples_fused", fused)
    fault = partial(t.trellis_fault, torch.device("cpu"))
    bound = t.bind_unless(fault, t.trellis_multiples_fused, t.trellis_multiples)
    rejected = rf"torch\(triton:{reason}\)"
    assert re.fullmatch(rejected if reason else "triton", bound.label), bound.label
    assert bound.function is (t.trellis_multiples if reason else fused)


@pytest.mark.gpu
def test_the_kernel_is_as_good_as_its_reference_on_a_gpu():
    fused, exact, x = fused_and_exact("cuda")
    assert t.bind_trellis(x.device).name == "triton"
    assert float((fused - x).square().sum()) == pytest.approx(float((exact - x).square().sum()), rel=1e-5)
    codes = t.trellis_codes(fused).to(torch.int8).cpu().numpy()
    assert np.array_equal(codes + t.trellis_shifts(codes), fused.cpu().numpy())
