"""Build a corpus without a network, from the documentation inside the Python installation itself.

The text is the docstrings of the standard library and of every installed package, and their long string
literals, in which torch, numpy and the standard library keep more of them. It is cleaned to prose, freed of
duplicates and split by document. The same installed versions give the same bytes. The English is real but
narrow: good for watching a model learn, not for comparing scores with FineWeb.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import inspect
import io
import json
import os
import platform
import re
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import build
import shards
from messages import BadInput, Progress, megabytes, require
from tokenizing import Tokenizer, open_tokenizer
from workers import Workers

RECIPE = 1  # raise it with every change here that changes the corpus
VOCABULARIES = {"sp1024": 1024, "sp8192": 8192}  # pieces, by the tokenizer family that they stand in for
CHUNK_FILES = 64  # one unit of work for a reading process
VAL_ONE_IN = 25

# In characters:
MIN_CHARS = 200  # a shorter document is names and signatures
LITERAL_CHARS = 400  # a shorter string literal is a message or a template
LONG_CHARS = 2000  # a docstring this long is a document of its own
SENTENCE_CHARS = 40  # a shorter sentence repeats by chance

DOC_SUFFIXES = (".rst", ".md", ".txt")
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "lib2to3", "licenses"}
SKIPPED_PREFIXES = tuple(
    "license copying notice authors requirements top_level entry_points sources cmakelists "
    "dependency_links vendor".split()
)

# Beginnings of lines: of one that opens a block without prose, and of one that is not a sentence.
BLOCK_OPENERS = (
    *(".. code", ".. math", ".. plot", ".. sourcecode"),
    *(".. doctest", ".. test", ".. image", ".. figure"),
)
MARKUP = (":param", ":type", ".. ", "|", "+--", "$ ")
ROLE = re.compile(r":[a-z]+(?::[a-z]+)?:`~?([^`<]*?)(?: ?<[^`]*>)?`")  # :func:`~a.b`; group 1 is a.b
EMPHASIS = re.compile(r"`{1,2}|\*\*|:(?=:$)")

# Common words: a fifth of English prose, almost absent from code, tables and word lists.
COMMON_WORDS = frozenset(
    "the of and to a in is that for it as be on by with this are not or an if from at can which will was "
    "used have when has may but all any use should its one must only than been also into".split()
)


# ---- finding what is installed -------------------------------------------------------------------


class Sources(NamedTuple):
    """What a corpus is made of, in a fixed order."""

    versions: dict[str, str]  # of the packages, by name
    files: list[Path]


def installed() -> Sources:
    """Return the sources that this Python has.

    The files are .py of the standard library, and .py, .rst, .md and .txt of all distributions on sys.path.
    """
    versions = {"python": platform.python_version()}
    files = []
    library = Path(sysconfig.get_paths()["stdlib"])
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        files += [Path(folder) / name for name in sorted(names) if name.endswith(".py")]

    for name, distribution in sorted(installed_distributions().items()):
        versions[name] = distribution.version
        for file in sorted(distribution.files or [], key=str):
            is_skipped = SKIPPED_FOLDERS & set(file.parts[:-1])
            if file.suffix in (".py", *DOC_SUFFIXES) and not is_skipped:
                files.append(Path(distribution.locate_file(file)))
    return Sources(versions, [file for file in files if not file.name.lower().startswith(SKIPPED_PREFIXES)])


def installed_distributions() -> dict[str, importlib.metadata.Distribution]:
    """Return {normalized name: distribution}; of two with one name, the first on sys.path, as for imports."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name:
            found.setdefault(name, distribution)
    return found


# ---- from files to documents ---------------------------------------------------------------------


def strings_of(source: str) -> list[str]:
    """Return the docstrings and long string literals of Python source, in order; [] if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escape sequences in the source
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return []

    found = []  # (line, 0 for a docstring or 1 for a literal, text), to be sorted
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                found.append((getattr(node, "lineno", 0), 0, docstring))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Constant):
                if isinstance(child.value, str) and len(child.value) >= LITERAL_CHARS:
                    found.append((child.lineno, 1, inspect.cleandoc(child.value)))
            elif not isinstance(child, (ast.expr_context, ast.operator, ast.cmpop, ast.Name)):
                stack.append(child)
    return list(dict.fromkeys(text for _, _, text in sorted(found)))  # a long docstring is found twice


def clean(text: str) -> str:
    """Return the prose of a docstring, line by line: no doctests, code blocks, rules, tables or mark-up."""
    kept = []
    in_doctest = False  # true from a prompt to the next blank line, so that its output goes too
    block_indent = None  # indent of the line that opened the current literal block
    for line in text.expandtabs().split("\n"):
        bare = line.strip()
        if not bare:
            in_doctest = False
            kept.append("")
            continue

        indent = len(line) - len(line.lstrip())
        if block_indent is not None and indent > block_indent:
            continue
        is_paragraph_opener = bare.endswith("::") and not bare.startswith("..")
        opens_block = bare.startswith(BLOCK_OPENERS) or is_paragraph_opener
        block_indent = indent if opens_block else None
        in_doctest = in_doctest or bare.startswith(">>>")

        plain = EMPHASIS.sub("", ROLE.sub(r"\1", line.rstrip()))
        if not in_doctest and is_mostly_letters(plain.strip()) and not bare.startswith(MARKUP):
            kept.append(plain)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def is_mostly_letters(line: str) -> bool:
    """Return whether at least three fifths of a line are letters and spaces."""
    return sum(char.isalpha() or char == " " for char in line) >= 0.6 * len(line)


def is_prose(text: str) -> bool:
    """Return whether a text is mostly English: at least a seventh common words, and almost all ASCII."""
    words = re.findall(r"[A-Za-z']+", text.lower())
    return (
        len(text) >= MIN_CHARS
        and len(words) >= 20
        and sum(word in COMMON_WORDS for word in words) >= len(words) / 7
        and sum(char.isascii() for char in text) >= 0.97 * len(text)
    )


def documents_of(path: str | Path) -> list[str]:
    """Return the documents of one file: each long docstring, and all the short ones together."""
    try:
        source = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # listed but not installed, or not text
        return []

    strings = strings_of(source) if str(path).endswith(".py") else [source]
    texts = [clean(string.replace("\0", " ")) for string in strings]
    documents = [text for text in texts if len(text) >= LONG_CHARS]
    documents.append("\n\n".join(text for text in texts if 0 < len(text) < LONG_CHARS))
    return [document for document in documents if is_prose(document)]


def documents_of_files(paths: list[Path]) -> list[str]:
    """Return the documents of all `paths`, in order."""
    gc.disable()  # collecting millions of short-lived tree nodes takes a third of the time
    documents = [document for path in paths for document in documents_of(path)]
    gc.enable()
    gc.collect()
    return documents


def extract(files: list[Path], workers: int) -> list[str]:
    """Return all documents of `files`, in order, read by `workers` processes."""
    chunks = [files[start : start + CHUNK_FILES] for start in range(0, len(files), CHUNK_FILES)]
    progress = Progress("read", len(files), " files")
    documents = []
    with Workers(workers) as pool:
        for number, (_, found) in enumerate(pool.run(documents_of_files, chunks), 1):
            documents += found
            progress.update(min(CHUNK_FILES * number, len(files)))
    size = megabytes(sum(map(len, documents)))
    progress.close(f"{len(files)} files, {len(documents)} documents, {size}")
    return documents


# ---- duplicates and the split --------------------------------------------------------------------


class Sentence(NamedTuple):
    """What is kept of a sentence: a hash that ignores case, and its length in characters."""

    mark: bytes
    size: int


def sentences(text: str) -> Iterator[Sentence]:
    """Yield each sentence or line of at least SENTENCE_CHARS characters."""
    for piece in re.split(r"(?<=[.!?])\s+|\n", text):
        sentence = " ".join(piece.lower().split())
        if len(sentence) >= SENTENCE_CHARS:
            mark = hashlib.blake2b(sentence.encode(), digest_size=8).digest()
            yield Sentence(mark, len(sentence))


def sentence_chars(found: list[Sentence], seen: set[bytes] | None = None) -> int:
    """Return the total length of some sentences, or of those of them whose hash is in `seen`."""
    return sum(each.size for each in found if seen is None or each.mark in seen)


def deduplicate(documents: list[str]) -> list[str]:
    """Return the documents that repeat at most half of their sentence text from documents before them."""
    exact = set()
    seen = set()
    kept = []
    progress = Progress("drop duplicates", len(documents), " documents")
    for text in documents:
        progress.advance()
        fingerprint = build.fingerprint(text)
        found = list(sentences(text))
        if fingerprint in exact or 2 * sentence_chars(found, seen) > sentence_chars(found):
            continue
        exact.add(fingerprint)
        seen.update(each.mark for each in found)
        kept.append(text)
    progress.erase()
    return kept


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """Return (train, val): about 1 in VAL_ONE_IN documents goes to val, chosen by the hash of its text.

    A val document is dropped if over a quarter of its sentence text occurs in train. `deduplicate` allows
    that if the train document is the longer one. Raises BadInput if train or val is empty.
    """
    train = []
    candidates = []
    for text in documents:
        number = int.from_bytes(build.fingerprint(text)[:4], "little")
        if number % VAL_ONE_IN == 0:
            candidates.append(text)
        else:
            train.append(text)

    seen = {each.mark for text in train for each in sentences(text)}
    val = []
    for text in candidates:
        found = list(sentences(text))
        if 4 * sentence_chars(found, seen) <= sentence_chars(found):
            val.append(text)

    if not train or not val:
        raise BadInput(
            f"too little documentation is installed ({len(documents)} documents); "
            "run: pip install -r requirements.txt"
        )
    return train, val


# ---- the tokenizer and the dataset ---------------------------------------------------------------


def train_tokenizer(texts: list[str], vocab: int) -> bytes:
    """Train a SentencePiece BPE model of `vocab` pieces with the challenge's settings and return its bytes.

    The settings are those of openai/parameter-golf, data/download_hf_docs_and_tokenize.py. It trains on whole
    documents, as they will be encoded. Raises BadInput unless U+2581, the mark of a space, is a piece of its
    own, since the byte count of a token relies on it.
    """
    sentencepiece = require("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab,
        hard_vocab_limit=False,
        character_coverage=0.999,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="nmt_nfkc",
        add_dummy_prefix=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        max_sentence_length=1 << 24,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    if processor.is_unknown(processor.piece_to_id("\u2581")):
        raise BadInput(
            "the trained tokenizer has no piece for a single space; use `text` with another tokenizer"
        )
    return model.getvalue()


def identity(versions: dict[str, str], vocab: int) -> dict[str, Any]:
    """Return the manifest's `source`: if it is equal, the corpus is equal."""
    mark = hashlib.sha256(json.dumps([RECIPE, vocab, versions], sort_keys=True).encode()).hexdigest()
    return {"kind": "offline", "recipe": RECIPE, "fingerprint": mark, "versions": versions}


def write_documents(path: Path, documents: list[str]) -> None:
    """Write documents as .txt input of `build.build_dataset`, separated by NUL."""
    path.write_bytes("\0".join(documents).encode())


def unchanged_corpus(out: Path, source: dict[str, Any]) -> shards.Manifest | None:
    """Return the manifest of `out` if it holds the corpus of `source`, else None."""
    try:
        manifest = shards.load_manifest(out)
    except BadInput:  # no dataset to reuse; build_dataset refuses a folder that is not ours
        return None
    if manifest["source"] != source or shards.check_dataset(out, deep=False):
        return None
    return manifest


def extract_splits(files: list[Path], workers: int) -> dict[str, list[str]]:
    """Return {"train": documents, "val": documents} of the files, without duplicates."""
    documents = extract(files, workers)
    progress = Progress("drop duplicates", 0)
    train, val = split_documents(deduplicate(documents))
    progress.close(
        f"{len(train)} + {len(val)} documents kept, {megabytes(sum(map(len, train)))} train, "
        f"{megabytes(sum(map(len, val)))} val"
    )
    return {"train": train, "val": val}


def write_model(path: Path, texts: list[str], vocab: int) -> Tokenizer:
    """Train a tokenizer of `vocab` pieces on the texts, write its model to `path` and return it."""
    progress = Progress("train tokenizer", 0)
    with progress.waiting():
        path.write_bytes(train_tokenizer(texts, vocab))
    tokenizer = open_tokenizer(path)
    progress.close(f"{tokenizer.vocab_size} pieces")
    return tokenizer


def build_corpus(
    out: Path,
    workers: int,
    sources: Sources | None = None,
    vocab: int = 1024,
) -> build.Built:
    """Build the corpus into `out`.

    sources: instead of `installed()`. Returns at once if `out` was built from the same versions.
    """
    versions, files = sources or installed()
    source = identity(versions, vocab)
    if manifest := unchanged_corpus(out, source):
        return build.Built(manifest, is_new=False)

    documents = extract_splits(files, workers)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = write_model(Path(scratch) / shards.MODEL, documents["train"], vocab)
        splits = {}
        for split, texts in documents.items():
            path = Path(scratch) / f"{split}.txt"
            write_documents(path, texts)
            splits[split] = [path]

        is_older_corpus = all(name.startswith("offline_") for name in shards.shard_files(out))
        return build.build_dataset(
            out,
            "offline",
            tokenizer,
            splits=splits,
            source=source,
            options=build.BuildOptions(workers=workers, replace=is_older_corpus),
        )
