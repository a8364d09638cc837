"""A corpus with no network: the documentation inside the Python installation itself.

Docstrings (and long string literals, which is how torch, numpy and the standard library keep theirs) of the
standard library and of every installed package, cleaned to prose, freed of duplicates and split by document.
The same installed versions give the same bytes. Real English, though narrow: good for seeing a model learn,
not for comparing scores with FineWeb.
"""

import ast
import gc
import hashlib
import importlib.metadata
import inspect
import io
import json
import multiprocessing
import os
import platform
import re
import sysconfig
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import shards
from shards import DataError

RECIPE = 1                                      # raise when a change here changes the corpus
VOCAB = 1024
MIN_CHARS = 200                                 # shorter documents are names and signatures
LITERAL_CHARS = 400                             # shorter string literals are messages and templates
LONG_CHARS = 2000                               # a docstring that is a document of its own
SENTENCE_CHARS = 40                             # shorter lines repeat by chance
VAL_ONE_IN = 25
DOC_FILES = (".rst", ".md", ".txt")
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "lib2to3", "licenses"}
SKIPPED_FILES = ("license", "copying", "notice", "authors", "requirements", "top_level", "entry_points",
                 "sources", "cmakelists", "dependency_links", "vendor")
LITERAL = (".. code", ".. math", ".. plot", ".. sourcecode", ".. doctest", ".. test", ".. image", ".. figure")
MARKUP = (":param", ":type", ".. ", "|", "+--", "$ ")   # lines that begin so are not sentences
# Common words: a fifth of English prose, almost absent from code, tables and word lists.
WORDS = frozenset("the of and to a in is that for it as be on by with this are not or an if from at can "
                  "which will was used have when has may but all any use should its one must only than been "
                  "also into".split())


# -----------------------------------------------------------------------------
# What is installed
# -----------------------------------------------------------------------------

def installed():
    """({package: version}, [files]): what the corpus is made from, in a fixed order.

    Files are .py, .rst, .md and .txt of the standard library and of all distributions on sys.path.
    """
    versions, files = {"python": platform.python_version()}, []
    library = Path(sysconfig.get_paths()["stdlib"])
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS)
        files += [Path(folder) / n for n in sorted(names) if n.endswith(".py")]
    found = {}
    for dist in importlib.metadata.distributions():
        name = (dist.metadata["Name"] or "").lower().replace("_", "-")
        if name and name not in found:          # the first on sys.path is the one that imports
            found[name] = dist
    for name, dist in sorted(found.items()):
        versions[name] = dist.version
        for file in sorted(dist.files or [], key=str):
            if file.suffix in (".py", *DOC_FILES) and not SKIPPED_FOLDERS & set(file.parts[:-1]):
                files.append(Path(dist.locate_file(file)))
    return versions, [f for f in files if not f.name.lower().startswith(SKIPPED_FILES)]


# -----------------------------------------------------------------------------
# From files to documents
# -----------------------------------------------------------------------------

def strings_of(source):
    """Docstrings and long string literals of Python source, in order; none if it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # other people's escape sequences
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return []
    found, stack = [], [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                found.append((getattr(node, "lineno", 0), 0, text))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Constant):
                if isinstance(child.value, str) and len(child.value) >= LITERAL_CHARS:
                    found.append((child.lineno, 1, inspect.cleandoc(child.value)))
            elif not isinstance(child, (ast.expr_context, ast.operator, ast.cmpop, ast.Name)):
                stack.append(child)
    return list(dict.fromkeys(text for _, _, text in sorted(found)))    # a long docstring is a literal too


def clean(text):
    """Prose of a docstring: no doctest sessions, code blocks, rules, tables or mark-up; lines kept."""
    kept, session, block = [], False, None          # block: indent of the line that opened a literal block
    for line in text.expandtabs().split("\n"):
        bare = line.strip()
        indent = len(line) - len(line.lstrip())
        if not bare:
            session = False
            kept.append("")
            continue
        if block is not None and indent > block:
            continue
        literal = bare.startswith(LITERAL) or bare.endswith("::") and not bare.startswith("..")
        block = indent if literal else None
        session = session or bare.startswith(">>>")     # up to the next blank line: a prompt and its output
        line = re.sub(r":[a-z]+(?::[a-z]+)?:`~?([^`<]*?)(?: ?<[^`]*>)?`", r"\1", line.rstrip())
        line = re.sub(r"`{1,2}|\*\*|:(?=:$)", "", line)
        letters = sum(c.isalpha() or c == " " for c in line.strip())
        if not session and letters >= 0.6 * len(line.strip()) and not bare.startswith(MARKUP):
            kept.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def is_prose(text):
    """Mostly English sentences: at least a seventh common words, almost only ASCII."""
    words = re.findall(r"[A-Za-z']+", text.lower())
    return (len(text) >= MIN_CHARS and len(words) >= 20
            and sum(w in WORDS for w in words) >= len(words) / 7
            and sum(c.isascii() for c in text) >= 0.97 * len(text))


def documents_of(path):
    """The documents of one file: each long docstring, and all the short ones together."""
    try:
        source = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):       # not installed after all, or not text
        return []
    texts = strings_of(source) if str(path).endswith(".py") else [source]
    texts = [t for t in (clean(t.replace("\0", " ")) for t in texts) if t]
    documents = [t for t in texts if len(t) >= LONG_CHARS]
    documents.append("\n\n".join(t for t in texts if len(t) < LONG_CHARS))
    return [d for d in documents if is_prose(d)]


def documents_of_files(paths):
    """`documents_of` for a chunk of files."""
    gc.disable()                                # millions of short-lived tree nodes: a third of the time
    documents = [d for path in paths for d in documents_of(path)]
    gc.enable()
    gc.collect()
    return documents


def extract(files, workers):
    """All documents of `files`, in order."""
    chunks = [files[i:i + 64] for i in range(0, len(files), 64)]
    progress, documents = shards.Progress("read", len(files), " files"), []
    if workers == 1:
        results = map(documents_of_files, chunks)
        pool = None
    else:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), shards.ignore_interrupt)
        results = pool.map(documents_of_files, chunks)
    try:
        for number, found in enumerate(results, 1):
            documents += found
            progress.update(min(64 * number, len(files)))
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    progress.close(f"{len(files)} files, {len(documents)} documents, {shards.mb(sum(map(len, documents)))}")
    return documents


# -----------------------------------------------------------------------------
# Duplicates and the split
# -----------------------------------------------------------------------------

def sentences(text):
    """(hash, length) of the sentences and lines of at least SENTENCE_CHARS characters, case ignored."""
    for line in re.split(r"(?<=[.!?])\s+|\n", text):
        line = " ".join(line.lower().split())
        if len(line) >= SENTENCE_CHARS:
            yield hashlib.blake2b(line.encode(), digest_size=8).digest(), len(line)


def deduplicate(documents):
    """Documents that are mostly new: no repetition, and under half of the sentence text seen before."""
    exact, seen, kept = set(), set(), []
    for text in documents:
        mark = shards.fingerprint(text)
        found = list(sentences(text))
        total = sum(size for _, size in found)
        known = sum(size for key, size in found if key in seen)
        if mark in exact or 2 * known > total:
            continue
        exact.add(mark)
        seen.update(key for key, _ in found)
        kept.append(text)
    return kept


def split_documents(documents):
    """(train, val) by hash of the text, about 1 in VAL_ONE_IN.

    A val document is left out altogether when over a quarter of its sentence text occurs in train, which
    `deduplicate` allows when the train document is the longer one.
    """
    train, val = [], []
    for text in documents:
        mark = int.from_bytes(shards.fingerprint(text)[:4], "little")
        (val if mark % VAL_ONE_IN == 0 else train).append(text)
    seen = {key for text in train for key, _ in sentences(text)}
    clean_val = []
    for text in val:
        found = list(sentences(text))
        if 4 * sum(size for key, size in found if key in seen) <= sum(size for _, size in found):
            clean_val.append(text)
    if not train or not clean_val:
        raise DataError(f"too little documentation is installed ({len(documents)} documents); "
                        "run: pip install -r requirements.txt")
    return train, clean_val


# -----------------------------------------------------------------------------
# The tokenizer and the dataset
# -----------------------------------------------------------------------------

def train_tokenizer(texts, vocab):
    """Bytes of a SentencePiece BPE model with the challenge's settings.

    They are those of openai/parameter-golf, data/download_hf_docs_and_tokenize.py. Whole documents are fed,
    as they will be encoded. DataError unless U+2581, the mark of a space, is a piece of its own: the
    byte count of a token relies on it.
    """
    spm = shards.require("sentencepiece")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab,
        character_coverage=0.999, byte_fallback=True, split_digits=True, normalization_rule_name="nmt_nfkc",
        add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False,
        max_sentence_length=1 << 24, num_threads=1, minloglevel=2)
    sp = spm.SentencePieceProcessor(model_proto=model.getvalue())
    if sp.is_unknown(sp.piece_to_id("\u2581")):
        raise DataError("the trained tokenizer has no piece for a single space; "
                        "use `text` with another tokenizer")
    return model.getvalue()


def identity(versions):
    """The manifest's `source`: what must be equal for the corpus to be equal."""
    mark = hashlib.sha256(json.dumps([RECIPE, VOCAB, versions], sort_keys=True).encode()).hexdigest()
    return {"kind": "offline", "recipe": RECIPE, "fingerprint": mark, "versions": versions}


def write_documents(path, documents):
    """A .txt input of `shards.build`: documents separated by NUL."""
    path.write_bytes("\0".join(documents).encode())


def build(out, workers, sources=None, vocab=VOCAB):
    """Build the corpus into `out`; returns (manifest, True when built just now).

    sources: (versions, files) in place of `installed()`. At once when `out` was built from the same versions.
    """
    versions, files = sources or installed()
    source = identity(versions)
    try:
        manifest = shards.load_manifest(out)
        if manifest["source"] == source and not shards.check_dataset(out, deep=False):
            return manifest, False
    except DataError:
        pass                                    # not there, or not ours: built below, or refused there
    documents = extract(files, workers)
    progress = shards.Progress("drop duplicates", 0)
    train, val = split_documents(deduplicate(documents))
    progress.close(f"{len(train)} + {len(val)} documents kept, {shards.mb(sum(map(len, train)))} train, "
                   f"{shards.mb(sum(map(len, val)))} val")
    progress = shards.Progress("train tokenizer", 0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / shards.MODEL).write_bytes(train_tokenizer(train, vocab))
        tokenizer = shards.open_tokenizer(folder / shards.MODEL)
        progress.close(f"{tokenizer.vocab_size} pieces")
        write_documents(folder / "train.txt", train)
        write_documents(folder / "val.txt", val)
        splits = {"train": [folder / "train.txt"], "val": [folder / "val.txt"]}
        ours = all(name.startswith("offline_") for name in shards.shard_files(out))
        options = shards.BuildOptions(workers=workers, replace=ours)     # an older one of ours; nothing else
        return shards.build(out, "offline", tokenizer, splits, source, options)
