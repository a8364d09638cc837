"""Token shards and the dataset folder that holds them.

A shard has the challenge's own format: 256 int32 little-endian (magic 20240520, version 1, number of tokens,
zeros), then that many uint16 little-endian token ids, so 1024 + 2 * tokens bytes. Every document begins with
the tokenizer's BOS id; there is no end marker. The format comes from openai/parameter-golf
(data/download_hf_docs_and_tokenize.py), which took it from llm.c.

A dataset folder holds shards named {name}_{split}_{index:06d}.bin, `tokenizer.model` if the tokenizer is
SentencePiece, and `manifest.json`. The manifest is written last: a folder without it is not a dataset.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import numpy as np

from messages import BadInput, Progress, explain, read_whole, require_file

try:
    import fcntl
except ImportError:  # not a POSIX system: two builds of the same folder do not notice each other
    fcntl = None

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_VOCAB = 1 << 16  # ids are uint16
MAX_SHARD_TOKENS = (1 << 31) - 1  # the header counts in int32
SHARD_TOKENS = 100_000_000  # in a full shard of the challenge

MANIFEST_FORMAT = 1
MANIFEST = "manifest.json"
MODEL = "tokenizer.model"
TEMP = ".tmp."


class ManifestShard(TypedDict):
    """A shard in the manifest."""

    file: str
    tokens: int
    sha256: str


class ManifestSplit(TypedDict):
    """A split in the manifest. None: a download does not know it."""

    documents: int | None
    tokens: int
    text_bytes: int | None  # UTF-8, of the source documents
    decoded_bytes: int | None  # UTF-8, of the documents decoded from their tokens
    shards: list[ManifestShard]


class ManifestTokenizer(TypedDict):
    """The tokenizer in the manifest. file: that of SentencePiece; encoding: the name in tiktoken."""

    kind: str
    file: str | None
    encoding: str | None
    sha256: str
    vocab_size: int


class Manifest(TypedDict):
    """The contents of manifest.json. source: where the text came from; its keys depend on the command."""

    format: int
    name: str
    bos_id: int
    tokenizer: ManifestTokenizer
    splits: dict[str, ManifestSplit]
    source: dict[str, Any]


Kinds = type | tuple[type, ...]  # what a value in the manifest may be

# What the manifest's values are called in messages.
KINDS = {
    str: "text",
    int: "a whole number from 0",
    dict: "an object",
    list: "a list",
    type(None): "null",
}

# A command that is repeated compares sizes, not checksums, so a damaged file has to go.
REMEDY = "remove it and repeat the command that made the dataset"


# ---- the shard file ------------------------------------------------------------------------------


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def shard_header(tokens: int) -> bytes:
    """Return the 1024 header bytes of a shard of `tokens` ids."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()


def read_header(path: str | Path) -> int:
    """Return the number of tokens in a shard. Raises BadInput on a wrong magic, version or file size."""
    require_file(path)
    with open(path, "rb") as file:
        raw = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    if len(raw) < HEADER_BYTES:
        raise BadInput(f"{path}: {len(raw)} bytes, shorter than a shard header ({HEADER_BYTES}); {REMEDY}")

    magic, version, tokens = (int(value) for value in np.frombuffer(raw, dtype="<i4", count=3))
    if (magic, version) != (MAGIC, VERSION):
        raise BadInput(
            f"{path}: not a token shard (magic {magic}, version {version}; expected {MAGIC}, {VERSION}); "
            f"{REMEDY}"
        )
    promised = HEADER_BYTES + 2 * tokens
    if tokens < 1 or size != promised:
        raise BadInput(
            f"{path}: {size} bytes, but its header promises {tokens} tokens ({promised} bytes); {REMEDY}"
        )
    return tokens


def load_tokens(path: str | Path, most: int | None = None) -> np.ndarray:
    """Read the ids of a shard, at most the first `most`, uint16 (tokens,).

    They are not mapped: a file that is cut while it is mapped ends the process without a word. Raises
    BadInput as `read_header` does, and if the file is cut after that.
    """
    tokens = read_header(path)
    if most is not None:
        tokens = min(tokens, most)
    ids = np.fromfile(path, "<u2", tokens, offset=HEADER_BYTES)
    if len(ids) < tokens:
        raise BadInput(f"{path}: cut while it was read; {REMEDY}")
    return ids


def shard_pattern(split: str) -> str:
    """Return the file name pattern by which the trainer finds the shards of a split."""
    return f"*_{split}_[0-9]*.bin"


def shard_files(folder: str | Path) -> list[str]:
    """Return the names of all files in `folder` that look like a shard, sorted."""
    return sorted(path.name for path in Path(folder).glob("*_[0-9]*.bin") if not path.name.startswith("."))


class ShardWriter:
    """Append documents to the numbered shards of one split, which are temporary files of a `Staging`.

    limit: most tokens in a shard. A document that does not fit into the current shard begins the next one.
    Only a document longer than `limit` is cut, and then every piece but the last fills a shard exactly. A
    shard without BOS is one fragment of such a document.
    `shards` lists the finished shards as the manifest does.
    """

    def __init__(self, staging: Staging, name: str, split: str, limit: int) -> None:
        self.staging = staging
        self.prefix = f"{name}_{split}"
        self.limit = limit
        self.file: BinaryIO | None = None
        self.tokens = 0
        self.shards: list[ManifestShard] = []

    def add(self, ids: np.ndarray) -> None:
        """Append one document. ids: uint16 (n,), beginning with BOS."""
        if self.tokens and self.tokens + len(ids) > self.limit:
            self.close()
        for start in range(0, len(ids), self.limit):
            if self.tokens == self.limit:
                self.close()
            piece = ids[start : start + self.limit]
            self._write(piece.astype("<u2", copy=False).tobytes())
            self.tokens += len(piece)

    def _write(self, data: bytes) -> None:
        """Append bytes to the current shard, opening one if none is open."""
        if self.file is None:
            self.name = f"{self.prefix}_{len(self.shards):06d}.bin"
            self.path = self.staging.temp(self.name)
        try:
            if self.file is None:
                self.file = open(self.path, "wb", buffering=1 << 20)
                self.file.write(shard_header(0))
            self.file.write(data)
        except OSError as error:
            raise BadInput(explain(error, self.staging.out / self.name)) from None

    def close(self) -> None:
        """Complete the shard being written, if any, and list it."""
        if self.file is None:
            return
        try:
            self.file.seek(0)
            self.file.write(shard_header(self.tokens))
            self.file.close()
        except OSError as error:
            raise BadInput(explain(error, self.staging.out / self.name)) from None

        self.shards.append({"file": self.name, "tokens": self.tokens, "sha256": sha256_file(self.path)})
        self.file = None
        self.tokens = 0

    def abandon(self) -> None:
        """Close the open file after a failure. `Staging` removes it."""
        if self.file is not None:
            try:
                self.file.close()
            except OSError:  # closing writes what is buffered, and a full disk fails again
                pass


# ---- writing a dataset folder --------------------------------------------------------------------


class Staging:
    """Fill a dataset folder all or nothing: files keep temporary names until `commit`.

    A context manager. It locks the folder, and on failure it removes its temporary files and the folders that
    it created. `pending` maps the final name of each file to where the file is until `commit`.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.pending: dict[str, Path] = {}
        self.created: list[Path] = []
        self.lock: int | None = None  # a descriptor of the folder

    def __enter__(self) -> Staging:
        missing = [folder for folder in (self.out, *self.out.parents) if not folder.exists()]
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.created = missing
            self.lock = os.open(self.out, os.O_RDONLY)
        except OSError as error:
            raise BadInput(explain(error, self.out)) from None

        if fcntl:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self.lock)
                raise BadInput(f"{self.out}: another process is writing this dataset; wait for it") from None
            except OSError:  # some network file systems have no locks
                pass

        for stale in self.out.glob(f"{TEMP}*"):  # left by a build that was killed
            stale.unlink()
        return self

    def temp(self, name: str) -> Path:
        """Return the path at which to write the file that `commit` will call `name`."""
        self.pending[name] = self.out / (TEMP + name)
        return self.pending[name]

    def adopt(self, path: str | Path) -> None:
        """Let `commit` move a finished file from elsewhere into the folder, under its own name."""
        self.pending[Path(path).name] = Path(path)

    def commit(self, manifest: Manifest) -> None:
        """Give every file its final name, remove shards that the manifest does not list, write the manifest.

        Interrupted halfway, this leaves a folder without a manifest, which is better than a wrong dataset.
        """
        try:
            temp = self.temp(MANIFEST)
            temp.write_bytes(manifest_bytes(manifest))  # before any rename: the disk may be full
            self.pending.pop(MANIFEST)

            (self.out / MANIFEST).unlink(missing_ok=True)
            for name, path in self.pending.items():
                os.replace(path, self.out / name)
            listed = {shard["file"] for split in manifest["splits"].values() for shard in split["shards"]}
            for name in shard_files(self.out):
                if name not in listed:
                    (self.out / name).unlink()
            os.replace(temp, self.out / MANIFEST)
        except OSError as error:
            raise BadInput(explain(error, error.filename or self.out / MANIFEST)) from None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name in [*self.pending, MANIFEST]:
            (self.out / (TEMP + name)).unlink(missing_ok=True)
        os.close(self.lock)
        if kind is not None:
            self._remove_created_folders()

    def _remove_created_folders(self) -> None:
        """Remove the folders that `__enter__` created, innermost first, as long as they are empty."""
        for folder in self.created:
            try:
                folder.rmdir()
            except OSError:
                break


# ---- the manifest --------------------------------------------------------------------------------


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the canonical bytes of a manifest: equal datasets have equal manifests."""
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def load_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a dataset folder. Raises BadInput if it is absent or not sound."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(read_whole(path))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; give a folder made by download, text or offline") from None
    except OSError as error:
        raise BadInput(explain(error, path)) from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({error}); {REMEDY}") from None

    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise BadInput(f"{path}: key format is not {MANIFEST_FORMAT}; {REMEDY}")
    try:
        require_manifest(manifest)
    except ValueError as error:
        raise BadInput(f"{path}: {error}; {REMEDY}") from None
    return manifest


def require_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError at the first key of a manifest that is missing or has a value of another kind."""
    require_value(manifest, "name", str)
    require_value(manifest, "bos_id", int)
    source = require_value(manifest, "source", dict)
    if "options" in source:
        options = require_value(source, "options", dict, "source.")
        require_value(options, "shard_tokens", int, "source.options.")

    tokenizer = require_value(manifest, "tokenizer", dict)
    require_value(tokenizer, "kind", str, "tokenizer.")
    require_value(tokenizer, "sha256", str, "tokenizer.")
    require_value(tokenizer, "vocab_size", int, "tokenizer.")
    file = require_value(tokenizer, "file", (str, type(None)), "tokenizer.")
    encoding = require_value(tokenizer, "encoding", (str, type(None)), "tokenizer.")
    if not file and not encoding:
        raise ValueError("key tokenizer names neither a file nor an encoding")
    if file and file != MODEL:
        raise ValueError(f"key tokenizer.file is {file!r}, not {MODEL!r}")

    splits = require_value(manifest, "splits", dict)
    for split in ("train", "val", *splits):
        require_value(splits, split, dict, "splits.")
        require_split(splits[split], split)


def require_split(about: dict[str, Any], split: str) -> None:
    """Raise ValueError as `require_manifest` does, for the manifest's entry of one split."""
    prefix = f"splits.{split}."
    require_value(about, "tokens", int, prefix)
    for key in ("documents", "text_bytes", "decoded_bytes"):
        require_value(about, key, (int, type(None)), prefix)

    files = set()
    for number, shard in enumerate(require_value(about, "shards", list, prefix)):
        name = f"{prefix}shards[{number}]"
        require_kind(shard, dict, name)
        file = require_value(shard, "file", str, f"{name}.")
        require_value(shard, "tokens", int, f"{name}.")
        require_value(shard, "sha256", str, f"{name}.")
        if "/" in file or not fnmatch.fnmatch(file, shard_pattern(split)) or file in files:
            raise ValueError(f"key {name}.file is {file!r}, not a shard of its own of split {split}")
        files.add(file)
    if not files:
        raise ValueError(f"key {prefix}shards is empty")


def require_value(mapping: dict[str, Any], key: str, kinds: Kinds, prefix: str = "") -> Any:
    """Return mapping[key]. Raises ValueError if it is missing or `require_kind` refuses it.

    prefix: the keys that lead to `mapping`, for the message.
    """
    if key not in mapping:
        raise ValueError(f"key {prefix}{key} is missing")
    require_kind(mapping[key], kinds, f"{prefix}{key}")
    return mapping[key]


def require_kind(value: object, kinds: Kinds, name: str) -> None:
    """Raise ValueError if the value of the key `name` is of none of `kinds`, or a negative number."""
    if not isinstance(value, kinds) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        expected = " or ".join(KINDS[kind] for kind in kinds)
        raise ValueError(f"key {name} is {json.dumps(value)[:40]}, not {expected}")


# ---- checking a dataset folder -------------------------------------------------------------------


def check_dataset(folder: str | Path, deep: bool) -> list[str]:
    """Return everything that is wrong with a dataset folder, one line each; an empty list if it is sound.

    deep=False reads headers and sizes only. deep=True also reads every byte: checksums, ids below vocab_size,
    one BOS per document, and reports how far that is. A shard may begin inside a document only if the shard
    before it is full, since the challenge's own export cuts there.
    """
    folder = Path(folder)
    try:
        manifest = load_manifest(folder)
    except BadInput as error:
        return [str(error)]

    problems = check_tokenizer(folder, manifest)
    listed = set()
    tokens = sum(about["tokens"] for about in manifest["splits"].values())
    progress = Progress("verify", tokens, " tokens")
    for split, about in sorted(manifest["splits"].items()):
        listed.update(shard["file"] for shard in about["shards"])
        problems += check_split(folder, manifest, split, progress if deep else None)
    progress.erase()
    for name in shard_files(folder):
        if name not in listed:
            problems.append(
                f"{folder / name}: not in the manifest, but the trainer would read it; move it away"
            )
    return problems


def check_tokenizer(folder: Path, manifest: Manifest) -> list[str]:
    """Return what is wrong with the tokenizer file of a dataset folder, if it has one."""
    entry = manifest["tokenizer"]
    if not entry["file"]:
        return []
    path = folder / entry["file"]
    if not path.is_file():
        return [f"{path}: missing; repeat the command that made the dataset"]
    if sha256_file(path) != entry["sha256"]:
        return [f"{path}: not the tokenizer of this dataset (sha256 differs from the manifest); {REMEDY}"]
    return []


def check_split(folder: Path, manifest: Manifest, split: str, progress: Progress | None) -> list[str]:
    """Return what is wrong with the shards of one split; see `check_dataset`. progress: None if not deep."""
    deep = progress is not None
    about = manifest["splits"][split]
    full_shard = (manifest["source"].get("options") or {}).get("shard_tokens", SHARD_TOKENS)

    problems = []
    if sum(shard["tokens"] for shard in about["shards"]) != about["tokens"]:
        problems.append(
            f"{folder / MANIFEST}: split {split}: tokens is not the sum over its shards; {REMEDY}"
        )

    bos_count = 0
    tokens_before = None  # in the shard before
    for shard in about["shards"]:
        path = folder / shard["file"]
        try:
            ids = load_listed_shard(path, shard, deep)
        except BadInput as error:
            problems.append(str(error))
        else:
            problems += check_ids(path, ids, manifest, may_continue=tokens_before == full_shard)
            bos_count += int(np.count_nonzero(ids == manifest["bos_id"]))
        tokens_before = shard["tokens"]
        if progress:
            progress.advance(shard["tokens"])

    if deep and not problems and about["documents"] not in (None, bos_count):
        problems.append(
            f"{folder / MANIFEST}: split {split}: {about['documents']} documents, "
            f"but {bos_count} BOS tokens; {REMEDY}"
        )
    return problems


def check_ids(path: Path, ids: np.ndarray, manifest: Manifest, may_continue: bool) -> list[str]:
    """Return what is wrong with the ids of a shard, of which those that were read are given.

    may_continue: whether it may begin inside a document.
    """
    bos = manifest["bos_id"]
    vocab_size = manifest["tokenizer"]["vocab_size"]
    first, highest = int(ids[0]), int(ids.max())
    problems = []
    if highest >= vocab_size:
        problems.append(f"{path}: token id {highest}, vocab_size is {vocab_size}; {REMEDY}")
    if first != bos and not may_continue:
        problems.append(f"{path}: begins with token {first}, not BOS ({bos}); {REMEDY}")
    return problems


def load_listed_shard(path: Path, entry: ManifestShard, deep: bool) -> np.ndarray:
    """Read the ids of a shard that must match its manifest entry; deep=False: the first id.

    Raises BadInput if it does not match.
    """
    try:
        count = read_header(path)
        if count != entry["tokens"]:
            raise BadInput(f"{path}: {count} tokens, manifest says {entry['tokens']}; {REMEDY}")
        tokens = load_tokens(path, most=None if deep else 1)
        if deep and sha256_file(path) != entry["sha256"]:
            raise BadInput(f"{path}: sha256 differs from the manifest; {REMEDY}")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; repeat the command that made the dataset") from None
    except OSError as error:
        raise BadInput(explain(error, path)) from None
    return tokens
