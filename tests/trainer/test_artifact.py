"""The artifact: quantization against a search by hand, the byte layout, damage, the cap, odd values."""

import json
import lzma
import math
import os
import struct
from typing import NamedTuple

import numpy as np
import pytest
import torch

import train_gpt as t
from tests.helpers import gaussian, noisy_model, stop_one_line, tiny

SMALL = dict(
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    ve_dim=4,
    bigram_dim=4,
    bigram_vocab_size=16,
)


@pytest.fixture(scope="module")
def h():
    return tiny(**SMALL)


@pytest.fixture(scope="module")
def tensors(h):
    return parameters_of(noisy_model(h, scale=0.2))


def parameters_of(model):
    """Return the parameters of a model by name, without gradients."""
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def blob(h, tensors):
    return t.pack_artifact(tensors, h)


# ---------------------------------------------------------------- quantize


@pytest.mark.parametrize("encoding,limit", [("int6", 31), ("int8", 127)])
def test_quantize_takes_the_clip_of_least_squared_error(encoding, limit):
    """Try every clip of every row in numpy float64. The rows are long enough for clipping to pay in int6."""
    W = gaussian(6, 3000) * torch.tensor([1e-3, 0.1, 1.0, 1.0, 10.0, 100.0])[:, None]
    codes, scales, _ = t.quantize(W, encoding)
    assert codes.dtype == torch.int8 and codes.shape == W.shape
    assert scales.dtype == torch.float16 and scales.shape == (6, 1)
    assert codes.abs().max() <= limit

    clipped_rows = 0
    for row, code, scale in zip(W.double().numpy(), codes.numpy(), scales.numpy()):
        errors = []
        for clip in t.CLIPS:
            step = float(np.float16(np.abs(row).max() * clip / limit))
            nearest = np.clip(np.rint(row / step), -limit, limit) * step
            errors.append(((nearest - row) ** 2).sum())
        found = ((code * float(scale[0]) - row) ** 2).sum()
        assert found <= min(errors) * (1 + 1e-4)
        if np.argmin(errors) > 0:
            clipped_rows += 1
    assert clipped_rows > 0 or encoding == "int8"


@pytest.mark.parametrize("encoding,limit", [("int6", 31), ("int8", 127)])
def test_without_clipping_the_error_is_half_a_step(encoding, limit):
    W = gaussian(4, 200).clamp(-2, 2)  # so many values at the bounds that the full range is best
    codes, scales, _ = t.quantize(W, encoding)
    half_steps = W.abs().amax(-1) / limit / 2
    error = codes * scales.float() - W
    assert (error.square().sum() <= half_steps.square().sum() * 200).all()


def test_rows_of_zeros_and_tiny_rows():
    W = torch.stack([torch.zeros(8), torch.full((8,), 1e-9), gaussian(8)])
    for encoding in ("int6", "int8"):
        codes, scales, _ = t.quantize(W, encoding)
        back = codes * scales.float()
        assert torch.isfinite(scales).all() and (scales > 0).all()
        assert codes[0].abs().max() == 0 and back[1].abs().max() < 1e-7  # measured: 0
        assert (back[2] - W[2]).abs().max() < 0.1  # measured: 0.03


def test_more_dimensions_are_more_rows():
    W = gaussian(2, 3, 16)
    codes, scales, _ = t.quantize(W, "int6")
    flat_codes, flat_scales, _ = t.quantize(W.reshape(6, 16), "int6")
    assert torch.equal(codes.reshape(6, 16), flat_codes)
    assert torch.equal(scales.reshape(6, 1), flat_scales)


def test_least_step_coarsens_and_shrinks(h, tensors):
    W = gaussian(4, 400)
    std = W.square().mean(-1, keepdim=True).sqrt()
    errors = []
    used = []  # different codes
    for step in (0.0, 0.15, 0.3, 0.6):
        codes, scales, _ = t.quantize(W, "int6", step)
        assert (scales.float() >= step * std * 0.999).all()
        errors.append((codes * scales.float() - W).square().sum().item())
        used.append(len(codes.unique()))
    assert errors[1] < errors[2] < errors[3] and used[0] >= used[1] > used[2] > used[3]

    sizes = [len(t.pack_artifact(tensors, tiny(**SMALL, int6_step=step))) for step in (0.0, 0.3, 0.8)]
    assert sizes[0] > sizes[1] > sizes[2]


# ---------------------------------------------------------------- pack and unpack


def shapes_of(tensors):
    """Return {name: shape}."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def test_round_trip_error_by_kind(tensors, blob):
    out = t.unpack_artifact(blob)
    assert shapes_of(out) == shapes_of(tensors)
    assert all(tensor.dtype == torch.float32 for tensor in out.values())
    encodings = {name: encoding for name, encoding, _, _ in parse(blob).header["tensors"]}
    assert set(encodings.values()) == {"int6", "int8", "f16", "f32"}

    for name, W in tensors.items():
        encoding = encodings[name]
        if encoding == "f32":
            assert torch.equal(out[name], W), name
        elif encoding == "f16":
            assert torch.equal(out[name], W.half().float()), name
        else:
            codes, scales, _ = t.quantize(W, encoding)
            assert torch.equal(out[name], codes * scales.float()), name
            error = (out[name] - W).abs()
            limit = {"int6": 31, "int8": 127}[encoding]
            peak = W.abs().amax(-1, keepdim=True)
            is_inside = W.abs() <= limit * scales.float()
            half_step = (peak / limit * 0.51).expand_as(W)
            assert (error[is_inside] <= half_step[is_inside] + 1e-7).all(), name
            # The deepest clip is 0.6; measured: 0.016 of the peak.
            assert (error <= 0.41 * peak + 1e-7).all(), name


def strided_parameter(tensor):
    """Return an equal tensor with other strides that requires gradients; a vector as it is."""
    if tensor.dim() == 1:
        return tensor
    return torch.nn.Parameter(tensor.clone().mT.contiguous().mT)


def test_same_tensors_same_bytes(h, tensors, blob):
    assert t.pack_artifact(tensors, h) == blob
    assert t.pack_artifact(dict(reversed(tensors.items())), h) == blob
    copies = {name: strided_parameter(tensor) for name, tensor in tensors.items()}
    assert t.pack_artifact(copies, h) == blob  # strides and gradients do not count
    assert t.pack_artifact(tensors, tiny(**SMALL, seed=5, matrix_lr=0.5, out_dir="elsewhere")) == blob
    changed = dict(tensors, ve_scale=tensors["ve_scale"] + 1e-3)
    assert t.pack_artifact(changed, h) != blob


def test_packing_unpacked_tensors_again_changes_little(h, blob):
    """The second time differs from the first by no more than the rounding of the scales."""
    first = t.unpack_artifact(blob)
    second = t.unpack_artifact(t.pack_artifact(first, h))
    for name, tensor in first.items():
        assert (second[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max(), name  # measured: 0


class Parsed(NamedTuple):
    """An artifact's parts, read by the description of the layout."""

    header: dict
    payload: bytes
    header_text: bytes


def parse(blob):
    """Read an artifact by the description of its layout, without the trainer."""
    raw = lzma.decompress(blob, format=lzma.FORMAT_XZ)
    assert raw[:4] == b"GPT6"
    end = 8 + struct.unpack("<I", raw[4:8])[0]
    return Parsed(json.loads(raw[8:end]), raw[end:], raw[8:end])


def test_layout_is_the_documented_one(h, tensors, blob):
    header, payload, header_text = parse(blob)
    assert header_text == json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    assert header["config"] == {key: getattr(h, key) for key in t.STORED_KNOBS}
    rows = {name: (encoding, shape, offset) for name, encoding, shape, offset in header["tensors"]}
    assert [row[0] for row in header["tensors"]] == sorted(tensors)

    ends = [offset for _, _, offset in rows.values()][1:] + [len(payload)]
    for (encoding, shape, offset), end in zip(rows.values(), ends):
        values = math.prod(shape)
        scale_bytes = 2 * math.prod(shape[:-1])
        sizes = {
            "int6": values + scale_bytes,
            "int8": values + scale_bytes,
            "f16": 2 * values,
            "f32": 4 * values,
        }
        assert end - offset == sizes[encoding]

    _, shape, offset = rows["qo_bank"]
    count = math.prod(shape)
    num_rows = math.prod(shape[:-1])
    codes = np.frombuffer(payload, np.int8, count, offset).reshape(num_rows, shape[-1])
    scales = np.frombuffer(payload, "<f2", num_rows, offset + count)
    expected = codes * scales.astype(np.float32)[:, None]
    assert np.array_equal(expected.reshape(shape), t.unpack_artifact(blob)["qo_bank"].numpy())


def test_the_header_is_enough_to_build_the_model(blob):
    config = t.open_artifact(blob)[0]["config"]
    batch = dict(train_seq_len=16, train_batch_tokens=64, micro_batch_tokens=64, eval_batch_tokens=64)
    model = t.GPT(t.make_config(batch, config))
    assert shapes_of(parameters_of(model)) == shapes_of(t.unpack_artifact(blob))


EXTRA = dict(
    loop_layers="0 1",
    loop_times=2,
    skip_gates=True,
    norm_gains=True,
    attn_gate_dims=3,
    parallel_last_n=1,
    parallel_form="two_streams",
)


def test_an_extra_knob_is_stored_where_it_is_not_the_default():
    """So a model without such parts has the bytes that it had before there was a knob for them."""
    h = tiny(**SMALL | EXTRA)
    tensors = parameters_of(noisy_model(h))
    blob = t.pack_artifact(tensors, h)
    config = t.open_artifact(blob)[0]["config"]
    assert set(config) == {*t.STORED_KNOBS, *EXTRA}
    assert {key: config[key] for key in EXTRA} == EXTRA
    assert shapes_of(t.unpack_artifact(blob)) == shapes_of(tensors)

    one = dict(loop_layers="1", loop_times=1)
    config = t.open_artifact(t.pack_artifact(tensors, tiny(**SMALL | one)))[0]["config"]
    assert set(config) == {*t.STORED_KNOBS, *one}


@pytest.mark.parametrize("key,value", [("loop_times", "2"), ("skip_gates", 1), ("loops", 2)])
def test_an_extra_knob_of_another_type_or_name_is_refused(key, value):
    header = {"config": {key: getattr(t.Config, key) for key in t.STORED_KNOBS}, "tensors": []}
    t.check_header(header)
    header["config"][key] = value
    with pytest.raises(ValueError, match=f"config key '{key}' is .*; use the script that wrote it"):
        t.check_header(header)


@pytest.mark.parametrize("key", t.STORED_KNOBS)
def test_a_header_holds_every_stored_knob(key):
    """So an artifact means the same model whatever the defaults become."""
    config = {other: getattr(t.Config, other) for other in t.STORED_KNOBS if other != key}
    with pytest.raises(ValueError, match=f"config key '{key}' is missing, .*; use the script that wrote it"):
        t.check_header({"config": config, "tensors": []})


# ---------------------------------------------------------------- damage


def test_truncation_is_a_value_error(blob):
    some = range(20, len(blob), max(1, len(blob) // 60))
    for size in [0, 1, 5, 6, 11, 12, 13, *some, len(blob) - 1]:
        with pytest.raises(ValueError):
            t.unpack_artifact(blob[:size])


def test_appended_bytes_are_a_value_error(blob):
    for tail in (b"\0", b"\0" * 4, b"x" * 50, blob):
        with pytest.raises(ValueError):
            t.unpack_artifact(blob + tail)


def with_flipped_bit(blob, at, rng):
    """Return the bytes with one random bit of the byte at `at` flipped."""
    damaged = bytearray(blob)
    damaged[at] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def test_flipped_bits_are_a_value_error(blob):
    """No other exception is raised, and no different model is read without one."""
    whole = t.unpack_artifact(blob)
    rng = np.random.default_rng(0)
    positions = [*range(30), *range(len(blob) - 40, len(blob)), *rng.integers(0, len(blob), 250)]
    unnoticed = 0
    for at in positions:
        try:
            out = t.unpack_artifact(with_flipped_bit(blob, at, rng))
        except ValueError:
            continue
        unnoticed += 1
        assert all(torch.equal(out[name], whole[name]) for name in whole), at
    assert unnoticed <= len(positions) // 10


def test_flipped_bits_before_compression_are_a_value_error_or_another_value(blob):
    """Damage below xz's checksum is left to the checks of the layout."""
    raw = lzma.decompress(blob)
    header_end = 8 + struct.unpack("<I", raw[4:8])[0]
    rng = np.random.default_rng(1)
    for at in [*range(8), *rng.integers(8, header_end, 300)]:
        damaged = with_flipped_bit(raw, at, rng)
        try:
            out = t.unpack_artifact(lzma.compress(damaged, preset=0))
        except ValueError:
            continue
        assert at >= 8 and all(torch.is_tensor(tensor) for tensor in out.values())


def rebuilt(blob, change):
    """Return an artifact with another header: the one that change(header) returns, or else has edited."""
    header, payload, _ = parse(blob)
    header = change(header) or header
    text = json.dumps(header).encode()
    return lzma.compress(b"GPT6" + struct.pack("<I", len(text)) + text + payload)


def set_top(key, value):
    """Return a change of a header: set a key of the top level."""

    def change(header):
        header[key] = value

    return change


def set_entry(column, value):
    """Return a change of a header: set a column of the first tensor's entry."""

    def change(header):
        header["tensors"][0][column] = value

    return change


def replace_by(value):
    """Return a change of a header: put something else in its place."""

    def change(header):
        return value

    return change


def drop_config(header):
    del header["config"]


def drop_config_key(header):
    del header["config"]["bos_id"]


def add_config_key(header):
    header["config"]["extra"] = 1


def repeat_name(header):
    header["tensors"][0][0] = header["tensors"][1][0]


def drop_last_entry(header):
    header["tensors"].pop()


def reverse_entries(header):
    header["tensors"].reverse()


def repeat_entry(header):
    header["tensors"].append(header["tensors"][0])


def lengthen_entry(header):
    header["tensors"][0].append(1)


NAME, ENCODING, SHAPE, OFFSET = range(4)  # columns of an entry

BAD_HEADERS = {
    "tensors is a number": set_top("tensors", 5),
    "tensors is null": set_top("tensors", None),
    "tensors is an object": set_top("tensors", {"a": 1}),
    "entry is a number": set_top("tensors", [5]),
    "entry is empty": set_top("tensors", [[]]),
    "tensors is a string": set_top("tensors", "ab"),
    "config is a number": set_top("config", 5),
    "config is a list": set_top("config", []),
    "config lacks a key": drop_config_key,
    "config has a key too many": add_config_key,
    "header has a key too many": set_top("extra", 1),
    "header lacks config": drop_config,
    "header is a list": replace_by([1, 2]),
    "header is a string": replace_by("text"),
    "header is a number": replace_by(7),
    "name is a number": set_entry(NAME, 5),
    "name is null": set_entry(NAME, None),
    "name is a list": set_entry(NAME, ["a"]),
    "name of another tensor": repeat_name,
    "encoding is unknown": set_entry(ENCODING, "int4"),
    "encoding is a list": set_entry(ENCODING, ["int6"]),
    "encoding is an object": set_entry(ENCODING, {}),
    "shape is empty": set_entry(SHAPE, []),
    "shape is a number": set_entry(SHAPE, 5),
    "size is negative": set_entry(SHAPE, [-1, 4]),
    "size is zero": set_entry(SHAPE, [0]),
    "size is a fraction": set_entry(SHAPE, [1.5]),
    "size is true": set_entry(SHAPE, [True]),
    "sizes are huge": set_entry(SHAPE, [1 << 27] * 9),
    "size is a string": set_entry(SHAPE, ["a"]),
    "shape is an object": set_entry(SHAPE, {"a": 1}),
    "offset is not the first": set_entry(OFFSET, 1),
    "offset is negative": set_entry(OFFSET, -1),
    "offset is null": set_entry(OFFSET, None),
    "offset is a string": set_entry(OFFSET, "0"),
    "last entry is missing": drop_last_entry,
    "entries are reversed": reverse_entries,
    "entry is repeated": repeat_entry,
    "entry is too long": lengthen_entry,
}


@pytest.mark.parametrize("change", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_a_header_of_another_shape_is_a_value_error(blob, change):
    t.unpack_artifact(rebuilt(blob, replace_by(None)))  # rebuilding alone does no harm
    with pytest.raises(ValueError):
        t.unpack_artifact(rebuilt(blob, change))


def test_other_containers_are_a_value_error(blob):
    raw = lzma.decompress(blob)
    payload = parse(blob).payload
    not_xz = (b"", b"GPT6", raw, lzma.compress(raw, format=lzma.FORMAT_ALONE))
    other_contents = (
        b"",
        b"GPT6",
        b"GPT5" + raw[4:],
        raw[:100],
        b"GPT6\xff\xff\xff\xff" + raw[8:],
        raw + b"\0",
        raw[:-1],
        b"GPT6\0\0\0\0" + raw[8:],
        b"GPT6" + struct.pack("<I", 3) + b"\xff\xfe{" + payload,
        b"GPT6" + struct.pack("<I", 100_000) + b"[" * 100_000,
    )
    for bad in (*not_xz, *map(lzma.compress, other_contents)):
        with pytest.raises(ValueError):
            t.unpack_artifact(bad)


# ---------------------------------------------------------------- the cap


def fitted(tensors, h, room):
    """Return what fit_artifact returns, and the phases it had timed."""
    phases = set()

    def time_phase(phase, fn, *args):
        phases.add(phase)
        return fn(*args)

    return t.fit_artifact(tensors, h, room, time_phase), phases


def test_fit_raises_the_step_only_as_far_as_needed():
    knobs = SMALL | dict(model_dim=64, mlp_mult=8.0)  # int6 banks outweigh the rest, as in a real model
    h = tiny(**knobs)
    tensors = parameters_of(noisy_model(h, scale=0.2))
    loose, phases = fitted(tensors, h, 10**9)
    assert loose.blob == t.pack_artifact(tensors, h)
    assert loose.int6_step == h.int6_step == 0.0
    assert phases == {"quantize", "compress"}

    sizes = {
        step: len(t.pack_artifact(tensors, tiny(**knobs, int6_step=step))) for step in (0.0, 0.2, 0.4, 0.8)
    }
    for room in (sizes[0.0] - 1, sizes[0.2], sizes[0.4] + 5, sizes[0.8]):
        (blob, step), _ = fitted(tensors, h, room)
        assert 0.98 * room <= len(blob) <= room, (room, len(blob), sizes)
        assert blob == t.pack_artifact(tensors, tiny(**knobs, int6_step=step))


def test_fit_tells_how_many_attempts_are_over(h, tensors):
    """Before each further attempt, so that long packing has a line; one that fits at once tells nothing."""
    told = []
    untimed = lambda phase, fn, *args: fn(*args)  # noqa: E731
    t.fit_artifact(tensors, h, 10**9, untimed, tell=lambda *counts: told.append(counts))
    assert told == []
    t.fit_artifact(tensors, h, 10, untimed, tell=lambda *counts: told.append(counts))
    assert told == [(done, t.ATTEMPTS) for done in range(1, len(told) + 1)] and told


def test_fit_never_goes_below_the_configured_step(tensors):
    h = tiny(**SMALL, int6_step=0.5)
    (blob, step), _ = fitted(tensors, h, 10**9)
    assert step == 0.5 and blob == t.pack_artifact(tensors, h)


def test_fit_returns_an_artifact_over_the_cap_when_none_fits(h, tensors):
    for room in (10, -5):
        (blob, step), _ = fitted(tensors, h, room)
        assert len(blob) > room and step == 1.0  # the coarsest step, and still an artifact
        assert t.unpack_artifact(blob).keys() == tensors.keys()

    fixed = tiny(**SMALL, fit_cap="false")
    (blob, step), _ = fitted(tensors, fixed, 10)
    assert step == 0.0 and blob == t.pack_artifact(tensors, fixed)


# ---------------------------------------------------------------- values that cannot be stored


@pytest.mark.parametrize("name,value", [("qo_bank", 2.1e6), ("tok_emb", 8.4e6), ("smear_gate", 7e4)])
@pytest.mark.parametrize("bad", ["large", math.nan, math.inf])
def test_weights_that_a_kind_cannot_hold_are_refused_by_name(name, value, bad):
    """The scale of an int6 row above 31 * 65504 = 2.03e6 is infinite in float16."""
    model = noisy_model(tiny())
    tensors = parameters_of(model)
    tensors[name].flatten()[-1] = value if bad == "large" else bad
    with pytest.raises(t.Fault, match=f"artifact: tensor {name} has weights up to ") as e:
        t.raw_artifact(tensors, model.h)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name,value", [("qo_bank", 2.0e6), ("tok_emb", 8.3e6)])
def test_the_largest_weights_come_back(name, value):
    model = noisy_model(tiny())
    tensors = parameters_of(model)
    tensors[name].flatten()[-1] = value
    back = t.unpack_artifact(t.pack_artifact(tensors, model.h))
    assert back[name].flatten()[-1].item() == pytest.approx(value, rel=0.001)  # measured: 1.6e-4


@pytest.mark.parametrize("name", ["qo_bank", "tok_emb", "q_gain", "smear_gate"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_and_scales_that_are_not_finite_are_refused_by_name(name, bad, h, tensors, tmp_path, capsys):
    """In a file that is otherwise right, the last value or scale of a tensor is replaced."""
    raw = t.raw_artifact(tensors, h)
    end = 8 + int.from_bytes(raw[4:8], "little")
    following = [row[3] for row in json.loads(raw[8:end])["tensors"] if row[0] > name]
    after = end + (min(following) if following else len(raw) - end)
    number = struct.pack("<f" if t.STORED_AS[name] == "f32" else "<e", bad)
    blob = t.pack_xz(raw[: after - len(number)] + number + raw[after:])
    with pytest.raises(ValueError, match=f"tensor '{name}' has values that are not finite"):
        t.unpack_artifact(blob)
    (tmp_path / "bad.xz").write_bytes(blob)
    err = stop_one_line(["eval", str(tmp_path / "bad.xz"), f"out_dir={tmp_path}/logs"], capsys)
    assert "bad.xz: " in err
    assert name in err
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("kind", ["pipe", "folder", "endless"])
def test_an_artifact_that_is_no_file_is_one_line(kind, tmp_path, capsys):
    """Reading a pipe or a device might never end."""
    path = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    err = stop_one_line(["eval", str(path), "data_path=nowhere"], capsys)
    assert f"{path}: cannot read the artifact (not a file); name a file that train wrote" in err
