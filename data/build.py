"""Turn files of documents into a dataset folder: read, tokenize in several processes, write shards.

Input files: .txt (documents separated by one NUL byte), .jsonl (one object per line), both also as .zst.
The output depends on the input, the tokenizer and the shard size, not on the number of processes.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

import shards
from messages import (
    BadInput,
    Progress,
    describe,
    explain,
    is_panic,
    megabytes,
    require,
    require_file,
    say,
    short,
)
from tokenizing import UNKNOWN_TEXT, SentencePieceCoder, TiktokenCoder, Tokenizer
from workers import Workers

FORMATS = (".txt", ".txt.zst", ".jsonl", ".jsonl.zst")
BATCH_CHARS = 1 << 20  # one unit of work for a tokenizing process
LONGEST_NAME = 100  # characters of a dataset's or a split's name: both go into the names of files

Splits = dict[str, list[str | Path]]  # {split: its input files}


# ---- reading documents ---------------------------------------------------------------------------


class Block(NamedTuple):
    """A piece of a file."""

    content: bytes  # unpacked
    position: int  # bytes of the file read so far


class Document(NamedTuple):
    """A document of a file."""

    text: str
    position: int  # bytes of the file read so far


def read_blocks(path: str | Path) -> Iterator[Block]:
    """Yield a plain or .zst file in blocks.

    Raises BadInput if the file is damaged.
    """
    with open(path, "rb") as raw:
        if str(path).endswith(".zst"):
            yield from decompress_blocks(raw, path)
        else:
            while block := raw.read(1 << 20):
                yield Block(block, raw.tell())


def decompress_blocks(raw: BinaryIO, path: str | Path) -> Iterator[Block]:
    """Yield an open .zst file of one or more frames in unpacked blocks."""
    zstandard = require("zstandard")
    # `zstd --long` writes windows that the library refuses unless told otherwise.
    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None  # not a stream_reader, which takes a file that is cut short for a complete one
    try:
        while block := raw.read(1 << 18):
            while block:
                frame = frame or context.decompressobj()
                yield Block(frame.decompress(block), raw.tell())
                if frame.eof:
                    block = frame.unused_data
                    frame = None
                else:
                    block = b""
    except zstandard.ZstdError as error:
        raise BadInput(f"{path}: damaged zstd file ({error}); copy it again") from None
    if frame is not None:
        raise BadInput(f"{path}: zstd file cut short; copy it again")


def split_blocks(blocks: Iterable[Block], separator: bytes) -> Iterator[Block]:
    """Yield the blocks of `read_blocks` cut anew, one between every two separators."""
    unfinished = []
    position = 0
    for content, position in blocks:
        first, *others = content.split(separator)
        unfinished.append(first)
        for piece in others:
            yield Block(b"".join(unfinished), position)
            unfinished = [piece]
    yield Block(b"".join(unfinished), position)


def json_text(path: str | Path, number: int, line: bytes, key: str) -> str:
    """Return the text field of one line of JSON. Raises BadInput if the line has none."""
    try:
        row = json.loads(line)
    except UnicodeError:
        raise  # not JSON's fault; `read_documents` names the remedy
    except (ValueError, RecursionError) as error:
        raise BadInput(
            f"{path}: line {number}: not JSON ({error}); one object per line is expected"
        ) from None
    if not isinstance(row, dict) or not isinstance(row.get(key), str):
        found = ", ".join(sorted(row)[:8]) if isinstance(row, dict) else type(row).__name__
        raise BadInput(f"{path}: line {number}: no text field {key!r} (found: {found}); name it with --field")
    return row[key]


def read_documents(path: str | Path, key: str = "text") -> Iterator[Document]:
    """Yield the documents of a file in order, without blank ones.

    key: the text field of .jsonl. Raises BadInput on bytes that are not UTF-8 and on malformed lines.
    """
    is_json = str(path).endswith((".jsonl", ".jsonl.zst"))
    separator = b"\n" if is_json else b"\0"
    unit = "line" if is_json else "document"
    for number, (piece, position) in enumerate(split_blocks(read_blocks(path), separator), 1):
        if not piece.strip():
            continue
        try:
            text = json_text(path, number, piece, key) if is_json else piece.decode()
            text.encode()  # JSON may hold lone surrogates
        except UnicodeError:
            raise BadInput(
                f"{path}: {unit} {number}: not valid UTF-8; convert the file, for example with iconv"
            ) from None
        if text.strip():
            yield Document(text, position)


def fingerprint(text: str) -> bytes:
    """Return 16 bytes that are equal for texts that differ only in case and white space."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()


# ---- tokenizing ----------------------------------------------------------------------------------


class Batch(NamedTuple):
    """The documents that a process tokenizes at a time."""

    path: str | Path  # their file
    first: int  # number of the first of them in the file, from 0
    documents: list[str]
    position: int  # bytes of the file read so far


class Encoded(NamedTuple):
    """One tokenized document."""

    ids: np.ndarray  # uint16 (n,) with BOS; empty: normalizing leaves nothing, as of control characters
    text_bytes: int  # UTF-8 length of the text
    decoded_bytes: int  # UTF-8 length of the document decoded from its ids
    unknown: int  # how many of the ids are the unknown piece
    fingerprint: bytes


def read_batches(path: str | Path, key: str) -> Iterator[Batch]:
    """Yield a file's documents as Batches of about BATCH_CHARS characters. key: the text field of .jsonl."""
    documents = []
    first = 0
    chars = 0
    position = 0
    for text, position in read_documents(path, key):
        documents.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield Batch(path, first, documents, position)
            first += len(documents)
            documents = []
            chars = 0
    if documents:
        yield Batch(path, first, documents, position)


_coder: SentencePieceCoder | TiktokenCoder | None = None  # this process's


def start_coder(tokenizer: Tokenizer) -> None:
    """Load the tokenizer, once per process."""
    global _coder
    _coder = tokenizer.load()


def encode_batch(batch: Batch) -> list[Encoded]:
    """Return every document of the batch encoded, with the tokenizer of `start_coder`.

    Raises BadInput if the tokenizer fails.
    """
    try:
        return encode(batch.documents)
    except BaseException as error:
        if isinstance(error, MemoryError) or not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise tokenizer_error(batch, error) from None


def tokenizer_error(batch: Batch, error: BaseException) -> BadInput:
    """Return a BadInput that names the document of the batch at which the tokenizer failed with `error`."""
    for number, text in enumerate(batch.documents, batch.first):
        try:
            encode([text])
        except BaseException as again:
            if isinstance(again, (KeyboardInterrupt, SystemExit)):
                raise
            return BadInput(
                f"{batch.path}: document {number} ({text[:60]!r}, {len(text):,} characters): the tokenizer "
                f"failed ({describe(again)}); cut the document into shorter ones or leave it out"
            )
    return BadInput(f"{batch.path}: the tokenizer failed ({describe(error)}); use --workers 1")


def encode(documents: list[str]) -> list[Encoded]:
    """Return every document encoded, with the tokenizer of `start_coder`."""
    ids = _coder.encode(documents)
    decoded_bytes = _coder.decoded_bytes(ids)
    return [
        Encoded(
            ids=np.array([_coder.bos_id, *document_ids] if document_ids else [], dtype=np.uint16),
            text_bytes=len(text.encode()),
            decoded_bytes=size,
            unknown=document_ids.count(_coder.unknown),
            fingerprint=fingerprint(text),
        )
        for text, document_ids, size in zip(documents, ids, decoded_bytes)
    ]


# ---- checking the request ------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build.

    key: the text field of .jsonl. shard_tokens: most tokens in a shard. workers: number of processes.
    replace: whether to overwrite another dataset in the folder.
    """

    key: str = "text"
    shard_tokens: int = shards.SHARD_TOKENS
    workers: int = 1
    replace: bool = False


def check_names(name: str, splits: Iterable[str]) -> None:
    """Raise BadInput if a name is malformed or a shard of one split matches the pattern of another."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or len(name) > LONGEST_NAME:
        raise BadInput(
            f"--name {name[:40]!r}: use letters, digits, '_', '-' and '.' only, {LONGEST_NAME} at most"
        )
    for split in splits:
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z][a-z0-9]*)*", split) or len(split) > LONGEST_NAME:
            raise BadInput(
                f"--split {split[:40]!r}: use lower-case words joined by '_', such as val_news, "
                f"{LONGEST_NAME} characters at most"
            )
        for other in splits:
            pattern = shards.shard_pattern(other)
            if other != split and fnmatch.fnmatch(f"{name}_{split}_000000.bin", pattern):
                raise BadInput(
                    f"--split {split!r}: its files would also match {pattern} of split {other!r}; "
                    "choose another split or dataset name"
                )


def describe_inputs(splits: Splits) -> list[dict[str, str | int]]:
    """Return the manifest's list of input files. Raises BadInput on a missing, empty or unknown file."""
    inputs = []
    for split, files in splits.items():
        for path in files:
            if not str(path).endswith(FORMATS):
                raise BadInput(f"{path}: unknown input format; name it {', '.join(FORMATS)}")
            require_file(path)
            try:
                size = os.stat(path).st_size
                digest = shards.sha256_file(path)
            except OSError as error:
                raise BadInput(explain(error, path)) from None
            if not size:
                raise BadInput(f"{path}: empty file; leave it out or fill it")
            inputs.append({"split": split, "file": Path(path).name, "bytes": size, "sha256": digest})
    return inputs


def text_source(splits: Splits, options: BuildOptions) -> dict[str, Any]:
    """Return the manifest's `source` of a dataset made from text files."""
    return {
        "kind": "text",
        "inputs": describe_inputs(splits),
        "options": {"field": options.key, "shard_tokens": options.shard_tokens},
    }


def reusable_manifest(out: str | Path, head: dict[str, Any], replace: bool) -> shards.Manifest | None:
    """Return the manifest in `out` if it describes this very dataset and the files are whole, else None.

    head: the manifest to be written, without its splits. Raises BadInput if `out` holds something else and
    `replace` is off.
    """
    out = Path(out)
    if not (out / shards.MANIFEST).exists():
        strays = [name for name in shards.shard_files(out) if not name.startswith(head["name"] + "_")]
        if strays and not replace:
            raise BadInput(
                f"{out}: holds {strays[0]} but no {shards.MANIFEST}; choose another --out, remove it, "
                "or use --replace"
            )
        return None
    try:
        manifest = shards.load_manifest(out)
    except BadInput:
        if replace:
            return None
        raise

    different = sorted(key for key, value in head.items() if manifest.get(key) != value)
    if different:
        if not replace:
            raise BadInput(
                f"{out}: holds another dataset (different {', '.join(different)}); choose another --out, "
                "remove it, or use --replace"
            )
        return None

    problems = shards.check_dataset(out, deep=False)
    if problems:
        say(f"building again: {problems[0]}")
        return None
    return manifest


# ---- building a dataset --------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a document is. number: its place in the file, from 0. start: its first characters."""

    split: str
    path: str | Path
    number: int
    start: str


class LeakCheck:
    """Remember the held-out documents and refuse a train document that is one of them."""

    def __init__(self) -> None:
        self.held_out: dict[bytes, Place] = {}  # by fingerprint; of several equal ones, the first

    def check(self, fingerprint: bytes, place: Place) -> None:
        """Remember a held-out document. Raises BadInput if a train document is held out too."""
        if place.split != "train":
            self.held_out.setdefault(fingerprint, place)
        elif fingerprint in self.held_out:
            held_out = self.held_out[fingerprint]
            raise BadInput(
                f"{held_out.path}: {held_out.split} document {held_out.number} ({held_out.start!r}) also "
                f"occurs in train: {place.path} document {place.number}; remove it from one of the two"
            )


def refuse_unknown(count: int, place: Place) -> None:
    """Raise BadInput if a held-out document has `count` unknown pieces: their bytes are not known."""
    if count:
        raise BadInput(
            f"{place.path}: {place.split} document {place.number} ({place.start!r}): {count} "
            f"tokens are the unknown piece: {UNKNOWN_TEXT}, or leave the document out"
        )


@dataclass
class Totals:
    """Sums over the documents of a split that have tokens. unknown: tokens that are the unknown piece."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    decoded_bytes: int = 0
    unknown: int = 0

    def add(self, document: Encoded) -> None:
        """Add one document."""
        self.documents += 1
        self.tokens += len(document.ids)
        self.text_bytes += document.text_bytes
        self.decoded_bytes += document.decoded_bytes
        self.unknown += document.unknown

    def summary(self) -> str:
        """Return the closing words of the split's progress line."""
        text_tokens = self.tokens - self.documents  # without BOS
        return (
            f"{self.documents} documents, {megabytes(self.text_bytes)}, "
            f"{short(self.tokens)} tokens, {self.text_bytes / max(text_tokens, 1):.4f} bytes/token"
        )

    def entry(self, shard_entries: list[shards.ManifestShard]) -> shards.ManifestSplit:
        """Return the manifest's entry for a split with these shards."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "decoded_bytes": self.decoded_bytes,
            "shards": shard_entries,
        }


def encoded_documents(
    split: str, files: list[str | Path], key: str, workers: Workers, progress: Progress
) -> Iterator[tuple[Place, Encoded]]:
    """Yield the documents of the files of a split, in order, and show on `progress` the bytes read.

    Raises BadInput on a file without documents.
    """
    finished_bytes = 0
    for path in files:
        documents = 0
        for batch, encoded in workers.run(encode_batch, read_batches(path, key)):
            for number, (text, document) in enumerate(zip(batch.documents, encoded), batch.first):
                yield Place(split, path, number, text[:60]), document
            documents += len(encoded)
            progress.update(finished_bytes + batch.position)

        if not documents:
            raise BadInput(f"{path}: no documents; leave it out or fill it")
        if documents == 1 and ".txt" in str(path):
            say(f"{path}: no NUL byte, so the whole file is one document")
        finished_bytes += os.stat(path).st_size


def write_split(
    writer: shards.ShardWriter,
    split: str,
    files: list[str | Path],
    key: str,
    workers: Workers,
    leaks: LeakCheck,
) -> shards.ManifestSplit:
    """Tokenize the files of one split into a ShardWriter and return the manifest's entry for the split.

    workers: processes that have run `start_coder`. key: the text field of .jsonl. leaks: it can refuse only
    what it has seen, so train must be the last split.
    """
    totals = Totals()
    progress = Progress(f"tokenize {split}", sum(os.stat(path).st_size for path in files))
    try:
        for place, document in encoded_documents(split, files, key, workers, progress):
            leaks.check(document.fingerprint, place)
            if split != "train":
                refuse_unknown(document.unknown, place)
            if len(document.ids):
                writer.add(document.ids)
                totals.add(document)
        writer.close()
    except BaseException:
        writer.abandon()
        raise

    if not totals.documents:
        raise BadInput(f"{files[0]}: no document of split {split} has any text; add some")
    if totals.unknown:
        unknown = f"{totals.unknown} tokens are the unknown piece"
        say(f"{split}: {unknown}, for text that the tokenizer cannot spell")
    progress.close(totals.summary())
    return totals.entry(writer.shards)


class Built(NamedTuple):
    """A dataset that is there. is_new: whether it was written just now."""

    manifest: shards.Manifest
    is_new: bool


def build_dataset(
    out: str | Path,
    name: str,
    tokenizer: Tokenizer,
    *,
    splits: Splits,
    source: dict[str, Any],
    options: BuildOptions,
) -> Built:
    """Write the dataset `name` into the folder `out`.

    splits: {split name: [input files]} with "train" and at least one other. source: the manifest's `source`.
    Does nothing if `out` holds this dataset already. Raises BadInput on a held-out document that also occurs
    in train, unreadable input or a full disk, and leaves `out` as it was.
    """
    check_names(name, splits)
    head = {
        "format": shards.MANIFEST_FORMAT,
        "name": name,
        "tokenizer": tokenizer.entry(),
        "bos_id": tokenizer.bos_id,
        "source": source,
    }
    found = reusable_manifest(out, head, options.replace)
    if found:
        return Built(found, is_new=False)

    leaks = LeakCheck()
    entries = {}
    with shards.Staging(out) as staging, Workers(options.workers, start_coder, tokenizer) as workers:
        if tokenizer.blob:
            write_tokenizer(staging, tokenizer.blob)
        held_out_splits = [split for split in splits if split != "train"]
        for split in [*held_out_splits, "train"]:  # train last, to compare it with the others
            writer = shards.ShardWriter(staging, name, split, options.shard_tokens)
            entries[split] = write_split(
                writer, split, splits[split], key=options.key, workers=workers, leaks=leaks
            )
        manifest = {**head, "splits": entries}
        staging.commit(manifest)
    return Built(manifest, is_new=True)


def write_tokenizer(staging: shards.Staging, blob: bytes) -> None:
    """Write the tokenizer's model file as a file of a `Staging`. Raises BadInput if that fails."""
    path = staging.temp(shards.MODEL)
    try:
        path.write_bytes(blob)
    except OSError as error:
        raise BadInput(explain(error, staging.out / shards.MODEL)) from None
