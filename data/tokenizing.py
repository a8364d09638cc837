"""Tokenizers of a dataset, SentencePiece models and tiktoken encodings, and the bytes of their text.

The bytes of a document are the UTF-8 length of what its tokenizer decodes. There is no table of bytes per
token here: the trainer has the only one, and its tests compare it with the decoded text too.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import shards
from messages import BadInput, explain, read_whole, require

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

COUNT_TOKENS = 1 << 19  # how many tokens count_bytes decodes at a time, roughly
LONGEST_SPACE = 250_000  # white-space characters in a row that tiktoken is given
SPACE = "\u2581"  # what SentencePiece writes for a space


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

    def entry(self) -> shards.ManifestTokenizer:
        """Return the manifest's `tokenizer` object."""
        return {
            "kind": self.kind,
            "file": shards.MODEL if self.blob else None,
            "encoding": self.encoding,
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
        }

    def load(self) -> SentencePieceCoder | TiktokenCoder:
        """Return a coder: SentencePieceCoder or TiktokenCoder."""
        if self.kind == "sentencepiece":
            return SentencePieceCoder(self)
        return TiktokenCoder(self)


class SentencePieceCoder:
    """Encode with a SentencePiece model, on one thread: the work is spread over processes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bos_id = tokenizer.bos_id
        self.processor = require("sentencepiece").SentencePieceProcessor(model_proto=tokenizer.blob)
        # Without a piece for a space, byte pieces spell it, and the library decodes these as U+2581.
        self.spells_space = self.processor.is_unknown(self.processor.piece_to_id(SPACE))
        self.drops_first_space = drops_first_space(self.processor)
        self.unknown = self.processor.unk_id()  # stands for text that no piece spells; -1 if there is none

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, as lists, without BOS."""
        return self.processor.encode(texts, num_threads=1)

    def decoded_bytes(self, documents: list[list[int]]) -> list[int]:
        """Return the UTF-8 length of the text of each document. documents: lists of ids without BOS."""
        texts = self.processor.decode(documents, num_threads=1)
        if self.spells_space:
            texts = [text.replace(SPACE, " ") for text in texts]
            if self.drops_first_space:
                texts = [text.removeprefix(" ") for text in texts]
        return [len(text.encode()) for text in texts]

    def prefix_bytes(self, ids: list[int]) -> int:
        """Return the UTF-8 length of the beginning of a document, which may end inside a character."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids[-3:]:  # no character that lacks a byte has more
            if self.processor.is_byte(token):
                utf8.decode(bytes([int(self.processor.id_to_piece(token)[3:5], 16)]))  # of <0xE2>
            else:
                utf8.reset()
        unfinished = len(utf8.getstate()[0])
        [whole] = self.decoded_bytes([ids[: len(ids) - unfinished]])
        return whole + unfinished


def drops_first_space(processor: SentencePieceProcessor) -> bool:
    """Return whether a SentencePiece model drops or adds a space at the start of a text.

    That is add_dummy_prefix or remove_extra_whitespaces: with either, the library decodes no such space.
    """
    return processor.normalize("a") != "a" or processor.normalize(" a") == "a"


class TiktokenCoder:
    """Encode with a tiktoken encoding; text that spells a special token is ordinary text.

    Its regular expressions overflow a stack at about a million white-space characters in a row, so runs
    longer than LONGEST_SPACE are encoded in pieces.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bos_id = tokenizer.bos_id
        self.encoding = require("tiktoken").get_encoding(tokenizer.encoding)
        self.unknown = -1  # its tokens spell any text

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, as lists, without BOS."""
        return [self.encode_text(text) for text in texts]

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of one text."""
        if len(text) <= LONGEST_SPACE:
            return self.encoding.encode_ordinary(text)
        return [token for piece in cut_spaces(text) for token in self.encoding.encode_ordinary(piece)]

    def decoded_bytes(self, documents: list[list[int]]) -> list[int]:
        """Return the number of bytes of each document. documents: lists of ids without BOS."""
        return [self.prefix_bytes(ids) for ids in documents]

    def prefix_bytes(self, ids: list[int]) -> int:
        """Return the number of bytes of the beginning of a document, which may end inside a character."""
        return len(self.encoding.decode_bytes(ids))


def cut_spaces(text: str) -> Iterator[str]:
    """Yield a text in pieces, cut after every LONGEST_SPACE white-space characters in a row."""
    start = 0
    for run in re.finditer(r"\s+", text):
        for cut in range(run.start() + LONGEST_SPACE, run.end(), LONGEST_SPACE):
            yield text[start:cut]
            start = cut
    yield text[start:]


# ---- opening a tokenizer -------------------------------------------------------------------------


def open_tokenizer(name: str | Path) -> Tokenizer:
    """Return the Tokenizer of a .model file or a tiktoken encoding. Raises BadInput if it is neither."""
    path = Path(name)
    if name and (path.suffix == ".model" or path.exists()):
        tokenizer = sentencepiece_tokenizer(path)
    else:
        tokenizer = tiktoken_tokenizer(name)
    if tokenizer.vocab_size > shards.MAX_VOCAB:
        raise BadInput(
            f"{name}: vocab_size {tokenizer.vocab_size}, but shards hold 16-bit ids "
            f"({shards.MAX_VOCAB} at most); choose a smaller tokenizer"
        )
    return tokenizer


def sentencepiece_tokenizer(path: Path) -> Tokenizer:
    """Return the Tokenizer of the SentencePiece model file at `path`. Raises BadInput if it is not one."""
    processor = require("sentencepiece").SentencePieceProcessor()
    try:
        blob = read_whole(path)
    except OSError as error:
        raise BadInput(f"--tokenizer {explain(error, path)}") from None
    try:
        processor.load_from_serialized_proto(blob)
        vocab_size = processor.vocab_size()
        bos_id = processor.bos_id()
    except (RuntimeError, OSError, ValueError):
        vocab_size = bos_id = 0
    if not vocab_size:
        raise BadInput(
            f"--tokenizer {path}: not a SentencePiece model; give a .model file or a tiktoken encoding name"
        )
    if bos_id < 0:
        raise BadInput(f"--tokenizer {path}: the model has no BOS piece; train it with bos_id >= 0")

    return Tokenizer(
        kind="sentencepiece",
        encoding=None,
        sha256=hashlib.sha256(blob).hexdigest(),
        vocab_size=vocab_size,
        bos_id=bos_id,
        blob=blob,
    )


def tiktoken_tokenizer(name: str) -> Tokenizer:
    """Return the Tokenizer of a tiktoken encoding, its sha256 over the sorted ranks and special tokens.

    Raises BadInput if there is no such encoding, or if its vocabulary is neither cached nor reachable.
    """
    tiktoken = require("tiktoken")
    try:
        encoding = tiktoken.get_encoding(name)
    except ValueError:
        known = ", ".join(tiktoken.list_encoding_names())
        raise BadInput(
            f"--tokenizer {name}: no such file and no such tiktoken encoding; "
            f"give a SentencePiece .model file or one of {known}"
        ) from None
    except Exception as error:  # requests, httpx or plain sockets raise it, depending on tiktoken's version
        reason = str(error).split("\n")[0][:100]
        raise BadInput(
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


# ---- bytes of a split ----------------------------------------------------------------------------


class ByteCount(NamedTuple):
    """UTF-8 bytes of a split: of all its tokens, and of the targets that are scored."""

    total: int
    scored: int


def split_documents(paths: list[Path], bos_id: int) -> Iterator[np.ndarray]:
    """Yield the documents of a split's shards, as arrays that begin with BOS. A document may span shards.

    Text before the first BOS of the split comes first, without one.
    """
    unfinished = []  # parts of a document, of which the next shard may hold another
    for path in paths:
        tokens = shards.load_tokens(path)
        first, *others = np.split(tokens, np.flatnonzero(tokens == bos_id))
        unfinished.append(first)
        for document in others:
            yield np.concatenate(unfinished)
            unfinished = [document]
    yield np.concatenate(unfinished)


def document_batches(paths: list[Path], bos_id: int) -> Iterator[list[np.ndarray]]:
    """Yield the `split_documents`, as lists of documents with about COUNT_TOKENS tokens together."""
    batch = []
    tokens = 0
    for document in split_documents(paths, bos_id):
        batch.append(document)
        tokens += len(document)
        if tokens >= COUNT_TOKENS:
            yield batch
            batch = []
            tokens = 0
    yield batch


def without_bos(document: np.ndarray, bos_id: int) -> list[int]:
    """Return the ids of a document as a list without BOS."""
    ids = document.tolist()
    return ids[1:] if ids[:1] == [bos_id] else ids


UNKNOWN_TEXT = (
    "the unknown piece stands for text that the tokenizer cannot spell, so bits per byte would be wrong; "
    "use a tokenizer with byte_fallback"
)


def find_unknown(paths: list[Path], unknown: int) -> str | None:
    """Return what is wrong with the first held-out shard that has unknown pieces, None if none has."""
    for path in paths:
        if count := np.count_nonzero(shards.load_tokens(path) == unknown):
            return f"{path}: {count} tokens are the unknown piece: {UNKNOWN_TEXT}"
    return None


def check_held_out(folder: str | Path, manifest: shards.Manifest) -> list[str]:
    """Return a line for every held-out split of a sound dataset folder in which some text is not known."""
    entry = manifest["tokenizer"]
    if not entry["file"]:
        return []
    unknown = open_tokenizer(Path(folder) / entry["file"]).load().unknown
    splits = {split: about for split, about in manifest["splits"].items() if split != "train"}
    found = [
        find_unknown([Path(folder) / shard["file"] for shard in about["shards"]], unknown)
        for about in splits.values()
    ]
    return [problem for problem in found if problem is not None]


def count_bytes(paths: list[Path], tokenizer: Tokenizer, limit: int) -> ByteCount:
    """Return the ByteCount of a split's shards, which begin with BOS. Raises BadInput for unknown pieces.

    limit: how many targets are scored, tokens 1 to limit of the split; the last document may be cut.
    """
    coder = tokenizer.load()
    total = scored = position = 0
    problem = find_unknown(paths, coder.unknown)
    if problem is not None:
        raise BadInput(problem)
    for batch in document_batches(paths, tokenizer.bos_id):
        documents = [without_bos(document, tokenizer.bos_id) for document in batch]
        sizes = coder.decoded_bytes(documents)
        total += sum(sizes)
        for document, ids, size in zip(batch, documents, sizes):
            end = position + len(document)
            if end <= limit + 1:
                scored += size
            elif position <= limit:
                scored += coder.prefix_bytes(ids[: limit - position])
            position = end
    return ByteCount(total, scored)
