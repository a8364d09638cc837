"""Read small artifacts that unpack to something huge, each in a process that measures memory and time.

PYTHONPATH=. python tests/stress/bombs.py [NAME] ...     prints a line of JSON for each; all by default
"""

import json
import math
import os
import resource
import struct
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np

import train_gpt as t
from tests.stress.mutations import small_artifact
from tests.stress.rans_streams import put_together, with_checksum
from tests.stress.reader import VIOLATION, Violation, clock, outcome, since
from tests.stress.xz_streams import blocks, compress, with_dictionary

MEMORY = 1_600_000_000  # most bytes that the reader may need
MEMORY_REFUSED = 6_000_000_000  # the operating system gives no more than these
MIB = 1 << 20


# ---------------------------------------------------------------- building bombs


def start_of_artifact(text, size):
    """Return the magic, a header length of `size` and the beginning of the header."""
    return t.MAGIC + struct.pack("<I", size) + text.encode()


def with_filled_config(unit, start, end):
    """Return a builder of an artifact whose config is `start`, 255 MiB of `unit` and `end`."""
    return lambda base: filled_header('{"config":' + start, unit, end)


def with_filled_tensors(unit, start, end):
    """Return a builder of an artifact with a sound config; its tensors are as in `with_filled_config`."""
    return lambda base: filled_header(
        '{"config":' + json.dumps(base.header["config"]) + ',"tensors":' + start, unit, end
    )


def filled_header(start, unit, end):
    """Return an artifact whose header is `start`, 255 MiB of `unit` and `end`."""
    filling = unit * (MIB // len(unit))
    size = len(start) + 255 * len(filling) + len(end)
    return blocks((start_of_artifact(start, size), 1), (filling.encode(), 255), (end.encode(), 1))


def largest_tensor(encoding, width):
    """Return a builder of a sound artifact as large as the format allows: one tensor of zeros."""

    def build(base):
        entry = ["a", encoding, [1, 250 * MIB // width], 0]
        text = json.dumps({"config": base.header["config"], "tensors": [entry]})
        scale = [(bytes(2), 1)] if t.ENCODINGS[encoding].limit else []
        return blocks((start_of_artifact(text, len(text)), 1), (bytes(MIB), 250), *scale)

    return build


def trellis_columns(tensors, rows, columns):
    """Return a builder of a sound artifact but for its shapes: tensors of zeros, in trellis codes."""

    def build(base):
        size = rows * columns + 2 * rows + columns
        entries = [[f"a{i}", "trellis", [rows, columns], i * size] for i in range(tensors)]
        text = json.dumps({"config": base.header["config"], "tensors": entries})
        return blocks((start_of_artifact(text, len(text)), 1), (bytes(size), tensors))

    return build


def rans_artifact(base, shapes, side_after_header=b""):
    """Return a rans artifact of zeros: int8 tensors of these shapes, or a header and anything after it."""
    entries = []
    parts = []
    offset = 0
    table = np.zeros((t.CONTEXTS, 128), "<u2")
    table[:, 0] = 1 << t.FREQUENCY_BITS - 1
    for i, shape in enumerate(shapes):
        count = math.prod(shape)
        rows = count // shape[-1]
        columns = math.prod(shape[:-2]) * shape[-1]
        entries.append([f"a{i}", "int8", shape, offset])
        parts += [bytes(rows) + bytes(columns), t.to_planes(table, 2), bytes(2 * rows)]
        offset += count + 2 * rows
    text = json.dumps({"config": base.header["config"], "tensors": entries})
    side = start_of_artifact(text, len(text)) + b"".join(parts) + side_after_header
    codes = sum(math.prod(shape) for shape in shapes)
    return put_together(side, struct.pack("<3H", 1, 0, 0) * t.states_for(codes))


def rans_of(*shapes):
    """Return a builder of a rans artifact of zeros."""
    return lambda base: rans_artifact(base, [list(shape) for shape in shapes])


def rans_side_of_zeros(base):
    """Return a rans artifact whose side is 1 GiB."""
    packed = blocks((bytes(MIB), 1024))
    return with_checksum(struct.pack("<I", len(packed)) + packed + bytes(96))


# Name -> function of a SmallArtifact.
BOMBS = {
    "1 GiB of zeros": lambda base: blocks((bytes(MIB), 1024)),
    "64 GiB of zeros": lambda base: blocks((bytes(16 * MIB), 4096)),
    "1 GiB after a sound start": lambda base: blocks((base.raw, 1), (bytes(MIB), 1024)),
    "streams of zeros": lambda base: compress(bytes(MIB)) * 1024,
    "a dictionary of 4 GiB": lambda base: with_dictionary(base.blob, 40),
    "a header of empty lists": with_filled_tensors("[],", "[", "[]]}"),
    "a header of numbers": with_filled_tensors("1.5,", "[", "0]}"),
    "a header of keys": with_filled_config('b":1,"', '{"a":{"', 'c":2}}}'),
    "a header of one name": with_filled_config("abcd", '"', '"}'),
    "a header of one number": with_filled_config("1234", "1", "}"),
    "a header of one fraction": with_filled_config("1234", "0.", "}"),
    "a header of brackets": with_filled_config("[[[[", "[", "}"),
    "a header of spaces": with_filled_config("    ", "[", "]}"),
    "a shape of ones": with_filled_tensors("1,1,", '[["a","f32",[', "1],0]]}"),
    "the largest int8 tensor": largest_tensor("int8", 1),
    "the largest f16 tensor": largest_tensor("f16", 2),
    "trellis, the tallest tensor": trellis_columns(1, 80 * MIB, 1),
    "trellis, the most rows": trellis_columns(125, 131, 4096),
    "trellis, the most codes": trellis_columns(4, 4096, 4096),
    "trellis, too many codes": trellis_columns(1000, 131, 1960),
    "rans, a side of 1 GiB": rans_side_of_zeros,
    "rans, the most codes": rans_of((8192, 8192)),
    "rans, the most rows": rans_of((1 << 26, 1)),
    "rans, the most columns": rans_of((1, 1 << 26)),
    "rans, the most matrices": rans_of((1 << 26, 1, 1)),
    "rans, a row too many": rans_of((8193, 8192)),
    "rans, the most tensors": rans_of(*[(33, 33)] * t.MAX_RANS_TENSORS),
    "rans, a thousand tensors": rans_of(*[(33, 33)] * 1000),
}


# ---------------------------------------------------------------- reading them


class BombReport(NamedTuple):
    """How reading a bomb went. size: of the file. growth: more memory than before, in bytes."""

    bomb: str
    size: int
    outcome: str
    reason: str
    growth: int
    seconds: float


def peak_memory():
    """Return this process's largest resident size so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def limit_memory(more):
    """Let the operating system refuse this process `more` bytes beyond what it has now, where /proc tells."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        limit = int(statm.read_text().split()[0]) * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def bomb_report(name):
    """Build and read a bomb in this process and return its BombReport."""
    blob = BOMBS[name](small_artifact())
    limit_memory(MEMORY_REFUSED)
    before = peak_memory()
    start = clock()
    try:
        verdict, reason = outcome(blob)
    except Violation as error:
        verdict = VIOLATION
        reason = str(error)
    growth = peak_memory() - before
    if growth > MEMORY:
        reason = f"{growth / 1e9:.1f} GB more memory; {verdict}: {reason}"
        verdict = VIOLATION
    return BombReport(name, len(blob), verdict, reason, growth, since(start))


def print_reports(names):
    """Print a line of JSON for each bomb, each from a fork that has not decompressed anything before."""
    for name in names:
        pid = os.fork()
        if pid == 0:
            try:
                print(json.dumps(bomb_report(name)._asdict()), flush=True)
            except BaseException:
                traceback.print_exc()  # os._exit would say nothing of it
            finally:
                os._exit(0)
        os.waitpid(pid, 0)


def bomb_reports(names=tuple(BOMBS)):
    """Return the BombReport of each name, from a fresh interpreter. A process that died is a violation."""
    command = [sys.executable, __file__, *names]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    timeout = 60 + 60 * len(names)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    reports = {}
    for line in done.stdout.splitlines():
        report = BombReport(**json.loads(line))
        reports[report.bomb] = report
    lost_reason = f"the process ended: {done.stderr[-200:]}"
    return [reports.get(name) or BombReport(name, 0, VIOLATION, lost_reason, 0, 0) for name in names]


def main(argv):
    """Run the command and return its exit status."""
    print_reports(argv or list(BOMBS))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
