"""Damaged and hostile artifacts against the reader: python tests/fuzz_artifact.py [CASES] [SEED]

The claim: for any bytes, unpack_artifact returns float32 tensors by name or raises ValueError with a one-line
reason; never another exception, never code that runs, in less than SECONDS and with less than MEMORY bytes.
Prints mutation x outcome; exit status 1 when the claim fails, with the first offenders.
"""

import collections
import gzip
import io
import json
import lzma
import math
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]

import torch  # noqa: E402

import train_gpt as t  # noqa: E402

SECONDS, MEMORY = 5.0, 1_600_000_000
SMALL = dict(
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


class Violation(AssertionError):
    """The reader broke its claim; the message says how."""


def clock():
    """Seconds of this process: on a busy machine the wall's go to others, so the lesser of both passes counts."""
    return time.perf_counter(), time.process_time()


def since(start):
    return min(now - then for now, then in zip(clock(), start))


def outcome(blob):
    """("read" | "refused", reason) of the reader, or Violation."""
    start = clock()
    try:
        tensors, verdict = t.unpack_artifact(blob), ("read", "")
        good = type(tensors) is dict and all(
            type(k) is str and isinstance(v, torch.Tensor) and v.dtype == torch.float32
            for k, v in tensors.items()
        )
        if not good:
            raise Violation("returned something else than float32 tensors by name")
    except ValueError as e:
        reason = str(e)
        if (
            type(e) is not ValueError
            or not reason.startswith("artifact: ")
            or "\n" in reason
            or len(reason) > 300
        ):
            raise Violation(f"{type(e).__name__}, not one line of reason: {reason[:120]!r}") from None
        verdict = ("refused", reason)
    except Violation:
        raise
    except BaseException as e:
        raise Violation(f"{type(e).__name__}: {str(e)[:120]}") from None
    if since(start) > SECONDS:
        raise Violation(f"took {since(start):.1f} s")
    return verdict


# ---------------------------------------------------------------- a sound artifact and its parts


def small_artifact(**knobs):
    """Blob, raw bytes, header and payload of a model of a few kilobytes."""
    h = t.load_config([f"{k}={v}" for k, v in (SMALL | knobs).items()], {})
    generator = torch.Generator().manual_seed(0)
    params = {
        k: v.detach() + 0.1 * torch.randn(v.shape, generator=generator)
        for k, v in t.GPT(h).named_parameters()
    }
    blob = t.pack_artifact(params, h)
    header, payload = t.open_artifact(blob)
    return SimpleNamespace(h=h, blob=blob, raw=lzma.decompress(blob), header=header, payload=payload)


def compress(raw):
    return lzma.compress(raw, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, preset=0)


def container(text, payload, length=None, magic=None):
    """The parts as an artifact; `length` lies about the header's."""
    text = text if isinstance(text, bytes) else text.encode()
    size = struct.pack("<I", len(text) if length is None else length)
    return compress(b"".join([t.MAGIC if magic is None else magic, size, text, payload]))


def with_header(base, header, payload=None):
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    return container(text, base.payload if payload is None else payload)


def copied(header):
    return json.loads(json.dumps(header))


# ---------------------------------------------------------------- mutations: (rng, base) -> blob

ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    0.0,
    -0.0,
    1.5,
    2**28,
    2**31,
    2**63,
    2**64,
    10**400,
    -(10**30),
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "1",
    "x" * 5000,
    "\x00",
    "\ud800",
    "a\nb",
    [],
    [[]],
    {},
    {"a": 1},
    [1, 2],
]


def truncate(rng, base):
    return base.blob[: rng.randrange(len(base.blob))]


def flip_bits(rng, base):
    blob = bytearray(base.blob)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
    return bytes(blob)


def splice(rng, base):
    """A piece cut out, moved, repeated or replaced by noise."""
    blob, a, b = base.blob, *sorted(rng.randrange(len(base.blob)) for _ in range(2))
    at = rng.randrange(len(blob))
    noise = rng.randbytes(rng.randrange(1, 64))
    return rng.choice(
        (
            blob[:a] + blob[b:],
            blob[:at] + blob[a:b] + blob[at:],
            blob[:a] + noise + blob[b:],
            blob[:at] + noise + blob[at:],
        )
    )


def raw_bits(rng, base):
    """Flips below the compression, so that no checksum sees them; mostly in the header."""
    raw = bytearray(base.raw)
    reach = len(raw) - len(base.payload) if rng.random() < 0.8 else len(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        raw[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return compress(bytes(raw))


def raw_cut(rng, base):
    return compress(base.raw[: rng.randrange(len(base.raw))])


def raw_splice(rng, base):
    return compress(splice(rng, SimpleNamespace(blob=base.raw)))


def header_length(rng, base):
    length = rng.choice((0, 1, len(base.raw), 2**31, 2**32 - 1, rng.randrange(2 * len(base.raw))))
    return compress(base.raw[:4] + struct.pack("<I", length) + base.raw[8:])


def edit_tensor_field(rng, base):
    """One field of one tensor's entry replaced by something odd."""
    header = copied(base.header)
    row = rng.choice(header["tensors"])
    field = rng.randrange(4)
    if field == 2 and rng.random() < 0.7:
        row[2][rng.randrange(len(row[2]))] = rng.choice(ODD)
    elif field == 3 and rng.random() < 0.5:
        row[3] = rng.choice((float(row[3]), bool(row[3]), row[3] + 1, -row[3], str(row[3]), row[3] + 2**32))
    else:
        row[field] = rng.choice(ODD)
    return with_header(base, header)


def edit_shape(rng, base):
    """Shapes that are huge, empty, deep, or of the same size in another form."""
    header = copied(base.header)
    row = rng.choice(header["tensors"])
    row[2] = rng.choice(
        (
            [],
            [1] * rng.choice((10, 64, 65, 5000)) + row[2],
            [math.prod(row[2])],
            row[2][::-1],
            [2**27] * 3,
            [2**28 - 1],
            [2**14] * 30,
            row[2] + [0],
            [0],
            [-1],
            [-n for n in row[2]],
            [float(n) for n in row[2]],
            [str(n) for n in row[2]],
            {str(i): n for i, n in enumerate(row[2])},
            "88",
            row[2] + [1],
            [2] * 40,
        )
    )
    return with_header(base, header)


def edit_index(rng, base):
    """Entries repeated, dropped, swapped, renamed, of another length or no entries."""
    header = copied(base.header)
    rows = header["tensors"]
    i, j = rng.randrange(len(rows)), rng.randrange(len(rows))
    what = rng.randrange(8)
    if what == 0:
        rows.append(list(rows[i]))
    elif what == 1:
        del rows[i]
    elif what == 2:
        rows[i], rows[j] = rows[j], rows[i]
    elif what == 3:
        rows[i][0] = rows[j][0]
    elif what == 4:
        rows[i][1] = rng.choice(("int6", "int8", "f16", "f32", "int4", "f64", "INT6", ""))
    elif what == 5:
        rows[i] = rng.choice(
            ([], rows[i][:3], [*rows[i], 0], "name", 7, None, {"name": 1}, [[[[]]]] * 4, "abcd")
        )
    elif what == 6:
        header["tensors"] = rng.choice([*ODD, header["tensors"][:1], {"a": 1}])
    else:
        rows.insert(rng.randrange(len(rows)), ["more", "f32", [1], rows[i][3]])
    return with_header(base, header)


def edit_config(rng, base):
    """A config of another type, value, or with other keys."""
    header = copied(base.header)
    config, key = header["config"], rng.choice(sorted(header["config"]))
    what = rng.randrange(6)
    if what == 0:
        config[key] = rng.choice(ODD)
    elif what == 1:
        del config[key]
    elif what == 2:
        config[rng.choice(("more", "seed", "data_path", "", "\ud800"))] = rng.choice(ODD)
    elif what == 3:
        header["config"] = rng.choice(
            [*ODD, sorted(config), " ".join(sorted(config)), [[k, v] for k, v in config.items()]]
        )
    elif what == 4:
        config[key] = -config[key] if rng.random() < 0.5 else config[key] * 10 ** rng.randrange(1, 300)
    else:
        header[rng.choice(("more", "version", ""))] = rng.choice(ODD)
    return with_header(base, header)


def edit_top(rng, base):
    """A header that is no object of two keys, or is no JSON."""
    text = json.dumps(base.header)
    odd = rng.choice(ODD)
    return container(
        rng.choice(
            (
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
        ),
        base.payload,
    )


def nest(rng, base):
    """Brackets within brackets, as the header, a value, an entry or a field of it, and left open."""
    depth = rng.choice((10, 100, rng.randrange(300, 1100), 10_000, 100_000))
    kind = rng.choice(("[]", "{}"))
    deep = "[" * depth + "]" * depth if kind == "[]" else '{"a":' * depth + "1" + "}" * depth
    deep = deep[: len(deep) // 2] if rng.random() < 0.2 else deep
    place = rng.randrange(5)
    if place == 0:
        return container(deep, base.payload)
    header = copied(base.header)
    if place == 1:
        header["config"][rng.choice(sorted(header["config"]))] = "@"
    elif place == 2:
        header["tensors"].insert(0, "@")
    elif place == 3:
        rng.choice(header["tensors"])[rng.randrange(4)] = "@"
    else:
        header["config"] = "@"
    return container(json.dumps(header).replace('"@"', deep), base.payload)


def payload_length(rng, base):
    """More or less payload than the index says."""
    payload, more = base.payload, rng.randrange(1, 200)
    payload = rng.choice((payload + b"\0" * more, payload[:-more], b"", payload * 2, payload[more:]))
    return with_header(base, base.header, payload)


def spans(base):
    """(kind, first byte, count of values) of each tensor in the payload."""
    return [(kind, at, math.prod(shape)) for _, kind, shape, at in base.header["tensors"]]


def odd_values(rng, base):
    """Any bytes are floats, NaN and infinities too; codes are kept to their limit in half of the cases."""
    payload = bytearray(rng.randbytes(len(base.payload)))
    if rng.random() < 0.5:
        for kind, at, count in spans(base):
            limit = t.CODE_LIMIT.get(kind)
            if limit:
                codes = [rng.randint(-limit, limit) for _ in range(count)]
                payload[at : at + count] = struct.pack(f"{count}b", *codes)
    return with_header(base, base.header, bytes(payload))


def around(rng, base):
    """Bytes before and after, further streams, stream padding."""
    noise = rng.randbytes(rng.randrange(1, 100))
    return rng.choice(
        (
            base.blob + noise,
            noise + base.blob,
            base.blob * 2,
            base.blob + b"\0" * 4,
            b"\0" * 4 + base.blob,
            base.blob + lzma.compress(b""),
            lzma.compress(b"") + base.blob,
            lzma.compress(base.blob),
        )
    )


class Payload:
    """Unpickled, it writes the file that MARK names."""

    def __reduce__(self):
        return (os.putenv, ("FUZZ_ARTIFACT_MARK", "1")) if MARK is None else (open, (MARK, "w"))


MARK = None  # set by who looks whether the payload ran


def other_formats(rng, base):
    """Not xz at all, or xz around something else; the pickle has an effect that must not happen."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as z:
        z.writestr("data.pkl", pickle.dumps(Payload()))
    saved = io.BytesIO()
    torch.save({"tok_emb": torch.zeros(2)}, saved)
    evil = pickle.dumps(Payload(), protocol=rng.randrange(5))
    return rng.choice(
        (
            b"",
            b"\0",
            b"\xfd7zXZ\0",
            lzma.compress(base.raw, format=lzma.FORMAT_ALONE),
            zlib.compress(base.raw),
            gzip.compress(base.raw),
            base.raw,
            held.getvalue(),
            evil,
            lzma.compress(evil),
            compress(t.MAGIC + evil),
            container(evil, b""),
            container(b"(" + evil, base.payload),
            saved.getvalue(),
            lzma.compress(saved.getvalue()),
            compress(b""),
            compress(b"GPT"),
            compress(b"GPT6"),
            compress(b"GPT6\0\0\0"),
            compress(b"GPT5" + base.raw[4:]),
            b"<html>Not found</html>",
            b"version https://git-lfs.github.com/spec/v1\n",
        )
    )


def xz_fields(rng, base):
    """Another check, filter or dictionary in the xz container, or another number of blocks."""
    raw = base.raw
    filters = [
        {"id": lzma.FILTER_DELTA, "dist": rng.randrange(1, 256)},
        {"id": lzma.FILTER_LZMA2, "preset": 0},
    ]
    return rng.choice(
        (
            lambda: lzma.compress(raw, check=lzma.CHECK_NONE),
            lambda: lzma.compress(raw, check=lzma.CHECK_SHA256),
            lambda: lzma.compress(raw, check=lzma.CHECK_CRC64, filters=filters),
            lambda: blocks((raw[:100], 1), (raw[100:], 1)),
            lambda: blocks(*((raw[i : i + 1], 1) for i in range(99)), (raw[99:], 1)),
            lambda: dictionary(base.blob, rng.randrange(64)),
        )
    )()


MUTATIONS = {
    f.__name__: f
    for f in (
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


# ---------------------------------------------------------------- xz streams of hand-made blocks


def varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def one_block(raw):
    """The block of a one-block stream (its bytes, its unpadded size)."""
    stream = compress(raw)
    index = (struct.unpack("<I", stream[-8:-4])[0] + 1) * 4
    block = stream[12 : len(stream) - 12 - index]
    header = stream[-12 - index :]
    unpadded, shift = 0, 0
    for byte in header[2:]:
        unpadded |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    return block, unpadded


def blocks(*parts):
    """An xz stream of blocks, each part (bytes, how often). Never holds what it unpacks to."""
    made = [(*one_block(raw), len(raw), copies) for raw, copies in parts]
    body = b"".join(block * copies for block, _, _, copies in made)
    records = b"".join((varint(unpadded) + varint(size)) * copies for _, unpadded, size, copies in made)
    index = b"\0" + varint(sum(copies for *_, copies in made)) + records
    index += b"\0" * (-len(index) % 4)
    index += struct.pack("<I", zlib.crc32(index))
    foot = struct.pack("<I", len(index) // 4 - 1) + b"\0\1"
    return compress(b"x")[:12] + body + index + struct.pack("<I", zlib.crc32(foot)) + foot + b"YZ"


def dictionary(blob, size):
    """The stream with another dictionary size in its first block: 40 is 4 GiB, above that is reserved."""
    head = bytearray(blob)
    length = (head[12] + 1) * 4
    at = bytes(head[12 : 12 + length]).index(b"\x21\x01", 2) + 12
    head[at + 2] = size
    head[12 + length - 4 : 12 + length] = struct.pack("<I", zlib.crc32(bytes(head[12 : 12 + length - 4])))
    return bytes(head)


# ---------------------------------------------------------------- bombs: each in a process of its own

MIB = 1 << 20


def lead(text, size):
    """Magic, length and beginning of a header of `size` bytes."""
    return t.MAGIC + struct.pack("<I", size) + text.encode()


def filled(base, start, unit, end, tensors=False):
    """An artifact whose header is `start`, 255 MiB of `unit`, `end`; with a sound config if `tensors`."""
    unit = unit * (MIB // len(unit))
    start = '{"config":' + (json.dumps(base.header["config"]) + ',"tensors":' if tensors else "") + start
    first = lead(start, len(start) + 255 * len(unit) + len(end))
    return blocks((first, 1), (unit.encode(), 255), (end.encode(), 1))


def big_tensor(base, kind, width):
    """As large as the format allows, and sound: one tensor of zeros."""
    index = [["a", kind, [1, 250 * MIB // width], 0]]
    text = json.dumps({"config": base.header["config"], "tensors": index})
    scale = [(bytes(2), 1)] if kind in t.CODE_LIMIT else []
    return blocks((lead(text, len(text)), 1), (bytes(MIB), 250), *scale)


BOMBS = {
    "1 GiB of zeros": lambda base: blocks((bytes(MIB), 1024)),
    "64 GiB of zeros": lambda base: blocks((bytes(16 * MIB), 4096)),
    "1 GiB behind a sound start": lambda base: blocks((base.raw, 1), (bytes(MIB), 1024)),
    "streams of zeros": lambda base: compress(bytes(MIB)) * 1024,
    "a dictionary of 4 GiB": lambda base: dictionary(base.blob, 40),
    "a header of empty lists": lambda base: filled(base, "[", "[],", "[]]}", True),
    "a header of numbers": lambda base: filled(base, "[", "1.5,", "0]}", True),
    "a header of keys": lambda base: filled(base, '{"a":{"', 'b":1,"', 'c":2}}}'),
    "a header of one name": lambda base: filled(base, '"', "abcd", '"}'),
    "a header of one number": lambda base: filled(base, "1", "1234", "}"),
    "a header of one fraction": lambda base: filled(base, "0.", "1234", "}"),
    "a header of brackets": lambda base: filled(base, "[", "[[[[", "}"),
    "a header of spaces": lambda base: filled(base, "[", "    ", "]}"),
    "a shape of ones": lambda base: filled(base, '[["a","f32",[', "1,1,", "1],0]]}", True),
    "the largest int8 tensor": lambda base: big_tensor(base, "int8", 1),
    "the largest f16 tensor": lambda base: big_tensor(base, "f16", 2),
}


def peak():
    """This process's largest resident size so far, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def bomb_report(name):
    """In this process: build, read, and say how it went. More than 6 GB more memory than now is refused."""
    blob = BOMBS[name](small_artifact())
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as f:
            limit = int(f.read().split()[0]) * resource.getpagesize() + 6_000_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before, start = peak(), clock()
    try:
        result, reason = outcome(blob)
    except Violation as e:
        result, reason = "VIOLATION", str(e)
    grown = peak() - before
    if grown > MEMORY:
        result, reason = "VIOLATION", f"{grown / 1e9:.1f} GB more memory; {result}: {reason}"
    return dict(
        bomb=name,
        bytes=len(blob),
        outcome=result,
        reason=reason,
        grown=grown,
        seconds=since(start),
    )


def fork_reports(names):
    """A JSON line per bomb, each from a fork that has not decompressed before."""
    for name in names:
        pid = os.fork()
        if pid == 0:
            try:
                print(json.dumps(bomb_report(name)), flush=True)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)


def bomb_reports(names=tuple(BOMBS)):
    """bomb_report of each name, from a fresh interpreter. One that died is a violation."""
    command = [sys.executable, __file__, "--bombs", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 60 * len(names))
    reports = {r["bomb"]: r for r in map(json.loads, done.stdout.splitlines())}
    lost = dict(
        bytes=0, outcome="VIOLATION", reason=f"the process ended: {done.stderr[-200:]}", grown=0, seconds=0
    )
    return [reports.get(name, dict(lost, bomb=name)) for name in names]


# ---------------------------------------------------------------- the command


def fuzz(cases, seed, progress=lambda done: None):
    """(counts[mutation][outcome], violations) of `cases` mutations, the kinds in turn."""
    base, counts, bad = small_artifact(), collections.defaultdict(collections.Counter), []
    for i in range(cases):
        name = list(MUTATIONS)[i % len(MUTATIONS)]
        blob = MUTATIONS[name](random.Random(f"{seed} {i}"), base)
        try:
            counts[name][outcome(blob)[0]] += 1
        except Violation as e:
            counts[name]["VIOLATION"] += 1
            bad.append(f"{name}, case {i}: {e}")
        progress(i + 1)
    return counts, bad


def main(argv):
    if argv[:1] == ["--bombs"]:
        fork_reports(argv[1:])
        return 0
    cases, seed = int(argv[0]) if argv else 10_000, int(argv[1]) if argv[1:] else 0
    start = time.perf_counter()

    def progress(done):
        if sys.stderr.isatty() and (done % 100 == 0 or done == cases):
            left = (time.perf_counter() - start) / done * (cases - done)
            print(
                f"\r\033[K{done:,} of {cases:,} cases, ETA {left:.0f} s", end="", file=sys.stderr, flush=True
            )

    counts, bad = fuzz(cases, seed, progress)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print(f"{'mutation':<20} {'refused':>8} {'read':>8} {'VIOLATION':>10}")
    for name, row in counts.items():
        print(f"{name:<20} {row['refused']:>8} {row['read']:>8} {row['VIOLATION']:>10}")
    print(f"{cases:,} cases in {time.perf_counter() - start:.1f} s, seed {seed}\n")
    print(f"{'bomb':<28} {'bytes':>10} {'seconds':>8} {'memory MB':>10}  outcome")
    for r in bomb_reports():
        print(
            f"{r['bomb']:<28} {r['bytes']:>10,} {r['seconds']:>8.2f} {r['grown'] / 1e6:>10.0f}  "
            f"{r['outcome']} {r['reason'][:70]}",
            flush=True,
        )
        bad += [f"bomb, {r['bomb']}: {r['reason']}"] * (r["outcome"] == "VIOLATION")
    for line in bad[:20]:
        print(f"violation: {line}")
    print(f"{len(bad)} violations")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
