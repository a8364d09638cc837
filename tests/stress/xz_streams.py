"""Hand-made xz streams: any number of blocks, without holding what they unpack to.

The format is that of https://tukaani.org/xz/xz-file-format.txt: a stream header of 12 bytes, blocks, an index
with the two sizes of each block, and a stream footer of 12 bytes.
"""

import lzma
import struct
import zlib
from typing import NamedTuple

EDGE_BYTES = 12  # of a stream's header, and of its footer


class Block(NamedTuple):
    """A compressed block. unpadded_size: as the index has it. size: bytes that it unpacks to."""

    body: bytes
    unpadded_size: int
    size: int


def compress(raw):
    """Return `raw` as an xz stream of one block."""
    return lzma.compress(raw, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, preset=0)


def crc32(data):
    """Return the CRC-32 of `data` as 4 little-endian bytes."""
    return struct.pack("<I", zlib.crc32(data))


def varint(number):
    """Return a number in xz's encoding of integers: 7 bits a byte, low bits first."""
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def read_varint(data):
    """Return the number that the first bytes of `data` encode."""
    number = 0
    for position, byte in enumerate(data):
        number |= (byte & 127) << 7 * position
        if byte < 128:
            break
    return number


def one_block(raw):
    """Return the Block of `raw`, cut out of a stream."""
    stream = compress(raw)
    (backward_size,) = struct.unpack("<I", stream[-8:-4])
    index_start = len(stream) - EDGE_BYTES - (backward_size + 1) * 4
    index = stream[index_start:]
    return Block(stream[EDGE_BYTES:index_start], read_varint(index[2:]), len(raw))


def blocks(*parts):
    """Return an xz stream of blocks. Each part is (bytes, how often to repeat their block)."""
    made = [(one_block(raw), repeats) for raw, repeats in parts]
    body = b"".join(block.body * repeats for block, repeats in made)
    records = b"".join(
        (varint(block.unpadded_size) + varint(block.size)) * repeats for block, repeats in made
    )

    index = b"\0" + varint(sum(repeats for _, repeats in made)) + records
    index += b"\0" * (-len(index) % 4)
    index += crc32(index)
    footer = struct.pack("<I", len(index) // 4 - 1) + b"\0\1"
    header = compress(b"x")[:EDGE_BYTES]
    return header + body + index + crc32(footer) + footer + b"YZ"


def with_dictionary(blob, size):
    """Return an xz stream with another dictionary size in its first block: 40 is 4 GiB, more is reserved."""
    stream = bytearray(blob)
    header_end = EDGE_BYTES + (stream[EDGE_BYTES] + 1) * 4
    lzma2_filter = bytes(stream).index(b"\x21\x01", EDGE_BYTES + 2, header_end)
    stream[lzma2_filter + 2] = size
    stream[header_end - 4 : header_end] = crc32(bytes(stream[EDGE_BYTES : header_end - 4]))
    return bytes(stream)
