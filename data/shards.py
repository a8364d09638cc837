"""Token shards: the file format, the dataset folder, and turning documents into one.

A shard is the challenge's own format: 256 int32 little-endian (magic 20240520, version 1, number of
tokens, zeros), then that many uint16 little-endian token ids; 1024 + 2 * tokens bytes in all.
Every document begins with the tokenizer's BOS id; no end marker is written.

A dataset folder is shards named {name}_{split}_{index:06d}.bin, `tokenizer.model` when the tokenizer is
SentencePiece, and `manifest.json`, which is written last: a folder without it is not a dataset.
The format is from openai/parameter-golf (data/download_hf_docs_and_tokenize.py) and, before it, llm.c.
"""

import errno
import fnmatch
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:                             # not a POSIX system: two builders at once go unnoticed
    fcntl = None

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_VOCAB = 1 << 16                             # ids are uint16
MAX_SHARD_TOKENS = (1 << 31) - 1                # the header counts in int32
SHARD_TOKENS = 100_000_000                      # tokens in a full official shard
FORMAT = 1
BATCH_CHARS = 1 << 20                           # one unit of work for a tokenizing process
MANIFEST, MODEL, TEMP = "manifest.json", "tokenizer.model", ".tmp."


class DataError(Exception):
    """Bad input or a failed build. The message is the one line a user sees: what, where, remedy."""

    status = 1


# -----------------------------------------------------------------------------
# Messages
# -----------------------------------------------------------------------------

def say(line):
    """One plain line on stderr; stdout is kept for results that scripts read."""
    print(line, file=sys.stderr, flush=True)


def explain(error, path=None):
    """An OSError as one line with its remedy. `path` names the file when the error does not."""
    name = path or error.filename or "file"
    reason = (error.strerror or str(error)).lower()
    remedy = {
        errno.ENOSPC: "free some space or choose an --out on a larger disk",
        errno.EDQUOT: "free some of your quota or choose another --out",
        errno.EFBIG: "choose an --out on another file system, or fewer --shard-tokens",
        errno.ENOENT: "check the path",
        errno.EISDIR: "give a file, not a folder",
    }.get(error.errno, "check its permissions, or choose another path")
    return f"{name}: {reason}; {remedy}"


def require(module):
    """Import a third-party module that only some verbs need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"python package {module} is missing ({error}); "
                        "run: pip install -r requirements.txt") from None


def mb(count):
    """Bytes as decimal megabytes, as text."""
    return f"{count / 1e6:.1f} MB"


def short(count):
    """A count with its decimal prefix, as text: 37.2M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{suffix}"
    return str(int(count))


class Progress:
    """One updating line with an ETA on a terminal; elsewhere a plain line every 15 s. Then a closing line.

    total: the value of `done` at the end, in the unit of `update`; 0 when unknown.
    """

    def __init__(self, label, total, unit="B", stream=None):
        self.label, self.total, self.unit = label, total, unit
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.start = self.last = time.perf_counter()

    def update(self, done):
        """Show `done` units, at most every 0.2 s (terminal) or 15 s."""
        now = time.perf_counter()
        if now - self.last < (0.2 if self.live else 15.0) or not done:
            return
        self.last = now
        spent = now - self.start
        text = f"{self.label}: {short(done)}{self.unit} {short(done / spent)}{self.unit}/s"
        if self.total:
            left = spent * max(self.total - done, 0) / done
            text += f" {min(100 * done / self.total, 100):.0f} % ETA {int(left) // 60}:{int(left) % 60:02d}"
        self.stream.write(f"\r\x1b[K{text}" if self.live else f"{text}\n")
        self.stream.flush()

    def close(self, summary):
        """The closing line, with the time taken."""
        spent = time.perf_counter() - self.start
        self.stream.write(("\r\x1b[K" if self.live else "") + f"{self.label}: {summary}, {spent:.1f} s\n")
        self.stream.flush()


# -----------------------------------------------------------------------------
# The shard file
# -----------------------------------------------------------------------------

def sha256_file(path):
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def shard_header(tokens):
    """The 1024 header bytes of a shard of `tokens` ids."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()


def read_header(path):
    """Tokens in the shard at `path`. DataError on a wrong magic, version or file size."""
    with open(path, "rb") as file:
        raw = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    if len(raw) < HEADER_BYTES:
        raise DataError(f"{path}: {len(raw)} bytes, shorter than a shard header ({HEADER_BYTES}); "
                        "fetch or build it again")
    magic, version, tokens = (int(x) for x in np.frombuffer(raw, dtype="<i4", count=3))
    if (magic, version) != (MAGIC, VERSION):
        raise DataError(f"{path}: not a token shard (magic {magic}, version {version}; expected {MAGIC}, "
                        f"{VERSION}); remove it, then fetch or build it again")
    if tokens < 1 or size != HEADER_BYTES + 2 * tokens:
        raise DataError(f"{path}: {size} bytes, but its header promises {tokens} tokens "
                        f"({HEADER_BYTES + 2 * tokens} bytes); fetch or build it again")
    return tokens


def load_tokens(path):
    """The ids of a shard, uint16 (tokens,), mapped and not read. DataError as `read_header`."""
    tokens = read_header(path)
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(tokens,))


def shard_pattern(split):
    """The file pattern by which a trainer finds the shards of a split."""
    return f"*_{split}_[0-9]*.bin"


def shard_files(folder):
    """Names of everything in `folder` that looks like a shard, sorted."""
    return sorted(p.name for p in Path(folder).glob("*_[0-9]*.bin") if not p.name.startswith("."))


class ShardWriter:
    """Appends documents to numbered shards of one split, as temporary files of a `Staging`.

    A document moves to the next shard rather than be cut; only one that is longer than a whole shard is
    cut, and then every piece but its last fills a shard exactly.
    """

    def __init__(self, staging, name, split, limit):
        self.staging, self.prefix, self.limit = staging, f"{name}_{split}", limit
        self.file, self.tokens, self.shards = None, 0, []

    def add(self, ids):
        """ids: uint16 (n,), one document with its BOS."""
        if self.tokens and self.tokens + len(ids) > self.limit:
            self.close()
        for start in range(0, len(ids), self.limit):
            if self.tokens == self.limit:
                self.close()
            piece = ids[start:start + self.limit]
            self._write(piece.astype("<u2", copy=False).tobytes())
            self.tokens += len(piece)

    def _write(self, data):
        if self.file is None:
            self.name = f"{self.prefix}_{len(self.shards):06d}.bin"
            self.path = self.staging.temp(self.name)
        try:
            if self.file is None:
                self.file = open(self.path, "wb", buffering=1 << 20)
                self.file.write(shard_header(0))
            self.file.write(data)
        except OSError as error:
            raise DataError(explain(error, self.staging.out / self.name)) from None

    def close(self):
        """Finish the shard being written, if any."""
        if self.file is None:
            return
        try:
            self.file.seek(0)
            self.file.write(shard_header(self.tokens))
            self.file.close()
        except OSError as error:
            raise DataError(explain(error, self.staging.out / self.name)) from None
        self.shards.append({"file": self.name, "tokens": self.tokens, "sha256": sha256_file(self.path)})
        self.file, self.tokens = None, 0

    def abandon(self):
        """Release the open file after a failure; `Staging` removes it."""
        if self.file is not None:
            try:
                self.file.close()
            except OSError:                     # a full disk fails again on the buffered rest
                pass


# -----------------------------------------------------------------------------
# The dataset folder
# -----------------------------------------------------------------------------

class Staging:
    """A folder being filled: temporary names until `commit`, nothing left behind on failure."""

    def __init__(self, out):
        self.out = Path(out)
        self.pending, self.created, self.lock = {}, [], None   # pending: name -> path for now

    def __enter__(self):
        parents = [self.out, *self.out.parents]
        missing = [p for p in parents if not p.exists()]
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.created = missing
            self.lock = os.open(self.out, os.O_RDONLY)
        except OSError as error:
            raise DataError(explain(error, self.out)) from None
        if fcntl:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self.lock)
                raise DataError(f"{self.out}: another process is writing this dataset; wait for it") from None
            except OSError:                     # some network file systems have no locks
                pass
        for stale in self.out.glob(f"{TEMP}*"):  # a build that was killed
            stale.unlink()
        return self

    def temp(self, name):
        """Path to write the file that will be called `name`."""
        self.pending[name] = self.out / (TEMP + name)
        return self.pending[name]

    def adopt(self, path):
        """Let `commit` move a finished file that lies elsewhere into the folder."""
        self.pending[Path(path).name] = Path(path)

    def commit(self, manifest):
        """Give every file its name, drop shards that the manifest does not list, write the manifest last."""
        try:
            temp = self.temp(MANIFEST)          # before anything is moved, lest the disk is full only now
            temp.write_bytes(manifest_bytes(manifest))
            self.pending.pop(MANIFEST)
            # Interrupted between these lines there is no dataset, which is better than a wrong one.
            (self.out / MANIFEST).unlink(missing_ok=True)
            for name, path in self.pending.items():
                os.replace(path, self.out / name)
            listed = {s["file"] for split in manifest["splits"].values() for s in split["shards"]}
            for name in shard_files(self.out):
                if name not in listed:
                    (self.out / name).unlink()
            os.replace(temp, self.out / MANIFEST)
        except OSError as error:
            raise DataError(explain(error, error.filename or self.out / MANIFEST)) from None

    def __exit__(self, kind, *_):
        for name in [*self.pending, MANIFEST]:
            (self.out / (TEMP + name)).unlink(missing_ok=True)
        os.close(self.lock)
        if kind is not None:
            for folder in self.created:
                try:
                    folder.rmdir()
                except OSError:
                    break


def manifest_bytes(manifest):
    """The canonical bytes of a manifest: equal datasets have equal manifests."""
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def load_manifest(folder):
    """The manifest of a dataset folder. DataError when it is absent, not JSON or lacks a key."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give a folder made by download, text or offline") from None
    except OSError as error:
        raise DataError(explain(error, path)) from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); build the dataset again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: key format is not {FORMAT}; build the dataset again with this version")
    try:
        for split in manifest["splits"].values():
            for shard in split["shards"]:
                (shard["file"], shard["tokens"], shard["sha256"])
            (split["documents"], split["tokens"], split["text_bytes"], split["decoded_bytes"])
        (manifest["name"], manifest["bos_id"], manifest["source"])
        for key in ("kind", "file", "encoding", "sha256", "vocab_size"):
            manifest["tokenizer"][key]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: incomplete ({error}); build the dataset again") from None
    return manifest


def check_dataset(folder, deep):
    """Everything wrong with a dataset folder, one line each; empty when it is sound.

    deep=False reads headers and sizes only. deep=True also reads every byte: checksums, ids below
    vocab_size, one BOS per document. A shard may begin inside a document only when the one before it is
    full: the challenge's own export cuts there.
    """
    folder = Path(folder)
    try:
        manifest = load_manifest(folder)
    except DataError as error:
        return [str(error)]
    problems = []
    entry = manifest["tokenizer"]
    if entry["file"] and not (folder / entry["file"]).is_file():
        problems.append(f"{folder / entry['file']}: missing; build or fetch the dataset again")
    elif entry["file"] and sha256_file(folder / entry["file"]) != entry["sha256"]:
        problems.append(f"{folder / entry['file']}: not the tokenizer of this dataset "
                        "(sha256 differs from the manifest); build or fetch the dataset again")
    listed = set()
    for split, about in sorted(manifest["splits"].items()):
        listed.update(shard["file"] for shard in about["shards"])
        problems += check_split(folder, manifest, split, deep)
    for name in shard_files(folder):
        if name not in listed:
            problems.append(f"{folder / name}: not in the manifest, but a trainer would read it; "
                            "move it away")
    return problems


def check_split(folder, manifest, split, deep):
    """`check_dataset` for the shards of one split."""
    about, problems = manifest["splits"][split], []
    vocab, bos = manifest["tokenizer"]["vocab_size"], manifest["bos_id"]
    options = manifest["source"].get("options") or {}
    full, previous, starts = options.get("shard_tokens", SHARD_TOKENS), None, 0
    if sum(shard["tokens"] for shard in about["shards"]) != about["tokens"]:
        problems.append(f"{folder / MANIFEST}: split {split}: tokens is not the sum over its shards; "
                        "build it again")
    for shard in about["shards"]:
        path = folder / shard["file"]
        try:
            tokens = load_tokens(path)
            if len(tokens) != shard["tokens"]:
                raise DataError(f"{path}: {len(tokens)} tokens, manifest says {shard['tokens']}; "
                                "fetch or build it again")
            if deep and sha256_file(path) != shard["sha256"]:
                raise DataError(f"{path}: sha256 differs from the manifest; fetch or build it again")
        except OSError as error:
            problems.append(explain(error, path))
            continue
        except DataError as error:
            problems.append(str(error))
            continue
        if deep and int(tokens.max()) >= vocab:
            problems.append(f"{path}: token id {int(tokens.max())}, vocab_size is {vocab}; wrong tokenizer")
        if int(tokens[0]) != bos and previous != full:
            problems.append(f"{path}: begins with token {int(tokens[0])}, not BOS ({bos}); build it again")
        starts += int(np.count_nonzero(tokens == bos)) if deep else 0
        previous = len(tokens)
    if deep and not problems and about["documents"] not in (None, starts):
        problems.append(f"{folder}: split {split}: {starts} BOS tokens, {about['documents']} documents; "
                        "build it again")
    return problems


# -----------------------------------------------------------------------------
# Tokenizers
# -----------------------------------------------------------------------------

@dataclass(frozen=True)
class Tokenizer:
    """What identifies a tokenizer; picklable, so that every process can `load` it.

    kind: "sentencepiece" (blob: the bytes of the .model file) or "tiktoken" (encoding: its name).
    """

    kind: str
    encoding: str | None
    sha256: str
    vocab_size: int
    bos_id: int
    blob: bytes = field(default=b"", repr=False)

    def entry(self):
        """The manifest's `tokenizer` object."""
        return {"kind": self.kind, "file": MODEL if self.blob else None, "encoding": self.encoding,
                "sha256": self.sha256, "vocab_size": self.vocab_size}

    def load(self):
        """(encode, decoded_bytes): documents -> lists of ids; texts, ids -> UTF-8 bytes after decoding."""
        if self.kind == "sentencepiece":
            sp = require("sentencepiece").SentencePieceProcessor(model_proto=self.blob)
            encode = lambda texts: sp.encode(texts, num_threads=1)      # noqa: E731  processes, not threads
            return encode, lambda texts, ids: [len(t.encode()) for t in sp.decode(ids, num_threads=1)]
        bpe = require("tiktoken").get_encoding(self.encoding)
        # Byte-level BPE decodes to the text itself, so there is nothing to decode.
        return (lambda texts: [bpe.encode_ordinary(t) for t in texts],
                lambda texts, ids: [len(t.encode()) for t in texts])


def open_tokenizer(name):
    """Tokenizer for a SentencePiece .model file or a tiktoken encoding name. DataError when it is neither."""
    path = Path(name)
    is_file = path.suffix == ".model" or path.exists()
    tokenizer = sentencepiece_tokenizer(path) if is_file else tiktoken_tokenizer(name)
    if tokenizer.vocab_size > MAX_VOCAB:
        raise DataError(f"{name}: vocab_size {tokenizer.vocab_size}, but shards hold 16-bit ids "
                        f"({MAX_VOCAB} at most); choose a smaller tokenizer")
    return tokenizer


def sentencepiece_tokenizer(path):
    """Tokenizer for the SentencePiece model file at `path`."""
    sp = require("sentencepiece").SentencePieceProcessor()
    try:
        blob = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"--tokenizer {explain(error, path)}") from None
    try:
        sp.load_from_serialized_proto(blob)
        vocab, bos = sp.vocab_size(), sp.bos_id()
    except (RuntimeError, OSError, ValueError):
        vocab = bos = 0
    if not vocab:
        raise DataError(f"--tokenizer {path}: not a SentencePiece model; "
                        "give a .model file or a tiktoken encoding name")
    if bos < 0:
        raise DataError(f"--tokenizer {path}: the model has no BOS piece; train it with bos_id >= 0")
    return Tokenizer("sentencepiece", None, hashlib.sha256(blob).hexdigest(), vocab, bos, blob)


def tiktoken_tokenizer(name):
    """Tokenizer for a tiktoken encoding; sha256 is over its ranks and special tokens, sorted."""
    tiktoken = require("tiktoken")
    try:
        bpe = tiktoken.get_encoding(name)
    except ValueError:
        known = ", ".join(tiktoken.list_encoding_names())
        raise DataError(f"--tokenizer {name}: no such file and no such tiktoken encoding; "
                        f"give a SentencePiece .model file or one of {known}") from None
    except Exception as error:                  # requests, httpx or plain sockets, by tiktoken's version
        reason = str(error).split("\n")[0][:100]
        raise DataError(f"--tokenizer {name}: tiktoken could not fetch its vocabulary "
                        f"({type(error).__name__}: {reason}); connect once, or set TIKTOKEN_CACHE_DIR "
                        "to a filled cache") from None
    digest = hashlib.sha256()
    for token, rank in sorted(bpe._mergeable_ranks.items()):
        digest.update(b"%d %s\n" % (rank, token.hex().encode()))
    for token, rank in sorted(bpe._special_tokens.items()):
        digest.update(b"%d %s\n" % (rank, token.encode()))
    return Tokenizer("tiktoken", name, digest.hexdigest(), bpe.n_vocab, bpe.eot_token)


# -----------------------------------------------------------------------------
# Documents
# -----------------------------------------------------------------------------

FORMATS = (".txt", ".txt.zst", ".jsonl", ".jsonl.zst")


def read_blocks(path):
    """(block of bytes, bytes of the file read so far); unpacks .zst by name. DataError on a damaged file."""
    with open(path, "rb") as raw:
        if not str(path).endswith(".zst"):
            while block := raw.read(1 << 20):
                yield block, raw.tell()
            return
        zstandard = require("zstandard")
        # `zstd --long` writes windows that the library refuses unless told otherwise.
        context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        frame = None                            # a stream_reader would end quietly when the file is cut short
        try:
            while block := raw.read(1 << 18):
                while block:
                    frame = frame or context.decompressobj()
                    yield frame.decompress(block), raw.tell()
                    block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        except zstandard.ZstdError as error:
            raise DataError(f"{path}: damaged zstd file ({error}); copy it again") from None
        if frame is not None:
            raise DataError(f"{path}: zstd file cut short; copy it again")


def split_blocks(blocks, separator):
    """(bytes between separators, position) from `read_blocks`."""
    rest, position = [], 0
    for block, position in blocks:
        first, *more = block.split(separator)
        rest.append(first)
        for piece in more:
            yield b"".join(rest), position
            rest = [piece]
    yield b"".join(rest), position


def json_text(path, number, line, key):
    """The text field of one JSON line."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}: line {number}: not JSON ({error}); "
                        "one object per line is expected") from None
    if not isinstance(row, dict) or not isinstance(row.get(key), str):
        found = ", ".join(sorted(row)[:8]) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{path}: line {number}: no text field {key!r} (found: {found}); "
                        "name it with --field")
    return row[key]


def read_documents(path, key="text"):
    """(document, bytes of the file read so far), in file order; blank documents are skipped.

    Documents of .txt are separated by one NUL byte; .jsonl holds one object per line with the text in
    `key`. DataError on bytes that are not UTF-8 and on malformed lines.
    """
    lines = str(path).endswith((".jsonl", ".jsonl.zst"))
    pieces = split_blocks(read_blocks(path), b"\n" if lines else b"\0")
    for number, (piece, position) in enumerate(pieces, 1):
        if not piece.strip():
            continue
        try:
            text = json_text(path, number, piece, key) if lines else piece.decode()
            text.encode()                       # JSON may hold lone surrogates
        except UnicodeError:
            raise DataError(f"{path}: {'line' if lines else 'document'} {number}: not valid UTF-8; "
                            "convert the file, for example with iconv") from None
        if text.strip():
            yield text, position


def fingerprint(text):
    """16 bytes that agree for texts equal up to case and white space."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()


def batches(path, key):
    """(documents, bytes read so far) in units of about a megabyte: what one process tokenizes at a time."""
    docs, chars, position = [], 0, 0
    for text, position in read_documents(path, key):
        docs.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield docs, position
            docs, chars = [], 0
    if docs:
        yield docs, position


_coder = None                                   # this process's (encode, decoded_bytes, bos_id)


def start_coder(tokenizer):
    """Load the tokenizer once per process."""
    global _coder
    _coder = (*tokenizer.load(), tokenizer.bos_id)


def ignore_interrupt():
    """Ctrl-C reaches every process of a terminal; only the parent should answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def start_worker(tokenizer):
    """`start_coder` in a process of its own."""
    ignore_interrupt()
    start_coder(tokenizer)


def encode_batch(docs):
    """docs -> (list of uint16 arrays with BOS, UTF-8 bytes, decoded bytes, fingerprints), lists of len(docs).

    A document that normalizes to nothing (control characters only) becomes an empty array.
    """
    encode, decoded_bytes, bos = _coder
    ids = encode(docs)
    arrays = [np.array([bos, *doc] if doc else [], dtype=np.uint16) for doc in ids]
    return arrays, [len(d.encode()) for d in docs], decoded_bytes(docs, ids), [fingerprint(d) for d in docs]


class Encoders:
    """Processes that tokenize; a context manager. With workers=1 this process does it itself."""

    def __init__(self, tokenizer, workers):
        self.pool, self.depth = None, 2 * workers + 2
        if workers == 1:
            start_coder(tokenizer)
        else:
            context = multiprocessing.get_context("spawn")      # fork is unsafe beside other threads
            self.pool = ProcessPoolExecutor(workers, context, start_worker, (tokenizer,))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def run(self, work):
        """(docs, position, encode_batch(docs)) for every (docs, position) of `work`, in order.

        The order, and so the output, does not depend on the number of workers; at most `depth` batches are
        in memory.
        """
        if not self.pool:
            for docs, position in work:
                yield docs, position, encode_batch(docs)
            return
        waiting = deque()
        try:
            for docs, position in work:
                waiting.append((docs, position, self.pool.submit(encode_batch, docs)))
                if len(waiting) == self.depth:
                    docs, position, future = waiting.popleft()
                    yield docs, position, future.result()
            for docs, position, future in waiting:
                yield docs, position, future.result()
        except BrokenProcessPool:
            raise DataError("a tokenizing process died, probably for lack of memory; "
                            "use --workers 1") from None


# -----------------------------------------------------------------------------
# Building a dataset
# -----------------------------------------------------------------------------

@dataclass(frozen=True)
class BuildOptions:
    """key: text field of .jsonl; shard_tokens: most tokens in a shard; replace: overwrite another dataset."""

    key: str = "text"
    shard_tokens: int = SHARD_TOKENS
    workers: int = 1
    replace: bool = False


def check_names(name, splits):
    """DataError when a shard of one split would be found under the pattern of another."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise DataError(f"--name {name!r}: use letters, digits, '_', '-' and '.' only")
    for split in splits:
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z][a-z0-9]*)*", split):
            raise DataError(f"--split {split!r}: use lower-case words joined by '_', such as val_news")
        for other in splits:
            if other != split and fnmatch.fnmatch(f"{name}_{split}_000000.bin", shard_pattern(other)):
                raise DataError(f"--split {split!r}: its files would also match {shard_pattern(other)} of "
                                f"split {other!r}; choose another split or dataset name")


def describe_inputs(splits):
    """The manifest's list of input files; DataError on one that is missing, empty or of no known format."""
    inputs = []
    for split, files in splits.items():
        for path in files:
            if not str(path).endswith(FORMATS):
                raise DataError(f"{path}: unknown input format; name it {', '.join(FORMATS)}")
            try:
                size = os.stat(path).st_size
                digest = sha256_file(path)
            except OSError as error:
                raise DataError(explain(error, path)) from None
            if not size:
                raise DataError(f"{path}: empty file; leave it out or fill it")
            inputs.append({"split": split, "file": Path(path).name, "bytes": size, "sha256": digest})
    return inputs


def reuse(out, head, replace):
    """The manifest in `out` when it describes this very dataset and the files are whole, else None.

    head: the manifest that is to be, without its splits. DataError when `out` holds something else.
    """
    out = Path(out)
    if not (out / MANIFEST).exists():
        strays = [f for f in shard_files(out) if not f.startswith(head["name"] + "_")]
        if strays and not replace:
            raise DataError(f"{out}: holds {strays[0]} but no {MANIFEST}; choose another --out, "
                            "remove it, or use --replace")
        return None
    try:
        manifest = load_manifest(out)
    except DataError:
        if replace:
            return None
        raise
    if all(manifest.get(key) == value for key, value in head.items()):
        problems = check_dataset(out, deep=False)
        if not problems:
            return manifest
        say(f"building again: {problems[0]}")
    elif not replace:
        different = ", ".join(sorted(key for key, value in head.items() if manifest.get(key) != value))
        raise DataError(f"{out}: holds another dataset (different {different}); choose another --out, "
                        "remove it, or use --replace")
    return None


class Held:
    """Fingerprints of the held-out documents, and the refusal when one turns up in train."""

    def __init__(self):
        self.seen = {}

    def add(self, mark, split, path, index, text):
        """Remember document `index` of `path` by its fingerprint."""
        self.seen.setdefault(mark, (split, index, text[:60], path))

    def refuse(self, mark, path, index):
        """DataError when the train document `index` of `path` is held out too."""
        if mark in self.seen:
            split, number, start, held = self.seen[mark]
            raise DataError(f"{held}: {split} document {number} ({start!r}) also occurs in train: {path} "
                            f"document {index}; remove it from one of the two")


def write_split(writer, split, files, key, encoders, held):
    """Tokenize the files of one split into a ShardWriter; returns the manifest's entry for it.

    key: the text field of .jsonl. Documents are numbered from 0 in each file. Train must come last.
    """
    totals = {"documents": 0, "tokens": 0, "text_bytes": 0, "decoded_bytes": 0}
    progress = Progress(f"tokenize {split}", sum(os.stat(f).st_size for f in files))
    before = 0                                  # bytes of the files already done
    try:
        for path in files:
            index = 0
            for docs, position, encoded in encoders.run(batches(path, key)):
                for text, ids, size, decoded, mark in zip(docs, *encoded):
                    if split == "train":
                        held.refuse(mark, path, index)
                    else:
                        held.add(mark, split, path, index, text)
                    index += 1
                    if not len(ids):
                        continue
                    writer.add(ids)
                    for key, count in zip(totals, (1, len(ids), size, decoded)):
                        totals[key] += count
                progress.update(before + position)
            if not index:
                raise DataError(f"{path}: no documents; leave it out or fill it")
            if index == 1 and ".txt" in str(path):
                say(f"{path}: no NUL byte, so the whole file is one document")
            before += os.stat(path).st_size
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    if not totals["tokens"]:
        raise DataError(f"{files[0]}: no document of split {split} has any text; fill it")
    ratio = totals["text_bytes"] / max(totals["tokens"] - totals["documents"], 1)      # BOS not counted
    progress.close(f"{totals['documents']} documents, {mb(totals['text_bytes'])}, "
                   f"{short(totals['tokens'])} tokens, {ratio:.4f} bytes/token")
    return {**totals, "shards": writer.shards}


def build(out, name, tokenizer, splits, source, options):
    """Write the dataset `name` into the folder `out` and return (manifest, True when built just now).

    splits: {split name: [input files]} with "train" and at least one other. source: the manifest's
    `source`. Nothing is written when it is already there. DataError, with `out` as it was, on a held-out
    document that also occurs in train, unreadable input or a full disk.
    """
    check_names(name, splits)
    head = {"format": FORMAT, "name": name, "tokenizer": tokenizer.entry(), "bos_id": tokenizer.bos_id,
            "source": source}
    found = reuse(out, head, options.replace)
    if found:
        return found, False
    held, done = Held(), {}
    with Staging(out) as staging, Encoders(tokenizer, options.workers) as encoders:
        if tokenizer.blob:
            model = staging.temp(MODEL)
            try:
                model.write_bytes(tokenizer.blob)
            except OSError as error:
                raise DataError(explain(error, staging.out / MODEL)) from None
        for split in sorted(splits, key=lambda s: s == "train"):        # last: it is compared with the others
            writer = ShardWriter(staging, name, split, options.shard_tokens)
            done[split] = write_split(writer, split, splits[split], options.key, encoders, held)
        manifest = {**head, "splits": done}
        staging.commit(manifest)
    return manifest, True


def text_source(splits, options):
    """The manifest's `source` of a dataset made from text files."""
    return {"kind": "text", "inputs": describe_inputs(splits),
            "options": {"field": options.key, "shard_tokens": options.shard_tokens}}
