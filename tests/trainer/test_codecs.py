"""The codecs: what each packs it gives back, how close rans comes to the entropy, and what it refuses.

Hostile streams are in tests/stress. Encodings and clips of the rows are here, too: whatever changes bytes.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.helpers import english_args, gaussian, noisy_model, stop_one_line, tiny

WIDE = dict(num_layers=2, model_dim=64, num_heads=2, num_kv_heads=1, mlp_mult=8.0, ve_dim=16, bigram_dim=16)
EMBEDDINGS = {spec.name for spec in t.PARAM_TABLE if spec.stored_as == "embed"}
BANKS = {spec.name for spec in t.MATRICES}


pytestmark = pytest.mark.usefixtures("clean_environment")


def parameters_of(model):
    """Return the parameters of a model by name, without gradients."""
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def tensors():
    return parameters_of(noisy_model(tiny(**WIDE), scale=0.2))


@pytest.fixture(scope="module")
def raw(tensors):
    return t.raw_artifact(tensors, tiny(**WIDE))


def gaussian_codes(*shape, sigma=6.0, limit=31, seed=0):
    """Return normal codes, int8, of one sigma or of sigmas that broadcast to the shape."""
    drawn = np.random.default_rng(seed).normal(size=shape) * sigma
    return np.clip(np.rint(drawn), -limit, limit).astype(np.int8)


def entropy_bits(codes):
    """Return the order-0 entropy of codes in bits."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / codes.size)).sum())


# ---------------------------------------------------------------- every codec


@pytest.mark.parametrize("codec", t.CODECS)
def test_a_codec_gives_back_what_it_packed(codec, raw):
    row = t.CODECS[codec]
    blob = row.pack(raw)
    assert row.unpack(blob) == raw and row.pack(raw) == blob
    assert blob.startswith(row.magic) and t.codec_of(blob) == codec
    header, payload = t.open_artifact(blob)
    assert raw.endswith(payload) and header == json.loads(raw[8 : len(raw) - len(payload)])


def test_no_codec_begins_like_another():
    magics = [codec.magic for codec in t.CODECS.values()]
    for magic in magics:
        assert sum(other.startswith(magic) for other in magics) == 1 and len(magic) >= 6


def test_the_knob_chooses_the_codec(tensors, raw):
    assert t.Config.codec == "rans" and tiny(**WIDE).codec == "xz"
    assert t.pack_artifact(tensors, tiny(**WIDE)) == t.pack_xz(raw)
    blobs = {codec: t.pack_artifact(tensors, tiny(**WIDE, codec=codec)) for codec in t.CODECS}
    assert all(t.codec_of(blob) == codec for codec, blob in blobs.items())
    first, *others = (t.unpack_artifact(blob) for blob in blobs.values())
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)
    assert len(blobs["rans"]) < len(blobs["xz"])


def test_fitting_fills_the_room_by_the_codec(tensors):
    def untimed(phase, fn, *args):
        return fn(*args)

    h = tiny(**WIDE, codec="rans")
    room = int(0.8 * len(t.pack_artifact(tensors, h)))
    blob, step = t.fit_artifact(tensors, h, room, untimed)
    assert t.codec_of(blob) == "rans" and 0.98 * room <= len(blob) <= room
    assert blob == t.pack_artifact(tensors, dataclasses.replace(h, int6_step=step))


def test_an_unknown_codec_and_a_model_beyond_a_codec_are_refused(capsys):
    said = stop_one_line(["train", "codec=zip"], capsys)
    assert "codec" in said and "'zip' is not one of xz, rans" in said
    large = ["preset=record_sp1024", "model_dim=1024", "num_layers=16"]
    assert t.load_config(large, {}).codec == "xz"
    assert "codec=rans holds at most 6.71e+07" in stop_one_line(["train", "codec=rans", *large], capsys)


# ---------------------------------------------------------------- rans: its bytes


def rans_bits(codes, limit=31):
    """Return the bits of the words that rans needs for codes (m, R, N), and check that they come back."""
    model = t.model_codes(codes, limit)
    words = t.rans_encode([model], [codes.ravel()])
    (back,) = t.rans_decode(words, [model], [codes.size])
    assert np.array_equal(back, codes.ravel())
    return 16 * (len(words) - 3 * t.states_for(codes.size))


def test_words_come_within_a_thousandth_of_the_entropy():
    codes = gaussian_codes(4, 300, 256)
    assert rans_bits(codes) < 1.001 * entropy_bits(codes)


@pytest.mark.parametrize("axis,name", [(1, "rows"), (2, "columns")])
def test_classes_pay_where_rows_or_columns_differ(axis, name):
    """Codes whose sigma is known cost less than their own order-0 entropy, and only that axis is classed."""
    shape = [1, 1, 1]
    shape[axis] = 256
    sigma = np.exp(np.random.default_rng(1).normal(size=shape) * 0.7) * 5
    codes = gaussian_codes(1, 256, 256, sigma=sigma)
    model = t.model_codes(codes, 31)
    other = {"rows": "columns", "columns": "rows"}[name]
    assert np.ptp(getattr(model, name)) > 4 and np.ptp(getattr(model, other)) == 0
    assert rans_bits(codes) < 0.96 * entropy_bits(codes)  # measured: 0.924


def test_rows_and_columns_of_one_size_are_not_classed():
    model = t.model_codes(gaussian_codes(2, 128, 128), 31)
    assert np.ptp(model.rows) == np.ptp(model.columns) == 0


ODD_CODES = {
    "zeros": np.zeros((1, 40, 50), np.int8),
    "one value": np.full((2, 9, 10), -31, np.int8),
    "one code": np.array([[[5]]], np.int8),
    "the largest only": np.array([31, -31] * 50, np.int8).reshape(1, 1, 100),
    "a single code that is not zero": np.eye(1, 900, 77, dtype=np.int8).reshape(1, 30, 30),
    "every code": np.arange(-31, 32, dtype=np.int8).reshape(1, 1, 63),
    "rows from nothing to the limit": np.arange(-31, 32, dtype=np.int8)[None, :, None]
    * np.ones((1, 1, 7), np.int8),
}


@pytest.mark.parametrize("name", ODD_CODES)
def test_odd_codes_come_back(name):
    rans_bits(ODD_CODES[name])


@pytest.mark.parametrize("limit", [31, 63, 127])
def test_tables_hold_every_code_that_occurs_and_sum_to_a_whole(limit):
    codes = gaussian_codes(3, 50, 64, sigma=limit / 3, limit=limit)
    model = t.model_codes(codes, limit)
    assert model.tables.shape == (t.CONTEXTS, limit + 1)
    assert (model.tables.sum(1) == 1 << t.FREQUENCY_BITS - 1).all() and (model.tables >= 0).all()
    frequencies = model.frequencies
    assert (frequencies.sum(1) == 1 << t.FREQUENCY_BITS).all()
    assert (frequencies[model.contexts, codes.ravel().astype(int) + limit] > 0).all()
    assert np.array_equal(frequencies, frequencies[:, ::-1])
    rans_bits(codes, limit)


def test_a_table_of_many_rare_codes_stays_positive():
    """All codes but one occur once among a million: each takes a share that is too small to be rounded to."""
    counts = np.array([1_000_000, *[1] * 127])
    tables = t.tables_for(np.tile(counts, (t.CONTEXTS, 1)))
    assert (tables > 0).all() and (tables.sum(1) == 1 << t.FREQUENCY_BITS - 1).all()


def test_several_tensors_share_the_states():
    parts = [
        gaussian_codes(1, 30, 41, seed=1),
        gaussian_codes(2, 5, 7, sigma=40, limit=127),
        gaussian_codes(1, 1, 1),
    ]
    models = [t.model_codes(codes, limit) for codes, limit in zip(parts, (31, 127, 63))]
    words = t.rans_encode(models, [codes.ravel() for codes in parts])
    back = t.rans_decode(words, models, [codes.size for codes in parts])
    for codes, found in zip(parts, back):
        assert np.array_equal(codes.ravel(), found)


def test_decoding_by_the_definition():
    """One state after the other, in Python's whole numbers."""
    codes = gaussian_codes(1, 40, 40, sigma=9)
    model = t.model_codes(codes, 31)
    words = t.rans_encode([model], [codes.ravel()]).tolist()
    count = t.states_for(codes.size)
    states = [words[3 * i] << 32 | words[3 * i + 1] << 16 | words[3 * i + 2] for i in range(count)]
    rest = words[3 * count :]
    found = []
    for at, context in enumerate(model.contexts):
        state = at % count
        if state == 0 and at > 0:  # between steps, every state that is small takes in a word
            for i in range(count):
                if states[i] < t.MIN_STATE:
                    states[i] = states[i] << 16 | rest.pop(0)
        frequencies = model.frequencies[context].tolist()
        slot = states[state] % (1 << t.FREQUENCY_BITS)
        start = 0
        symbol = 0
        while slot >= start + frequencies[symbol]:
            start += frequencies[symbol]
            symbol += 1
        states[state] = frequencies[symbol] * (states[state] >> t.FREQUENCY_BITS) + slot - start
        found.append(symbol - 31)
    assert found == codes.ravel().tolist()


def test_planes_put_the_highest_bytes_first():
    assert t.to_planes(bytes([1, 2, 3, 4, 5, 6]), 2) == bytes([2, 4, 6, 1, 3, 5])
    for size in (1, 2, 4):
        assert t.from_planes(t.to_planes(bytes(range(16)), size), size) == bytes(range(16))


# ---------------------------------------------------------------- encodings and clips


def header_and_tensors(tensors, **knobs):
    """Return the encodings of a model's tensors by name, and the tensors that come back."""
    blob = t.pack_artifact(tensors, tiny(**WIDE, **knobs))
    header, _ = t.open_artifact(blob)
    return {name: encoding for name, encoding, _, _ in header["tensors"]}, t.unpack_artifact(blob)


def differing(one, other):
    """Return the names of the tensors that differ."""
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_embed_bits_are_the_encoding_of_embeddings_only(tensors):
    plain_encodings, plain = header_and_tensors(tensors)
    errors = []
    for bits in (6, 7, 8):
        encodings, back = header_and_tensors(tensors, embed_bits=bits)
        assert {encodings[name] for name in EMBEDDINGS} == {f"int{bits}"}
        assert {name for name in encodings if encodings[name] != plain_encodings[name]} == (
            EMBEDDINGS if bits < 8 else set()
        )
        assert differing(plain, back) == (EMBEDDINGS if bits < 8 else set())
        limit = t.ENCODINGS[f"int{bits}"].limit
        assert limit == 2 ** (bits - 1) - 1
        for name in EMBEDDINGS:
            codes, scales, _ = t.quantize(tensors[name], f"int{bits}")
            assert codes.abs().max() <= limit and torch.equal(back[name], codes * scales.float())
            peak = tensors[name].abs().amax(-1, keepdim=True)
            # Measured: 0.05 of the peak.
            assert ((back[name] - tensors[name]).abs() <= 0.41 * peak + 1e-7).all()
        errors.append(float((back["tok_emb"] - tensors["tok_emb"]).square().sum()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_fewer_bits_make_a_smaller_artifact(tensors):
    sizes = [len(t.pack_artifact(tensors, tiny(**WIDE, embed_bits=bits, codec="rans"))) for bits in (6, 7, 8)]
    saved = sum(tensors[name].numel() for name in EMBEDDINGS) / 8  # a bit of each
    for one, other in zip(sizes, sizes[1:]):
        assert 0.9 * saved < other - one < 1.1 * saved


def test_the_int6_step_is_of_matrices_even_if_embeddings_have_six_bits(tensors):
    _, fine = header_and_tensors(tensors, embed_bits=6)
    _, coarse = header_and_tensors(tensors, embed_bits=6, int6_step=0.5)
    assert differing(fine, coarse) == BANKS


CLIPS = [("matrix_clip_sd", BANKS, "int6", 4.0), ("embed_clip_sd", EMBEDDINGS, "int7", 6.0)]


@pytest.mark.parametrize("knob,names,encoding,sd", CLIPS)
def test_a_clip_by_deviations_sets_the_scale_of_its_tensors(knob, names, encoding, sd, tensors):
    _, plain = header_and_tensors(tensors, embed_bits=7)
    _, clipped = header_and_tensors(tensors, embed_bits=7, **{knob: sd})
    assert differing(plain, clipped) == names
    for name in names:
        W = tensors[name]
        limit = t.ENCODINGS[encoding].limit
        clip = sd * W.square().mean(-1, keepdim=True).sqrt()
        scale = (clip / limit).half().float()
        assert torch.equal(clipped[name], (W / scale).round().clamp(-limit, limit) * scale)


def test_a_clip_below_the_peak_cuts_and_one_beyond_it_is_a_step():
    """matrix_clip_sd=k is int6_step=k/31 in every row without a weight beyond k deviations."""
    W = gaussian(50, 400)
    deviation = W.square().mean(-1, keepdim=True).sqrt()
    assert float((W.abs() / deviation).max()) < 5
    for k in (5.0, 8.0, 12.85):
        by_clip = t.quantize(W, "int6", clip_sd=k)
        by_step = t.quantize(W, "int6", k / 31)
        assert all(torch.equal(one, other) for one, other in zip(by_clip[:2], by_step[:2]))
    codes, scales, _ = t.quantize(W, "int6", clip_sd=2.0)
    # Measured: 4.6e-4.
    assert (codes.abs() == 31).sum() > 100 and torch.allclose(31 * scales.float(), 2 * deviation, rtol=1e-3)
    _, searched, _ = t.quantize(W, "int6", 2.0 / 31)
    assert (searched.abs() == 31).sum() < (codes.abs() == 31).sum()


def test_fitting_raises_a_step_above_the_clip(tensors):
    def untimed(phase, fn, *args):
        return fn(*args)

    h = tiny(**WIDE, matrix_clip_sd=6.0)
    whole = t.pack_artifact(tensors, h)
    loose = t.fit_artifact(tensors, h, 10**9, untimed)
    assert loose.blob == whole and loose.int6_step == 6.0 / 31
    room = int(0.85 * len(whole))
    fitted = t.fit_artifact(tensors, h, room, untimed)
    assert fitted.int6_step > 6.0 / 31 and 0.98 * room <= len(fitted.blob) <= room


@pytest.mark.parametrize(
    "words",
    [
        "embed_bits=5",
        "embed_bits=9",
        "matrix_clip_sd=31.5",
        "embed_clip_sd=-1",
        "gptq_embed=1 gptq_batches=0",
    ],
)
def test_values_that_make_no_artifact_are_refused(words, capsys):
    assert words.split("=")[0] in stop_one_line(["train", *words.split()], capsys)


# ---------------------------------------------------------------- a whole run


def test_a_run_by_every_knob_writes_and_scores_its_artifact(tmp_path, capsys):
    knobs = dict(codec="rans", embed_bits=7, embed_clip_sd=6.0, matrix_clip_sd=5.0, gptq_embed=1)
    argv = english_args(iterations=3, out_dir=tmp_path, **knobs)
    assert t.main(["train", *argv]) == 0
    path = tmp_path / "run.int6.rans"
    blob = path.read_bytes()
    log = (tmp_path / "run.txt").read_text(encoding="utf-8")
    assert f"Serialized model int6+rans: {len(blob)} bytes" in log
    last = log.splitlines()[-1]
    assert last.startswith("final_score metric:int6_rans_sliding ") and t.sha256(blob) in last

    data = next(word for word in argv if word.startswith("data_path="))
    capsys.readouterr()
    evaluate = ["eval", str(path), data, f"out_dir={tmp_path}", "run_id=again", "eval_batch_tokens=512"]
    assert t.main(evaluate) == 0
    again = (tmp_path / "again.txt").read_text(encoding="utf-8").splitlines()[-1]
    assert again.split()[1:4] == last.split()[1:4]  # metric, loss, bpb
    assert "codec=xz: the artifact fixes this knob" in stop_one_line([*evaluate, "codec=xz"], capsys)


def test_a_large_file_may_hold_more_but_no_file_holds_much_more_than_itself(monkeypatch):
    """Beyond MAX_RAW_BYTES, a large model's codes are read and a bomb is not."""
    monkeypatch.setattr(t, "MAX_RAW_BYTES", 1 << 19)
    codes = gaussian_codes(1 << 20).tobytes()
    blob = t.pack_xz(codes)
    assert 1 << 19 < len(blob) < len(codes)
    assert t.unpack_xz(blob) == codes
    with pytest.raises(ValueError, match="larger than any model"):
        t.unpack_xz(t.pack_xz(codes + bytes(4 * len(blob))))
    with pytest.raises(ValueError, match="larger than any model"):
        t.unpack_xz(t.pack_xz(bytes((1 << 19) + 1)))
