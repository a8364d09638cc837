"""Damaged and hostile artifacts: a small sound one, its parts, and MUTATIONS of it.

A mutation is a function (rng, base) -> blob; `base` is a `SmallArtifact`. The same random state gives the
same blob.
"""

import gzip
import io
import json
import lzma
import math
import os
import pickle
import struct
import zipfile
import zlib
from typing import NamedTuple

import torch

import train_gpt as t
from tests.stress.xz_streams import blocks, compress, with_dictionary

SMALL = dict(
    preset="record_sp1024",  # knobs that are not given have its values
    vocab_size=16,
    num_layers=2,
    model_dim=8,
    num_heads=2,
    num_kv_heads=1,
    mlp_mult=2.0,
    rope_dims=2,
    xsa_last_n=1,
    ve_last_n=1,
    ve_dim=4,
    bigram_vocab_size=8,
    bigram_dim=4,
    train_seq_len=8,
    eval_seq_len=8,
    eval_stride=4,
    eval_batch_tokens=16,
    train_batch_tokens=16,
    micro_batch_tokens=16,
)

# Values that a JSON field should not have.
ODD = [
    *(None, True, False, 0, 1, -1, 0.0, -0.0, 1.5),
    *(2**28, 2**31, 2**63, 2**64, 10**400, -(10**30), 1e308, math.nan, math.inf, -math.inf),
    *("", "1", "x" * 5000, "\x00", "\ud800", "a\nb"),
    *([], [[]], {}, {"a": 1}, [1, 2]),
]

# Indices of the fields of a tensor's entry in the header.
NAME, ENCODING, SHAPE, OFFSET = range(4)


# ---------------------------------------------------------------- a sound artifact and its parts


class SmallArtifact(NamedTuple):
    """An artifact of a few kilobytes. raw: its bytes before compression, which end with the payload."""

    h: t.Config
    blob: bytes
    raw: bytes
    header: dict
    payload: bytes


class Span(NamedTuple):
    """Where a tensor is in the payload: its encoding, first byte and number of values."""

    encoding: str
    start: int
    count: int


def small_artifact(**knobs):
    """Return the SmallArtifact of a model with random weights. knobs: changes to SMALL."""
    h = t.load_config([f"{key}={value}" for key, value in (SMALL | knobs).items()], {})
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: parameter.detach() + 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in t.GPT(h).named_parameters()
    }
    blob = t.pack_artifact(tensors, h)
    header, payload = t.open_artifact(blob)
    raw = t.CODECS[h.codec].unpack(blob)
    return SmallArtifact(h=h, blob=blob, raw=raw, header=header, payload=payload)


def spans(base):
    """Return the Span of each tensor."""
    return [Span(encoding, start, math.prod(shape)) for _, encoding, shape, start in base.header["tensors"]]


def container(text, payload):
    """Return an artifact with any header text, str or bytes, and any payload."""
    text = text if isinstance(text, bytes) else text.encode()
    return compress(t.MAGIC + struct.pack("<I", len(text)) + text + payload)


def with_header(base, header, payload=None):
    """Return `base` as an artifact with another header object, and another payload if given."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    return container(text, base.payload if payload is None else payload)


def copy_of(header):
    """Return a deep copy of a header."""
    return json.loads(json.dumps(header))


# ---------------------------------------------------------------- damage to the bytes


def truncate(rng, base):
    """Cut off the end."""
    return base.blob[: rng.randrange(len(base.blob))]


def flip_bits(rng, base):
    """Flip bits of the compressed stream."""
    blob = bytearray(base.blob)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
    return bytes(blob)


def splice(rng, base):
    """Cut a piece out of the compressed stream, repeat it elsewhere, or put noise there."""
    return splice_bytes(rng, base.blob)


def splice_bytes(rng, blob):
    """Return `blob` with a piece cut out, repeated elsewhere or replaced by noise, or with noise added."""
    start, end = sorted(rng.randrange(len(blob)) for _ in range(2))
    at = rng.randrange(len(blob))
    noise = rng.randbytes(rng.randrange(1, 64))
    choices = (
        blob[:start] + blob[end:],
        blob[:at] + blob[start:end] + blob[at:],
        blob[:start] + noise + blob[end:],
        blob[:at] + noise + blob[at:],
    )
    return rng.choice(choices)


def raw_bits(rng, base):
    """Flip bits before compression, where no checksum sees them; mostly in the header."""
    raw = bytearray(base.raw)
    only_header = rng.random() < 0.8
    reach = len(raw) - len(base.payload) if only_header else len(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        raw[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return compress(bytes(raw))


def raw_cut(rng, base):
    """Cut off the end before compression."""
    return compress(base.raw[: rng.randrange(len(base.raw))])


def raw_splice(rng, base):
    """Splice before compression."""
    return compress(splice_bytes(rng, base.raw))


def around(rng, base):
    """Put bytes, further streams or stream padding before or after the artifact."""
    noise = rng.randbytes(rng.randrange(1, 100))
    choices = (
        base.blob + noise,
        noise + base.blob,
        base.blob * 2,
        base.blob + b"\0" * 4,
        b"\0" * 4 + base.blob,
        base.blob + lzma.compress(b""),
        lzma.compress(b"") + base.blob,
        lzma.compress(base.blob),
    )
    return rng.choice(choices)


# ---------------------------------------------------------------- damage to the header


def header_length(rng, base):
    """Give a false length of the header."""
    length = rng.choice((0, 1, len(base.raw), 2**31, 2**32 - 1, rng.randrange(2 * len(base.raw))))
    return compress(base.raw[:4] + struct.pack("<I", length) + base.raw[8:])


def edit_tensor_field(rng, base):
    """Replace one field of one tensor's entry by an odd value."""
    header = copy_of(base.header)
    entry = rng.choice(header["tensors"])
    field = rng.randrange(4)
    if field == SHAPE and rng.random() < 0.7:
        entry[SHAPE][rng.randrange(len(entry[SHAPE]))] = rng.choice(ODD)
    elif field == OFFSET and rng.random() < 0.5:
        offset = entry[OFFSET]
        choices = (float(offset), bool(offset), offset + 1, -offset, str(offset), offset + 2**32)
        entry[OFFSET] = rng.choice(choices)
    else:
        entry[field] = rng.choice(ODD)
    return with_header(base, header)


def edit_shape(rng, base):
    """Replace a shape by one that is huge, empty or deep, or by the same sizes in another form."""
    header = copy_of(base.header)
    entry = rng.choice(header["tensors"])
    shape = entry[SHAPE]
    choices = (
        [],
        [1] * rng.choice((10, 64, 65, 5000)) + shape,
        [math.prod(shape)],
        shape[::-1],
        [2**27] * 3,
        [2**28 - 1],
        [2**14] * 30,
        shape + [0],
        [0],
        [-1],
        [-size for size in shape],
        [float(size) for size in shape],
        [str(size) for size in shape],
        {str(axis): size for axis, size in enumerate(shape)},
        "88",
        shape + [1],
        [2] * 40,
    )
    entry[SHAPE] = rng.choice(choices)
    return with_header(base, header)


def edit_index(rng, base):
    """Repeat, drop, swap or rename entries, or replace one or all by something that is no entry."""
    header = copy_of(base.header)
    entries = header["tensors"]
    i = rng.randrange(len(entries))
    j = rng.randrange(len(entries))
    edits = ("repeat", "drop", "swap", "rename", "encoding", "entry", "all", "insert")
    edit = rng.choice(edits)
    if edit == "repeat":
        entries.append(list(entries[i]))
    elif edit == "drop":
        del entries[i]
    elif edit == "swap":
        entries[i], entries[j] = entries[j], entries[i]
    elif edit == "rename":
        entries[i][NAME] = entries[j][NAME]
    elif edit == "encoding":
        entries[i][ENCODING] = rng.choice(("int6", "int8", "f16", "f32", "int4", "f64", "INT6", ""))
    elif edit == "entry":
        no_entries = (
            [],
            entries[i][:3],
            [*entries[i], 0],
            "name",
            7,
            None,
            {"name": 1},
            [[[[]]]] * 4,
            "abcd",
        )
        entries[i] = rng.choice(no_entries)
    elif edit == "all":
        header["tensors"] = rng.choice([*ODD, entries[:1], {"a": 1}])
    else:
        entries.insert(rng.randrange(len(entries)), ["more", "f32", [1], entries[i][OFFSET]])
    return with_header(base, header)


def edit_config(rng, base):
    """Replace the config, or change, drop or add a key of the config or of the header."""
    header = copy_of(base.header)
    config = header["config"]
    key = rng.choice(sorted(config))
    edit = rng.choice(("odd", "drop", "add", "replace", "scale", "header"))
    if edit == "odd":
        config[key] = rng.choice(ODD)
    elif edit == "drop":
        del config[key]
    elif edit == "add":
        odd = rng.choice(ODD)
        config[rng.choice(("more", "seed", "data_path", "", "\ud800"))] = odd
    elif edit == "replace":
        keys = sorted(config)
        header["config"] = rng.choice([*ODD, keys, " ".join(keys), [list(item) for item in config.items()]])
    elif edit == "scale":
        negate = rng.random() < 0.5
        config[key] = -config[key] if negate else config[key] * 10 ** rng.randrange(1, 300)
    else:
        odd = rng.choice(ODD)
        header[rng.choice(("more", "version", ""))] = odd
    return with_header(base, header)


def edit_top(rng, base):
    """Replace the header by one that is no object of two keys, or no JSON."""
    text = json.dumps(base.header)
    odd = rng.choice(ODD)
    choices = (
        json.dumps(odd),
        json.dumps(["config", "tensors"]),
        json.dumps({"config": odd, "tensors": odd}),
        "",
        "{",
        text[:-1],
        text + "}",
        text + text,
        text.replace('"', "'"),
        "\ufeff" + text,
        text.encode("utf-16"),
        text.encode("utf-32"),
        text.encode() + b"\xff",
        b"\xff\xfe" + text.encode(),
        b"\x00" * 40,
        text.encode("cp500"),
        text.replace(":", "::", 1),
        "//" + text,
        text.replace("0", "0x0", 1),
        text.replace("[", "[,", 1),
        text.replace(",", ",,", 1),
        text.replace("8", "9" * rng.choice((100, 4300, 4301, 100_000)), 1),
        text.replace("8", "8e" + "9" * 20, 1),
        text.replace('"tok_emb"', '"\\ud83d"'),
    )
    return container(rng.choice(choices), base.payload)


def nest(rng, base):
    """Put brackets within brackets: as the header, or as a value, an entry or a field of it."""
    depth = rng.choice((10, 100, rng.randrange(300, 1100), 10_000, 100_000))
    brackets = rng.choice(("[]", "{}"))
    deep = "[" * depth + "]" * depth if brackets == "[]" else '{"a":' * depth + "1" + "}" * depth
    if rng.random() < 0.2:
        deep = deep[: len(deep) // 2]  # left open
    where = rng.choice(("header", "value", "entry", "field", "config"))
    if where == "header":
        return container(deep, base.payload)

    header = copy_of(base.header)
    mark = "@"
    if where == "value":
        header["config"][rng.choice(sorted(header["config"]))] = mark
    elif where == "entry":
        header["tensors"].insert(0, mark)
    elif where == "field":
        rng.choice(header["tensors"])[rng.randrange(4)] = mark
    else:
        header["config"] = mark
    return container(json.dumps(header).replace(f'"{mark}"', deep), base.payload)


# ---------------------------------------------------------------- damage to the payload


def payload_length(rng, base):
    """Make the payload longer or shorter than the header says."""
    payload = base.payload
    more = rng.randrange(1, 200)
    choices = (payload + b"\0" * more, payload[:-more], b"", payload * 2, payload[more:])
    return with_header(base, base.header, rng.choice(choices))


def odd_values(rng, base):
    """Fill the payload with noise, NaN included; in half of the cases only codes, within their limit."""
    payload = bytearray(rng.randbytes(len(base.payload)))
    if rng.random() < 0.5:
        payload = bytearray(base.payload)
        for encoding, start, count in spans(base):
            limit = t.ENCODINGS[encoding].limit
            if limit:
                codes = [rng.randint(-limit, limit) for _ in range(count)]
                payload[start : start + count] = struct.pack(f"{count}b", *codes)
    return with_header(base, base.header, bytes(payload))


# ---------------------------------------------------------------- other formats

MARK = None  # path of a file; a test sets it to see whether a Payload ran


class Payload:
    """An object that has an effect when it is unpickled: it creates the file MARK, if that is set."""

    def __reduce__(self):
        if MARK is None:
            return os.putenv, ("FUZZ_ARTIFACT_MARK", "1")
        return open, (MARK, "w")


def other_formats(rng, base):
    """Return something that is not xz, or xz around something else. Unpickling a Payload must not happen."""
    zip_file = io.BytesIO()
    with zipfile.ZipFile(zip_file, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Payload()))
    torch_file = io.BytesIO()
    torch.save({"tok_emb": torch.zeros(2)}, torch_file)
    pickled = pickle.dumps(Payload(), protocol=rng.randrange(5))
    choices = (
        b"",
        b"\0",
        b"\xfd7zXZ\0",
        lzma.compress(base.raw, format=lzma.FORMAT_ALONE),
        zlib.compress(base.raw),
        gzip.compress(base.raw),
        base.raw,
        zip_file.getvalue(),
        pickled,
        lzma.compress(pickled),
        compress(t.MAGIC + pickled),
        container(pickled, b""),
        container(b"(" + pickled, base.payload),
        torch_file.getvalue(),
        lzma.compress(torch_file.getvalue()),
        compress(b""),
        compress(b"GPT"),
        compress(b"GPT6"),
        compress(b"GPT6\0\0\0"),
        compress(b"GPT5" + base.raw[4:]),
        b"<html>Not found</html>",
        b"version https://git-lfs.github.com/spec/v1\n",
    )
    return rng.choice(choices)


def xz_fields(rng, base):
    """Change the check, filter or dictionary of the xz container, or its number of blocks."""
    raw = base.raw
    filters = [
        {"id": lzma.FILTER_DELTA, "dist": rng.randrange(1, 256)},
        {"id": lzma.FILTER_LZMA2, "preset": 0},
    ]
    choices = (
        lambda: lzma.compress(raw, check=lzma.CHECK_NONE),
        lambda: lzma.compress(raw, check=lzma.CHECK_SHA256),
        lambda: lzma.compress(raw, check=lzma.CHECK_CRC64, filters=filters),
        lambda: blocks((raw[:100], 1), (raw[100:], 1)),
        lambda: blocks(*((raw[i : i + 1], 1) for i in range(99)), (raw[99:], 1)),
        lambda: with_dictionary(base.blob, rng.randrange(64)),
    )
    return rng.choice(choices)()


MUTATIONS = {
    mutation.__name__: mutation
    for mutation in (
        truncate,
        flip_bits,
        splice,
        raw_bits,
        raw_cut,
        raw_splice,
        header_length,
        edit_tensor_field,
        edit_shape,
        edit_index,
        edit_config,
        edit_top,
        nest,
        payload_length,
        odd_values,
        around,
        other_formats,
        xz_fields,
    )
}
