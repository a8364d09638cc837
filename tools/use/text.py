"""Text to tokens and back: the tokenizer that a data folder names, and a stream of whole characters."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from script import BadInput

SPACE = "\u2581"  # stands for a space in SentencePiece's pieces
UNKNOWN = " \u2047 "  # what SentencePiece decodes its unknown piece to


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, whichever library it belongs to."""

    name: str  # the file of SentencePiece, the encoding of tiktoken
    encode: Callable[[str], list[int]]
    pieces: list[bytes]  # the UTF-8 bytes that each token stands for; control tokens have none
    strips_first: bool = False  # whether a text's first space is not in the text

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens that begin a document."""
        stream = TextStream(self, at_start=True)
        return "".join(map(stream.feed, tokens)) + stream.end()


class TextStream:
    """Turns tokens into text, one by one: a character is given when its last byte has come."""

    def __init__(self, tokenizer: Tokenizer, at_start: bool) -> None:
        self.tokenizer = tokenizer
        self.strips = at_start and tokenizer.strips_first
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Return the characters that this token completes."""
        return self.clean(self.decoder.decode(self.tokenizer.pieces[token]))

    def end(self) -> str:
        """Return a replacement character if the last character is not complete."""
        return self.clean(self.decoder.decode(b"", final=True))

    def clean(self, text: str) -> str:
        """Put spaces back, and drop the first one of a document if the tokenizer added it."""
        text = text.replace(SPACE, " ")
        if self.strips and text:
            self.strips = False
            return text.removeprefix(" ")
        return text


def sentencepiece_tokenizer(t: ModuleType, path: str) -> Tokenizer:
    """Read a SentencePiece model. Raises the trainer's InputError if the file is not one."""
    import sentencepiece

    counts = t.sentencepiece_counts(path)
    sp = sentencepiece.SentencePieceProcessor()
    sp.LoadFromSerializedProto(Path(path).read_bytes())

    def bytes_of(token: int) -> bytes:
        piece = sp.id_to_piece(token)
        if sp.is_unknown(token):
            return UNKNOWN.encode()
        if sp.is_control(token) or sp.is_unused(token):
            return b""
        return bytes([int(piece[3:5], 16)]) if sp.is_byte(token) else piece.replace(SPACE, " ").encode()

    pieces = [bytes_of(token) for token in range(sp.vocab_size())]
    return Tokenizer(path, sp.encode, pieces, strips_first=not counts.keeps_first)


def tiktoken_tokenizer(t: ModuleType, encoding: str) -> Tokenizer:
    """Load a tiktoken encoding. Raises the trainer's InputError if it cannot be had."""
    t.tiktoken_counts(encoding)
    import tiktoken

    enc = tiktoken.get_encoding(encoding)
    pieces = [b""] * enc.n_vocab
    for piece, token in enc._mergeable_ranks.items():
        pieces[token] = piece
    return Tokenizer(encoding, enc.encode_ordinary, pieces)


def find_tokenizer(t: ModuleType, h: Any, data_path: str, tokenizer_path: str, wanted: str) -> Tokenizer:
    """Return the tokenizer at tokenizer_path, or else the one that the manifest in data_path names.

    wanted: the sha256 of the right one, "" if nothing says. Raises BadInput, or the trainer's InputError, if
    it is missing or another one.
    """
    file = tokenizer_path
    encoding = ""
    if not file:
        manifest = Path(data_path, "manifest.json")
        if not manifest.is_file():
            raise BadInput(f"{data_path}: no manifest.json names the tokenizer; give tokenizer_path=FILE")
        _, named = t.read_manifest(manifest)
        encoding = named.encoding
        file = str(Path(data_path, named.file)) if named.file and not encoding else ""
        if wanted and named.sha256 != wanted:
            raise BadInput(
                f"{manifest}: names a tokenizer of sha256 {named.sha256[:12]}, the artifact's log one of "
                f"{wanted[:12]}; give data_path=DIR of the data it was trained on, or tokenizer_path=FILE"
            )
        wanted = named.sha256

    if file and not Path(file).is_file():
        known = f" with sha256 {wanted[:12]}" if wanted else ""
        raise BadInput(f"{file}: no such file; the artifact needs its tokenizer{known}: tokenizer_path=FILE")
    if file and wanted and (found := t.sha256(Path(file).read_bytes())) != wanted:
        raise BadInput(
            f"{file}: not the artifact's tokenizer (sha256 {found[:12]}, not {wanted[:12]}); "
            "give tokenizer_path=FILE"
        )
    tokenizer = sentencepiece_tokenizer(t, file) if file else tiktoken_tokenizer(t, encoding)
    size = len(tokenizer.pieces)
    padding = h.vocab_size - size  # rows up to a multiple of 128, which no token uses
    if padding == -size % 128:
        tokenizer.pieces.extend([b""] * padding)
    if len(tokenizer.pieces) != h.vocab_size:
        raise BadInput(
            f"{tokenizer.name}: a vocabulary of {len(tokenizer.pieces)}, the artifact's is {h.vocab_size}; "
            "give tokenizer_path=FILE"
        )
    return tokenizer
