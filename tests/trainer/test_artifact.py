"""The artifact: quantization against a search by hand, the byte layout, damage, the cap, packed code."""

import ast
import base64
import errno
import json
import lzma
import math
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

import train_gpt as t
from helpers import ROOT, noisy_model, tiny

SMALL = dict(
    num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, ve_dim=4, bigram_dim=4, bigram_vocab_size=16
)


@pytest.fixture(scope="module")
def h():
    return tiny(**SMALL)


@pytest.fixture(scope="module")
def tensors(h):
    return {k: p.detach() for k, p in noisy_model(h, scale=0.2).named_parameters()}


@pytest.fixture(scope="module")
def blob(h, tensors):
    return t.pack_artifact(tensors, h)


# ---------------------------------------------------------------- quantize


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind,limit", [("int6", 31), ("int8", 127)])
def test_quantize_takes_the_clip_of_least_squared_error(kind, limit):
    """Row by row, by trying every clip in numpy float64; rows long enough for clipping to pay in six bits."""
    W = gaussian(6, 3000) * torch.tensor([1e-3, 0.1, 1.0, 1.0, 10.0, 100.0])[:, None]
    codes, scales = t.quantize(W, kind)
    assert codes.dtype == torch.int8 and codes.shape == W.shape
    assert scales.dtype == torch.float16 and scales.shape == (6, 1)
    assert codes.abs().max() <= limit
    clipped = 0
    for row, code, scale in zip(W.double().numpy(), codes.numpy(), scales.numpy()):
        errors = []
        for clip in t.CLIPS:
            s = float(np.float16(np.abs(row).max() * clip / limit))
            errors.append(((np.clip(np.rint(row / s), -limit, limit) * s - row) ** 2).sum())
        got = ((code * float(scale[0]) - row) ** 2).sum()
        assert got <= min(errors) * (1 + 1e-4)
        clipped += int(np.argmin(errors) > 0)
    assert clipped > 0 or kind == "int8"


@pytest.mark.parametrize("kind,limit", [("int6", 31), ("int8", 127)])
def test_without_clipping_the_error_is_half_a_step(kind, limit):
    W = gaussian(4, 200).clamp(-2, 2)  # flat-topped: the full range is best
    codes, scales = t.quantize(W, kind)
    assert (
        (codes * scales.float() - W).square().sum() <= (W.abs().amax(-1) / limit / 2).square().sum() * 200
    ).all()


def test_rows_of_zeros_and_tiny_rows():
    W = torch.stack([torch.zeros(8), torch.full((8,), 1e-9), gaussian(8)])
    for kind in ("int6", "int8"):
        codes, scales = t.quantize(W, kind)
        back = codes * scales.float()
        assert torch.isfinite(scales).all() and (scales > 0).all()
        assert codes[0].abs().max() == 0 and back[1].abs().max() < 1e-7
        assert (back[2] - W[2]).abs().max() < 0.1


def test_more_dimensions_are_more_rows():
    W = gaussian(2, 3, 16)
    codes, scales = t.quantize(W, "int6")
    flat = t.quantize(W.reshape(6, 16), "int6")
    assert torch.equal(codes.reshape(6, 16), flat[0]) and torch.equal(scales.reshape(6, 1), flat[1])


def test_least_step_coarsens_and_shrinks(h, tensors):
    W = gaussian(4, 400)
    std = W.square().mean(-1, keepdim=True).sqrt()
    errors, used = [], []
    for step in (0.0, 0.15, 0.3, 0.6):
        codes, scales = t.quantize(W, "int6", step)
        assert (scales.float() >= step * std * 0.999).all()
        errors.append((codes * scales.float() - W).square().sum().item())
        used.append(len(codes.unique()))
    assert errors[1] < errors[2] < errors[3] and used[0] >= used[1] > used[2] > used[3]
    sizes = [len(t.pack_artifact(tensors, tiny(**SMALL, int6_step=s))) for s in (0.0, 0.3, 0.8)]
    assert sizes[0] > sizes[1] > sizes[2]


# ---------------------------------------------------------------- pack and unpack


def test_round_trip_error_by_kind(h, tensors, blob):
    out = t.unpack_artifact(blob)
    assert {k: v.shape for k, v in out.items()} == {k: v.shape for k, v in tensors.items()}
    assert all(v.dtype == torch.float32 for v in out.values())
    kinds = {s.name: s.kind for s in t.PARAM_TABLE}
    assert set(kinds.values()) == {"int6", "int8", "f16", "f32"}
    for name, W in tensors.items():
        error = (out[name] - W).abs()
        if kinds[name] == "f32":
            assert torch.equal(out[name], W), name
        elif kinds[name] == "f16":
            assert torch.equal(out[name], W.half().float()), name
        else:
            codes, scales = t.quantize(W, kinds[name])
            assert torch.equal(out[name], codes * scales.float()), name
            limit = {"int6": 31, "int8": 127}[kinds[name]]
            peak = W.abs().amax(-1, keepdim=True)
            inside = W.abs() <= limit * scales.float()
            assert (error[inside] <= (peak / limit * 0.51).expand_as(W)[inside] + 1e-7).all(), name
            assert (error <= 0.41 * peak + 1e-7).all(), name  # the deepest clip is 0.6


def test_same_tensors_same_bytes(h, tensors, blob):
    assert t.pack_artifact(tensors, h) == blob
    assert t.pack_artifact(dict(reversed(tensors.items())), h) == blob
    copies = {
        k: torch.nn.Parameter(v.clone().mT.contiguous().mT) if v.dim() > 1 else v for k, v in tensors.items()
    }
    assert t.pack_artifact(copies, h) == blob  # strides and gradients do not count
    assert t.pack_artifact(tensors, tiny(**SMALL, seed=5, matrix_lr=0.5, out_dir="elsewhere")) == blob
    changed = dict(tensors, ve_scale=tensors["ve_scale"] + 1e-3)
    assert t.pack_artifact(changed, h) != blob


def test_packing_what_was_unpacked_changes_little(h, blob):
    """A second generation holds the same weights to a rounding step of the scale."""
    first = t.unpack_artifact(blob)
    second = t.unpack_artifact(t.pack_artifact(first, h))
    for k, v in first.items():
        assert (second[k] - v).abs().max() <= 0.02 * v.abs().max(), k


def parse(blob):
    """The documented layout, read by its description: header and payload."""
    raw = lzma.decompress(blob, format=lzma.FORMAT_XZ)
    assert raw[:4] == b"GPT6"
    n = struct.unpack("<I", raw[4:8])[0]
    return json.loads(raw[8 : 8 + n]), raw[8 + n :], raw[8 : 8 + n]


def test_layout_is_the_documented_one(h, tensors, blob):
    header, payload, text = parse(blob)
    assert text == json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    assert header["config"] == {k: getattr(h, k) for k in t.MODEL_FIELDS}
    names = [row[0] for row in header["tensors"]]
    assert names == sorted(tensors)
    ends = [row[3] for row in header["tensors"][1:]] + [len(payload)]
    for (name, kind, shape, offset), end in zip(header["tensors"], ends):
        n, rows = math.prod(shape), math.prod(shape[:-1])
        assert end - offset == {"int6": n + 2 * rows, "int8": n + 2 * rows, "f16": 2 * n, "f32": 4 * n}[kind]
    name, kind, shape, offset = next(r for r in header["tensors"] if r[0] == "qo_bank")
    n, rows = math.prod(shape), math.prod(shape[:-1])
    codes = np.frombuffer(payload, np.int8, n, offset).reshape(rows, shape[-1])
    scales = np.frombuffer(payload, "<f2", rows, offset + n)
    values = codes * scales.astype(np.float32)[:, None]
    assert np.array_equal(values.reshape(shape), t.unpack_artifact(blob)["qo_bank"].numpy())


def test_the_header_is_enough_to_build_the_model(h, blob):
    config = t.open_artifact(blob)[0]["config"]
    rebuilt = t.GPT(t.load_config([f"{k}={v}" for k, v in (SMALL_RUN | config).items()], {}))
    assert {k: p.shape for k, p in rebuilt.named_parameters()} == {
        k: v.shape for k, v in t.unpack_artifact(blob).items()
    }


SMALL_RUN = dict(train_seq_len=16, train_batch_tokens=64, micro_batch_tokens=64, eval_batch_tokens=64)


# ---------------------------------------------------------------- damage


def test_truncation_is_a_value_error(blob):
    for n in [0, 1, 5, 6, 11, 12, 13, *range(20, len(blob), max(1, len(blob) // 60)), len(blob) - 1]:
        with pytest.raises(ValueError):
            t.unpack_artifact(blob[:n])


def test_appended_bytes_are_a_value_error(blob):
    for tail in (b"\0", b"\0" * 4, b"x" * 50, blob):
        with pytest.raises(ValueError):
            t.unpack_artifact(blob + tail)


def test_flipped_bits_are_a_value_error(blob):
    """Never another exception, and never a silently different model."""
    whole = t.unpack_artifact(blob)
    rng, silent = np.random.default_rng(0), 0
    positions = [*range(30), *range(len(blob) - 40, len(blob)), *rng.integers(0, len(blob), 250)]
    for at in positions:
        damaged = bytearray(blob)
        damaged[at] ^= 1 << int(rng.integers(8))
        try:
            out = t.unpack_artifact(bytes(damaged))
        except ValueError:
            continue
        silent += 1
        assert all(torch.equal(out[k], whole[k]) for k in whole), at
    assert silent <= len(positions) // 10


def test_flipped_bits_below_the_checksum_are_a_value_error_or_another_value(blob):
    """The same damage before compression: what the layout's own checks must catch."""
    raw = lzma.decompress(blob)
    header_end = 8 + struct.unpack("<I", raw[4:8])[0]
    rng = np.random.default_rng(1)
    for at in [*range(8), *rng.integers(8, header_end, 300)]:
        damaged = bytearray(raw)
        damaged[at] ^= 1 << int(rng.integers(8))
        try:
            out = t.unpack_artifact(lzma.compress(bytes(damaged), preset=0))
        except ValueError:
            continue
        assert at >= 8 and all(torch.is_tensor(v) for v in out.values())


def rebuilt(blob, change, payload=None):
    header, old, _ = parse(blob)
    header = change(header) or header
    text = json.dumps(header).encode()
    return lzma.compress(
        b"GPT6" + struct.pack("<I", len(text)) + text + (old if payload is None else payload)
    )


def set_row(header, column, value, row=0):
    header["tensors"][row][column] = value


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(tensors=5), lambda h: h.update(tensors=None), lambda h: h.update(tensors={"a": 1}),
        lambda h: h.update(tensors=[5]), lambda h: h.update(tensors=[[]]), lambda h: h.update(tensors="ab"),
        lambda h: h.update(config=5), lambda h: h.update(config=[]), lambda h: h["config"].pop("bos_id"),
        lambda h: h["config"].update(extra=1), lambda h: h.update(extra=1), lambda h: h.pop("config") and None,
        lambda h: [1, 2], lambda h: "text", lambda h: 7,
        lambda h: set_row(h, 0, 5), lambda h: set_row(h, 0, None), lambda h: set_row(h, 0, ["a"]),
        lambda h: set_row(h, 0, h["tensors"][1][0]),
        lambda h: set_row(h, 1, "int4"), lambda h: set_row(h, 1, ["int6"]), lambda h: set_row(h, 1, {}),
        lambda h: set_row(h, 2, []), lambda h: set_row(h, 2, 5), lambda h: set_row(h, 2, [-1, 4]),
        lambda h: set_row(h, 2, [0]), lambda h: set_row(h, 2, [1.5]), lambda h: set_row(h, 2, [True]),
        lambda h: set_row(h, 2, [1 << 27] * 9), lambda h: set_row(h, 2, ["a"]), lambda h: set_row(h, 2, {"a": 1}),
        lambda h: set_row(h, 3, 1), lambda h: set_row(h, 3, -1), lambda h: set_row(h, 3, None),
        lambda h: set_row(h, 3, "0"), lambda h: h["tensors"].pop() and None, lambda h: h["tensors"].reverse(),
        lambda h: h["tensors"].append(h["tensors"][0]), lambda h: h["tensors"][0].append(1),
    ],
)  # fmt: skip
def test_a_header_of_another_shape_is_a_value_error(blob, change):
    t.unpack_artifact(rebuilt(blob, lambda h: None))  # rebuilding alone does no harm
    with pytest.raises(ValueError):
        t.unpack_artifact(rebuilt(blob, change))


def test_other_containers_are_a_value_error(blob):
    raw = lzma.decompress(blob)
    _, payload, _ = parse(blob)
    for bad in (
        b"", b"GPT6", raw, lzma.compress(raw, format=lzma.FORMAT_ALONE), lzma.compress(b""), lzma.compress(b"GPT6"),
        lzma.compress(b"GPT5" + raw[4:]), lzma.compress(raw[:100]), lzma.compress(b"GPT6\xff\xff\xff\xff" + raw[8:]),
        lzma.compress(raw + b"\0"), lzma.compress(raw[:-1]), lzma.compress(b"GPT6\0\0\0\0" + raw[8:]),
        lzma.compress(b"GPT6" + struct.pack("<I", 3) + b"\xff\xfe{" + payload),
        lzma.compress(b"GPT6" + struct.pack("<I", 100_000) + b"[" * 100_000),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            t.unpack_artifact(bad)


# ---------------------------------------------------------------- the cap


def fitted(tensors, h, room):
    """What fit_artifact returns, and the phases that it had timed."""
    phases = set()
    timed = lambda phase, fn, *args: (phases.add(phase), fn(*args))[1]
    return *t.fit_artifact(tensors, h, room, timed), phases


def test_fit_raises_the_step_only_as_far_as_needed():
    size = SMALL | dict(model_dim=64, mlp_mult=8.0)  # six-bit banks outweigh the rest, as in a real model
    h = tiny(**size)
    tensors = {k: p.detach() for k, p in noisy_model(h, scale=0.2).named_parameters()}
    loose = fitted(tensors, h, 10**9)
    assert loose[0] == t.pack_artifact(tensors, h) and loose[1] == h.int6_step == 0.0
    assert loose[2] == {"quantize", "compress"}
    sizes = {s: len(t.pack_artifact(tensors, tiny(**size, int6_step=s))) for s in (0.0, 0.2, 0.4, 0.8)}
    for room in (sizes[0.0] - 1, sizes[0.2], sizes[0.4] + 5, sizes[0.8]):
        blob, step, _ = fitted(tensors, h, room)
        assert 0.98 * room <= len(blob) <= room, (room, len(blob), sizes)
        assert blob == t.pack_artifact(tensors, tiny(**size, int6_step=step))


def test_fit_never_goes_below_the_configured_step(tensors):
    blob, step, _ = fitted(tensors, tiny(**SMALL, int6_step=0.5), 10**9)
    assert step == 0.5 and blob == t.pack_artifact(tensors, tiny(**SMALL, int6_step=0.5))


def test_fit_reports_what_cannot_fit(h, tensors):
    for room in (10, -5):
        blob, step, _ = fitted(tensors, h, room)
        assert len(blob) > room and step == 1.0  # the best it could do, still an artifact
        assert t.unpack_artifact(blob).keys() == tensors.keys()
    fixed = tiny(**SMALL, fit_cap="false")
    blob, step, _ = fitted(tensors, fixed, 10)
    assert step == 0.0 and blob == t.pack_artifact(tensors, fixed)


# ---------------------------------------------------------------- code and files


@pytest.fixture(scope="module")
def source():
    return (ROOT / "train_gpt.py").read_text(encoding="utf-8")


def test_packed_code_is_deterministic_and_holds_the_source(source):
    packed = t.packed_code(source)
    assert packed == t.packed_code(source) and packed != t.packed_code(source + "\n")
    assert len(packed) < len(source.encode()) / 2
    assert {
        n.name for node in ast.walk(ast.parse(packed)) if isinstance(node, ast.Import) for n in node.names
    } == {"lzma", "base64"}
    text = packed.split(b"'")[1]
    raw = lzma.decompress(
        base64.b85decode(text), lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}]
    )
    assert raw.decode() == source


@pytest.mark.parametrize("name", ["simple", "module scope", "text that quotes would break"])
def test_packed_code_runs_any_program(name):
    program = {
        "simple": "print('hello')",
        "module scope": "import sys\ndef f():\n    return g()\ndef g():\n    return __name__\nprint(f())",
        "text that quotes would break": "print('é \\' \"\"\" \\\\ {x}')",
    }[name]
    run = lambda code: subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    plain, packed = run(program), run(t.packed_code(program).decode())
    assert plain.returncode == packed.returncode == 0, packed.stderr
    assert packed.stdout == plain.stdout


def test_packed_trainer_is_the_same_program(source, tmp_path):
    """`config` of the packed file prints what the source's does, knobs and presets included."""
    (tmp_path / "packed.py").write_bytes(t.packed_code(source))
    out = {}
    for name, script in (("packed", tmp_path / "packed.py"), ("source", ROOT / "train_gpt.py")):
        done = subprocess.run([sys.executable, str(script), "config", "preset=cpu", "seed=7"], capture_output=True,
                              text=True, cwd=tmp_path)  # fmt: skip
        assert done.returncode == 0, done.stderr
        out[name] = done.stdout
    assert out["packed"] == out["source"] and "seed: 7" in out["packed"]


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_write_atomic_replaces(tmp_path):
    path = tmp_path / "a.xz"
    t.write_atomic(str(path), b"old")
    t.write_atomic(str(path), b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.xz"]


class FullFile:
    """A file on a full disk: it opens and refuses the bytes."""

    def __init__(self, path, mode):
        self.file = open(path, mode)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        full()


@pytest.mark.parametrize("where", ["write", "open", "rename"])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "a.xz"
    path.write_bytes(b"old")
    if where == "rename":
        monkeypatch.setattr(t.os, "replace", full)
    else:
        monkeypatch.setattr(t, "open", full if where == "open" else FullFile, raising=False)
    with pytest.raises(t.InputError) as e:
        t.write_atomic(str(path), b"new" * 100)
    assert str(path) in str(e.value) and "No space left" in str(e.value) and "\n" not in str(e.value)
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.xz"]


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(t.InputError, match="No such file"):
        t.write_atomic(str(tmp_path / "none" / "a.xz"), b"x")
