"""Tokenizers of a dataset, SentencePiece models and tiktoken encodings, and the bytes of their tokens."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

import shards
from messages import DataError, explain, require

COUNT_TOKENS = 1 << 22  # how many tokens count_bytes holds in memory at a time


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer's identity. Picklable, so that every process can `load` it.

    kind: "sentencepiece" (blob: the bytes of the .model file) or "tiktoken" (encoding: its name).
    """

    kind: str
    encoding: str | None
    sha256: str
    vocab_size: int
    bos_id: int
    blob: bytes = field(default=b"", repr=False)

    def entry(self):
        """Return the manifest's `tokenizer` object."""
        return {
            "kind": self.kind,
            "file": shards.MODEL if self.blob else None,
            "encoding": self.encoding,
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
        }

    def load(self):
        """Return a coder: SentencePieceCoder or TiktokenCoder."""
        if self.kind == "sentencepiece":
            return SentencePieceCoder(self)
        return TiktokenCoder(self)


class SentencePieceCoder:
    """Encode with a SentencePiece model, on one thread: the work is spread over processes."""

    def __init__(self, tokenizer):
        self.bos_id = tokenizer.bos_id
        self.processor = require("sentencepiece").SentencePieceProcessor(model_proto=tokenizer.blob)

    def encode(self, texts):
        """Return the ids of each text, as lists, without BOS."""
        return self.processor.encode(texts, num_threads=1)

    def decoded_bytes(self, texts, ids):
        """Return the UTF-8 length of each text decoded from its ids."""
        return [len(text.encode()) for text in self.processor.decode(ids, num_threads=1)]


class TiktokenCoder:
    """Encode with a tiktoken encoding; text that spells a special token is ordinary text."""

    def __init__(self, tokenizer):
        self.bos_id = tokenizer.bos_id
        self.encoding = require("tiktoken").get_encoding(tokenizer.encoding)

    def encode(self, texts):
        """Return the ids of each text, as lists, without BOS."""
        return [self.encoding.encode_ordinary(text) for text in texts]

    def decoded_bytes(self, texts, ids):
        """Return the UTF-8 length of each text: byte-level BPE decodes to the text itself."""
        return [len(text.encode()) for text in texts]


# -----------------------------------------------------------------------------
# Opening a tokenizer
# -----------------------------------------------------------------------------


def open_tokenizer(name):
    """Return the Tokenizer of a .model file or a tiktoken encoding. Raises DataError if it is neither."""
    path = Path(name)
    if path.suffix == ".model" or path.exists():
        tokenizer = sentencepiece_tokenizer(path)
    else:
        tokenizer = tiktoken_tokenizer(name)
    if tokenizer.vocab_size > shards.MAX_VOCAB:
        raise DataError(
            f"{name}: vocab_size {tokenizer.vocab_size}, but shards hold 16-bit ids "
            f"({shards.MAX_VOCAB} at most); choose a smaller tokenizer"
        )
    return tokenizer


def sentencepiece_tokenizer(path):
    """Return the Tokenizer of the SentencePiece model file at `path`. Raises DataError if it is not one."""
    processor = require("sentencepiece").SentencePieceProcessor()
    try:
        blob = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"--tokenizer {explain(error, path)}") from None
    try:
        processor.load_from_serialized_proto(blob)
        vocab_size = processor.vocab_size()
        bos_id = processor.bos_id()
    except (RuntimeError, OSError, ValueError):
        vocab_size = bos_id = 0
    if not vocab_size:
        raise DataError(
            f"--tokenizer {path}: not a SentencePiece model; give a .model file or a tiktoken encoding name"
        )
    if bos_id < 0:
        raise DataError(f"--tokenizer {path}: the model has no BOS piece; train it with bos_id >= 0")

    return Tokenizer(
        kind="sentencepiece",
        encoding=None,
        sha256=hashlib.sha256(blob).hexdigest(),
        vocab_size=vocab_size,
        bos_id=bos_id,
        blob=blob,
    )


def tiktoken_tokenizer(name):
    """Return the Tokenizer of a tiktoken encoding, its sha256 over the sorted ranks and special tokens.

    Raises DataError if there is no such encoding, or if its vocabulary is neither cached nor reachable.
    """
    tiktoken = require("tiktoken")
    try:
        encoding = tiktoken.get_encoding(name)
    except ValueError:
        known = ", ".join(tiktoken.list_encoding_names())
        raise DataError(
            f"--tokenizer {name}: no such file and no such tiktoken encoding; "
            f"give a SentencePiece .model file or one of {known}"
        ) from None
    except Exception as error:  # from requests, httpx or plain sockets, depending on tiktoken's version
        reason = str(error).split("\n")[0][:100]
        raise DataError(
            f"--tokenizer {name}: tiktoken could not fetch its vocabulary "
            f"({type(error).__name__}: {reason}); connect once, or set TIKTOKEN_CACHE_DIR to a filled cache"
        ) from None

    digest = hashlib.sha256()
    for token, rank in sorted(encoding._mergeable_ranks.items()):
        digest.update(b"%d %s\n" % (rank, token.hex().encode()))
    for token, rank in sorted(encoding._special_tokens.items()):
        digest.update(b"%d %s\n" % (rank, token.encode()))
    return Tokenizer(
        kind="tiktoken",
        encoding=name,
        sha256=digest.hexdigest(),
        vocab_size=encoding.n_vocab,
        bos_id=encoding.eot_token,
    )


# -----------------------------------------------------------------------------
# Bytes of tokens
# -----------------------------------------------------------------------------


class ByteTable(NamedTuple):
    """Three arrays indexed by token id.

    base: UTF-8 bytes without the leading space, int64, 0 for control tokens. space: whether the piece begins
    with a space, bool. boundary: whether a leading space of the next token does not count, bool.
    """

    base: np.ndarray
    space: np.ndarray
    boundary: np.ndarray


def byte_table(tokenizer):
    """Return the ByteTable of a tokenizer by the challenge's definition.

    SentencePiece: control, unknown and unused pieces weigh nothing and are boundaries; a byte piece weighs
    one; a leading space counts unless the token before it is a boundary. tiktoken: plain lengths.
    """
    table = ByteTable(
        base=np.zeros(tokenizer.vocab_size, dtype=np.int64),
        space=np.zeros(tokenizer.vocab_size, dtype=bool),
        boundary=np.zeros(tokenizer.vocab_size, dtype=bool),
    )
    if tokenizer.kind == "tiktoken":
        encoding = require("tiktoken").get_encoding(tokenizer.encoding)
        for token in set(encoding._mergeable_ranks.values()):
            table.base[token] = len(encoding.decode_single_token_bytes(token))
        return table

    processor = require("sentencepiece").SentencePieceProcessor(model_proto=tokenizer.blob)
    for token in range(tokenizer.vocab_size):
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            table.boundary[token] = True
        elif processor.is_byte(token):
            table.base[token] = 1
        else:
            piece = processor.id_to_piece(token)
            table.space[token] = piece.startswith("\u2581")
            table.base[token] = len(piece.removeprefix("\u2581").encode())
    return table


class ByteCount(NamedTuple):
    """UTF-8 bytes of a split: of all its tokens, and of the targets that are scored."""

    total: int
    scored: int


def count_bytes(paths, tokenizer, limit):
    """Return the ByteCount of a split's shards. limit: how many targets are scored, tokens 1 to limit."""
    table = byte_table(tokenizer)
    total = scored = position = 0
    previous_is_boundary = True
    for path in paths:
        tokens = shards.load_tokens(path)
        for start in range(0, len(tokens), COUNT_TOKENS):
            ids = tokens[start : start + COUNT_TOKENS].astype(np.int64)
            after_boundary = np.concatenate(([previous_is_boundary], table.boundary[ids[:-1]]))
            sizes = table.base[ids] + (table.space[ids] & ~after_boundary)

            total += int(sizes.sum())
            # The scored targets are tokens 1 to limit of the whole split; ids[0] is its token `position`.
            first = max(1 - position, 0)
            last = max(limit + 1 - position, 0)
            scored += int(sizes[first:last].sum())

            previous_is_boundary = table.boundary[ids[-1]]
            position += len(ids)
    return ByteCount(total, scored)
