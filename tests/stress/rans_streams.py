"""Rans artifacts taken apart and put together by the description of their layout, and RANS_MUTATIONS of one.

A mutation is a function (rng, base) -> blob, as in mutations.py; `base` is a SmallArtifact of any codec.
"""

import lzma
import struct
from functools import cache
from typing import NamedTuple

import numpy as np

import train_gpt as t
from tests.stress import mutations
from tests.stress.xz_streams import compress, crc32


class Parts(NamedTuple):
    """side: its bytes before compression; head: how many of them are magic, length and header."""

    side: bytes
    head: int
    words: bytes


def take_apart(blob):
    """Return the Parts of a rans artifact."""
    (size,) = struct.unpack("<I", blob[12:16])
    side = lzma.decompress(blob[16 : 16 + size])
    return Parts(side, 8 + struct.unpack("<I", side[4:8])[0], blob[16 + size :])


def with_checksum(rest):
    """Return bytes as a rans artifact with the checksum that is theirs."""
    return b"GPT6rans" + crc32(rest) + rest


def put_together(side, words, size=None):
    """Return a rans artifact of any side and words. size: of the side as it says, if not the truth."""
    packed = compress(side)
    return with_checksum(struct.pack("<I", len(packed) if size is None else size) + packed + words)


@cache
def packed(raw):
    """Return bytes as codec rans packs them. Every mutation of a base asks for the same."""
    return t.CODECS["rans"].pack(raw)


def rans(base):
    """Return the Parts of a base as codec rans packs it."""
    return take_apart(packed(base.raw))


class Places(NamedTuple):
    """Where parts of the first model begin in the side, and where the last of them ends."""

    rows: int
    columns: int
    tables: int
    end: int


def first_model(base, parts):
    """Return the Places of the first tensor that has codes."""
    at = parts.head
    for row in base.header["tensors"]:
        entry = t.read_entry(row)
        if entry.limit:
            columns = at + entry.scales  # a class and a scale for each row
            tables = columns + entry.count // entry.matrix[0]
            return Places(at, columns, tables, tables + 2 * t.CONTEXTS * (entry.limit + 1))
        at += entry.count * t.ENCODINGS[entry.encoding].dtype.itemsize
    raise AssertionError("no tensor has codes")


def as_rans(mutation):
    """Return a mutation of the bytes of any artifact as one of a rans artifact."""

    def mutated(rng, base):
        return mutation(rng, base._replace(blob=packed(base.raw)))

    mutated.__name__ = f"rans_{mutation.__name__}"
    mutated.__doc__ = mutation.__doc__
    return mutated


def rans_header(rng, base):
    """Give a rans artifact the damaged header of an xz artifact."""
    mutation = rng.choice(
        (
            mutations.header_length,
            mutations.edit_tensor_field,
            mutations.edit_shape,
            mutations.edit_index,
            mutations.edit_config,
            mutations.edit_top,
            mutations.nest,
        )
    )
    raw = lzma.decompress(mutation(rng, base))
    parts = rans(base)
    head = len(raw) - len(base.payload)
    return put_together(raw[:head] + parts.side[parts.head :], parts.words)


def rans_side_bits(rng, base):
    """Flip bits of the side behind its header, where xz's check does not see them."""
    parts = rans(base)
    side = bytearray(parts.side)
    for _ in range(rng.choice((1, 1, 3))):
        side[rng.randrange(parts.head, len(side))] ^= 1 << rng.randrange(8)
    return put_together(bytes(side), parts.words)


def rans_side_splice(rng, base):
    """Cut, repeat or replace a piece of the side."""
    parts = rans(base)
    return put_together(mutations.splice_bytes(rng, parts.side), parts.words)


def rans_side_length(rng, base):
    """Make the side longer or shorter than its header says."""
    parts = rans(base)
    more = rng.randrange(1, 100)
    side = rng.choice(
        (parts.side + b"\0" * more, parts.side[:-more], parts.side[: parts.head], parts.side * 2)
    )
    return put_together(side, parts.words)


def rans_side_bytes(rng, base):
    """Lie about the bytes of the compressed side."""
    parts = rans(base)
    right = len(compress(parts.side))
    near = (right - 1, right + 1, right + 2, right + len(parts.words), right + len(parts.words) + 2)
    size = rng.choice((0, 1, 11, *near, 2**31, 2**32 - 1, rng.randrange(2 * right)))
    words = rng.choice((parts.words, b"", parts.words[:1]))
    return put_together(parts.side, words, size)


def rans_tables(rng, base):
    """Change tables: other sums, other shares of the same sum, nothing at all, all for one code."""
    parts = rans(base)
    places = first_model(base, parts)
    planes = parts.side[places.tables : places.end]
    tables = np.frombuffer(t.from_planes(planes, 2), "<u2").reshape(t.CONTEXTS, -1).copy()
    kind = rng.choice(("more", "moved", "nothing", "one", "noise"))
    row = rng.choice((16, 16, rng.randrange(t.CONTEXTS)))  # context 16 is that of two mean classes
    column = rng.randrange(tables.shape[1])
    largest = int(tables[row].argmax())
    if kind == "more":
        tables[row, column] = rng.randrange(1 << 16)
    elif kind == "moved" and column != largest:
        tables[row, largest] -= 1
        tables[row, column] += 1
    elif kind == "nothing":
        tables[:] = 0
    elif kind == "one":
        tables[:] = 0
        tables[:, column] = 1 << t.FREQUENCY_BITS - 1
    else:
        tables[:] = np.frombuffer(rng.randbytes(tables.nbytes), "<u2").reshape(tables.shape)
    side = parts.side[: places.tables] + t.to_planes(tables, 2) + parts.side[places.end :]
    return put_together(side, parts.words)


def rans_classes(rng, base):
    """Change classes of rows or columns to others, some beyond the last."""
    parts = rans(base)
    places = first_model(base, parts)
    side = bytearray(parts.side)
    for at in range(places.rows, places.tables):
        if rng.random() < 0.3:
            side[at] = rng.choice((0, 7, 9, 16, 17, 128, 255))
    return put_together(bytes(side), parts.words)


def rans_words(rng, base):
    """Change the words: states out of range, more words, fewer, half a one, others, in another order."""
    parts = rans(base)
    words = bytearray(parts.words)
    kind = rng.choice(("states", "more", "less", "half", "noise", "swap", "none"))
    if kind == "states":
        fill = rng.choice((b"\0\0", b"\xff\xff", b"\1\0"))
        words[:96] = fill * 48
    elif kind == "more":
        words += rng.randbytes(2 * rng.randrange(1, 50))
    elif kind == "less":
        words = words[: 2 * rng.randrange(len(words) // 2)]
    elif kind == "half":
        words += b"\0"
    elif kind == "noise":
        words = bytearray(rng.randbytes(len(words)))
    elif kind == "swap":
        words[-4:-2], words[-2:] = words[-2:], words[-4:-2]
    else:
        words = bytearray()
    return put_together(parts.side, bytes(words))


def rans_container(rng, base):
    """Put the side or the artifact into something else, or something else in its place."""
    parts = rans(base)
    whole = put_together(parts.side, parts.words)
    choices = (
        b"GPT6rans",
        b"GPT6rans\0\0\0",
        with_checksum(b""),
        with_checksum(b"\0\0\0"),
        with_checksum(struct.pack("<I", 0)),
        with_checksum(base.blob),
        b"GPT6RANS" + whole[8:],
        b"GPT6" + whole,
        compress(whole),
        whole * 2,
        b"GPT6rans" + base.blob,
        put_together(whole, parts.words),
        put_together(b"", b""),
        put_together(parts.side, b""),
        with_checksum(struct.pack("<I", 4) + b"none" + parts.words),
        with_checksum(struct.pack("<I", len(parts.side)) + parts.side + parts.words),
        whole[:8] + bytes(4) + whole[12:],
    )
    return rng.choice(choices)


RANS_MUTATIONS = {
    mutation.__name__: mutation
    for mutation in (
        as_rans(mutations.truncate),
        as_rans(mutations.flip_bits),
        as_rans(mutations.splice),
        as_rans(mutations.around),
        rans_header,
        rans_side_bits,
        rans_side_splice,
        rans_side_length,
        rans_side_bytes,
        rans_tables,
        rans_classes,
        rans_words,
        rans_container,
    )
}
