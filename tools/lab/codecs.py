"""Pack an artifact by every codec of train_gpt.py, and tell how many bytes its codes need at least.

    ./run.sh record codecs ARTIFACT ...

Prints, for each artifact, the bytes and seconds of every row of CODECS and, for comparison, of Huffman codes
alone (zlib); then the order-0 entropy of the codes, in bytes: with one table for all, with one for each
tensor, and with one for each class of rows, of columns, or of both, in each tensor. An entropy leaves out the
tables and the classes themselves; "chosen" is what codec rans takes, which weighs them in.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports take seconds: Ctrl-C shows no traceback

from script import explain_imports

if __name__ == "__main__":
    explain_imports("record")

import argparse
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from lab.shared.command_line import parse
from ledger.run_verb import run_verb
from progress import Progress
from script import TRAINER, BadInput, load_script, on_one_line

MODULE = "measured_script"  # the script's name in sys.modules
NEEDS = (
    *("CODECS", "codec_of", "read_header", "read_entry", "read_file"),
    *("row_classes", "column_classes", "model_codes", "unpack_artifact"),
)


class Codes(NamedTuple):
    """The codes of a tensor, int8 (matrices, rows, columns)."""

    name: str
    encoding: str
    limit: int
    values: np.ndarray


def codes_of(trainer: ModuleType, raw: bytes) -> list[Codes]:
    """Return the tensors of a raw artifact that are stored as codes."""
    header, end = trainer.read_header(raw)
    found = []
    for entry in map(trainer.read_entry, header["tensors"]):
        if entry.limit:
            values = np.frombuffer(raw, np.int8, entry.count, end + entry.offset)
            found.append(Codes(entry.name, entry.encoding, entry.limit, values.reshape(-1, *entry.matrix)))
    return found


def entropy(values: np.ndarray, contexts: np.ndarray | int = 0) -> float:
    """Return the order-0 entropy of int8 values within each context (0 to 255), in bytes."""
    index = (np.asarray(contexts, np.int32) << 8) + (values.astype(np.int32) + 128)
    counts = np.bincount(index.ravel())
    counts = np.pad(counts, (0, -len(counts) % 256)).reshape(-1, 256)
    totals = counts.sum(1, keepdims=True)
    frequencies = np.maximum(counts, 1) / np.maximum(totals, 1)
    return float(-(counts * np.log2(frequencies)).sum() / 8)


def print_codecs(trainer: ModuleType, raw: bytes, progress: Progress) -> None:
    """Print bytes and seconds of every codec. Raises BadInput if one does not give back the raw artifact."""
    codecs = {name: (codec.pack, codec.unpack) for name, codec in trainer.CODECS.items()}
    codecs["Huffman (zlib)"] = (huffman, zlib.decompress)

    progress.begin("codecs: packing")
    progress.print(f"{'codec':<16} {'bytes':>12} {'pack s':>8} {'unpack s':>9}")
    for name, (pack, unpack) in progress.each(codecs.items(), "codecs"):
        progress.print(codec_line(name, raw, pack, unpack))


def huffman(raw: bytes) -> bytes:
    """Compress by Huffman codes alone."""
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return packer.compress(raw) + packer.flush()


def codec_line(name: str, raw: bytes, pack: Callable, unpack: Callable) -> str:
    """Return the line of one codec. Raises BadInput if it does not give back the raw artifact."""
    start = time.perf_counter()
    blob = pack(raw)
    packed = time.perf_counter()
    if unpack(blob) != raw:
        raise BadInput(f"codec {name} does not give back what it packed: report it with the artifact")
    unpacked = time.perf_counter()
    return f"{name:<16} {len(blob):>12,} {packed - start:>8.2f} {unpacked - packed:>9.2f}"


class Entropies(NamedTuple):
    """Order-0 entropies of a tensor's codes in bytes: alone, and within the classes that codec rans knows."""

    tensor: float
    by_row: float
    by_column: float
    by_both: float


def entropies_of(trainer: ModuleType, codes: Codes) -> Entropies:
    """Return the entropies of a tensor's codes."""
    magnitudes = np.abs(codes.values.astype(np.int16))
    row_classes = trainer.row_classes(magnitudes)
    rows = row_classes[:, :, None]
    columns = trainer.column_classes(magnitudes, row_classes)[:, None, :]
    values = codes.values
    return Entropies(
        entropy(values),
        entropy(values, np.broadcast_to(rows, values.shape)),
        entropy(values, np.broadcast_to(columns, values.shape)),
        entropy(values, rows + columns),
    )


def print_entropies(trainer: ModuleType, raw: bytes, progress: Progress) -> None:
    """Print the entropies of the codes of every tensor and of all."""
    tensors = codes_of(trainer, raw)
    labels = " ".join(f"{label:>12}" for label in Entropies._fields)
    progress.begin("codecs: modelling")
    progress.expect(sum(codes.values.size for codes in tensors), "codes")
    progress.print(f"\n{'codes of':<14} {'encoding':<8} {'codes':>11} {'rms':>6} {labels}  chosen")
    sums = np.zeros(len(Entropies._fields))
    for codes in tensors:
        entropies = entropies_of(trainer, codes)
        sums += entropies
        model = trainer.model_codes(codes.values, codes.limit)
        chosen = [name for name in ("rows", "columns") if np.ptp(getattr(model, name))]
        rms = float(np.sqrt(np.square(codes.values, dtype=np.float32).mean()))
        shown = " ".join(f"{size:>12,.0f}" for size in entropies)
        label = f"{codes.name:<14} {codes.encoding:<8} {codes.values.size:>11,} {rms:>6.2f}"
        progress.print(f"{label} {shown}  {' and '.join(chosen) or 'neither'}")
        progress.advance(codes.values.size)

    every = np.concatenate([codes.values.ravel() for codes in tensors])
    shown = " ".join(f"{size:>12,.0f}" for size in sums)
    progress.print(f"{'all':<14} {'':<8} {every.size:>11,} {'':>6} {shown}")
    progress.print(f"one table for all codes: {entropy(every):,.0f} bytes")


def measure(trainer: ModuleType, path: Path, progress: Progress) -> None:
    """Print all of this about one artifact. Raises BadInput if it is none."""
    try:
        blob = trainer.read_file(str(path))
        codec = trainer.codec_of(blob)
        raw = trainer.CODECS[codec].unpack(blob)
        trainer.unpack_artifact(blob)
    except OSError as error:
        raise BadInput(
            f"{path}: cannot read the artifact ({error.strerror}); name a file that train wrote"
        ) from None
    except ValueError as error:
        raise BadInput(f"{path}: {error}; name a file that train wrote") from None
    name = on_one_line(str(path))
    progress.print(f"{name}: {len(blob):,} bytes by codec {codec}, {len(raw):,} before compression\n")
    print_codecs(trainer, raw, progress)
    print_entropies(trainer, raw, progress)


def command(args: argparse.Namespace) -> int:
    """Measure the artifacts that the command line names."""
    trainer = load_script(TRAINER, MODULE, NEEDS, "measure")
    for path in args.words:
        with Progress(f"codecs: reading {path}") as progress:
            measure(trainer, Path(path), progress)
    return 0


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    text = "pack an artifact by every codec, and tell how many bytes its codes need at least"
    parser = argparse.ArgumentParser(prog="record codecs", description=text)
    parser.add_argument("words", nargs="+", metavar="ARTIFACT", help="a file that train wrote")
    return parser


def main(argv: list[str]) -> int:
    """Run the verb. Returns the exit status."""
    args = parse(argument_parser(), argv)
    return run_verb(lambda: command(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
